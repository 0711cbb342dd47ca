"""DDP beside a liar.

Four processes train one model with torch's DistributedDataParallel over gloo; the last one sends its gradient times
-1000. With the hook, which is one line, the model learns as if nobody lied.
"""

import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing
from sklearn.datasets import load_digits

from robustkern.distributed import DDPState, ddp_hook
from robustkern.measure import style

RANKS, STEPS = 4, 60


def train(rank, port, losses):
    """One process: train with the hook and without, and keep the loss that an honest rank sees."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    for turn, hooked in enumerate((True, False)):
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 10))
        if hooked:
            model.register_comm_hook(DDPState("ctma(median)", f=1), ddp_hook)
        if rank == RANKS - 1:
            for parameter in model.parameters():
                parameter.register_hook(lambda gradient: -1000 * gradient)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        picks = torch.Generator().manual_seed(rank)
        for step in range(STEPS):
            batch = torch.randint(len(labels), (64,), generator=picks)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if rank == 0:
                with torch.no_grad():
                    losses[turn, step] = torch.nn.functional.cross_entropy(model.module(images), labels)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    losses = torch.zeros(2, STEPS).share_memory_()
    torch.multiprocessing.spawn(train, (port, losses), nprocs=RANKS)
    print(f"loss with the hook {losses[0, -1]:.3f}, averaged {losses[1, -1]:.3g}")
    assert losses[0, -1] < 0.7
    assert losses[1, -1] > 10

    figure = style.figure(7, 3.4)
    axes = figure.subplots()
    for row, name, colour in ((0, "ctma(median) by the hook", style.COLOURS[1]), (1, "averaged", style.COLOURS[4])):
        axes.plot(range(1, STEPS + 1), losses[row], color=colour, label=name, linewidth=2)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", xlim=(1, STEPS))
    style.plain_ticks(axes)
    axes.legend(frameon=False)
    style.save(figure, sys.argv[1] if len(sys.argv) > 1 else "liar.png")

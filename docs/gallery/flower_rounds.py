"""Flower rounds that no client can end.

Real rounds of Flower's message API, with clients in this process. One of seven sends another surprise in each round:
NaN, a wrong shape, bytes that hold no array, a claim of 1e15 samples. Flower's own strategies stop at the first of
them; this one goes on.
"""

import logging
import sys
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from robustkern.adapters.flower import RobustStrategy
from robustkern.measure import style

CLIENTS, ROUNDS = 7, 8
TRUTH = np.linspace(-1, 1, 20, dtype=np.float32)
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # which a deployment sets
logging.getLogger("flwr").setLevel(logging.ERROR)


def hostile(weights, round_):
    """Return what the hostile client sends this time, and how many samples it claims."""
    surprises = [
        (Array(weights * np.nan), 10),
        (Array(weights[:3].copy()), 10),
        (Array("float32", weights.shape, "numpy.ndarray", b"no array"), 10),
        (Array(weights + 1e30), 10**15),
        (Array(weights.astype(np.float64)), 10),
    ]
    return surprises[round_ % len(surprises)]


class Here(Grid):
    """Clients in this process: each takes a noisy step towards the truth."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Answer at once."""
        replies = []
        for message in messages:
            node, round_ = message.metadata.dst_node_id, int(message.content["config"]["server-round"])
            (name,) = message.content.array_records
            model = message.content[name]["w"].numpy()
            noise = 0.05 * np.random.default_rng([node, round_]).standard_normal(20).astype(np.float32)
            array, claimed = Array(model + 0.5 * (TRUTH - model) + noise), 10
            if node == CLIENTS - 1:
                array, claimed = hostile(model, round_)
            metrics = MetricRecord({"num-examples": claimed, "loss": float(np.abs(TRUTH - model).mean())})
            content = RecordDict({"arrays": ArrayRecord({"w": array}), "metrics": metrics})
            replies.append(Message(content, reply_to=message))
        return replies

    def get_node_ids(self):
        """Return all clients."""
        return list(range(CLIENTS))

    run = property(lambda self: None)
    set_run = create_message = push_messages = pull_messages = lambda self, *asked, **options: None


strategy = RobustStrategy("ctma(geometric_median)", f=1, fraction_evaluate=0.0)
start = ArrayRecord({"w": Array(np.full(20, 3, dtype=np.float32))})
result = strategy.start(grid=Here(), initial_arrays=start, num_rounds=ROUNDS)
error = np.abs(result.arrays["w"].numpy() - TRUTH).max()
losses = [result.train_metrics_clientapp[k]["loss"] for k in range(1, ROUNDS + 1)]
print(f"after {ROUNDS} rounds at most {error:.3f} from the truth")
assert error < 0.1

figure = style.figure(6.5, 3.2)
axes = figure.subplots()
axes.plot(range(1, ROUNDS + 1), losses, color=style.COLOURS[1], marker="o")
names = ("wrong shape", "no array", "1e30", "float64", "NaN")
for k, loss in enumerate(losses):
    axes.annotate(names[k % len(names)], (k + 1, loss), (0, 12), textcoords="offset points", fontsize=8, rotation=35)
axes.set(
    xlabel="round, and what the hostile client sent",
    ylabel="clients' loss",
    ylim=(0, 1.35 * max(losses)),
    xlim=(0.7, ROUNDS + 0.9),
)
style.plain_ticks(axes)
style.save(figure, sys.argv[1] if len(sys.argv) > 1 else "flower_rounds.png")

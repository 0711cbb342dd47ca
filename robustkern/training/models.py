"""Torch models without state besides parameters, so that gradients of many workers can be taken at once."""

from __future__ import annotations

import torch
from torch import nn

from robustkern.training.settings import MODELS

__all__ = ["make_model"]


def make_model(name: str, shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """Make a model.

    Parameters
    ----------
    name : str
        "softmax" (linear), "mlp" (one hidden layer of 64), "cnn" (two 3 x 3 convolutions, a hidden layer), "paper" (the
        network of the paper's authors: two 5 x 5 convolutions of 16 and 32 channels, each with batch normalisation,
        and a linear layer; 29,034 parameters for MNIST), "paper_groupnorm" (8 groups instead), "resnet18" (with group
        normalisation). Batches are normalised by their own statistics, when tested too: no averages are kept, because
        a model that changes in passing cannot be asked for many workers' gradients at once.
    shape : (int, int, int)
        Channels, height and width of an image.
    classes : int
        How many.
    seed : int
        Of the parameters; torch's global random numbers are left as they were.

    Raises
    ------
    ValueError
        If the name is not known.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MAKERS[name](shape, classes)


def _softmax(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


def _mlp(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 64), nn.ReLU(), nn.Linear(64, classes))


def _cnn(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Two 3 x 3 convolutions, each followed by max pooling, and two linear layers."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def _paper(shape: tuple[int, int, int], classes: int, grouped: bool = False) -> nn.Module:
    """Two blocks of a 5 x 5 convolution, normalisation and max pooling, and a linear layer."""
    layers: list[nn.Module] = []
    channels, height, width = shape
    for out in (16, 32):
        norm = nn.GroupNorm(8, out) if grouped else nn.BatchNorm2d(out, track_running_stats=False)
        layers += [nn.Conv2d(channels, out, 5, padding=2), norm, nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = out, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


def _paper_groupnorm(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return _paper(shape, classes, grouped=True)


class _Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.GroupNorm(8, out),
        )
        same = stride == 1 and channels == out
        self.way: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.GroupNorm(8, out))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.way(x))


def _resnet18(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """ResNet-18 as for small images: a 3 x 3 stem, no pooling before the blocks."""
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], 64, 3, padding=1, bias=False),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
    ]
    channels = 64
    for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(_Residual(channels, out, stride))
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


_MAKERS = dict(zip(MODELS, (_softmax, _mlp, _cnn, _paper, _paper_groupnorm, _resnet18), strict=True))

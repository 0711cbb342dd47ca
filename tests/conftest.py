"""Fixtures: every backend, instruction set and dtype in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from support import FAST, IMPLEMENTATIONS, MISSING

import robustkern as rk
from robustkern.backends import registry, threads
from robustkern.contract.primitives import Kernels
from robustkern.contract.rows import DTYPES
from robustkern.rules import geometry, text

#: The same examples in every run, so that no change is refused for another one's fault; "thorough" draws new ones.
settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "thorough", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("few", settings.get_profile("default"), max_examples=5)  # where each takes long
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that processes that run tests side by side end together."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_report_header() -> list[str]:
    info = rk.info()
    return [
        f"robustkern {info['version']}: {', '.join(IMPLEMENTATIONS)}",
        f"threads: {info['threads']}, numpy {np.__version__}",
        *(f"missing backend {name}: {reason}" for name, reason in MISSING.items()),
    ]


@pytest.fixture(autouse=True)
def all_threads() -> Iterator[None]:
    """Leave no test on fewer threads because one before it, or a command that it ran here, took one."""
    yield
    rk.set_num_threads(None)
    if torch := sys.modules.get("torch"):  # which sets the threads of the OpenMP that it may share with our kernels
        torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture
def own_rules() -> Iterator[None]:
    """Forget afterwards which rules were registered."""
    before = [dict(names) for names in (text._RULES, text._PRESETS, text._ALIASES)]
    yield
    for names, old in zip((text._RULES, text._PRESETS, text._ALIASES), before, strict=True):
        names.clear()
        names.update(old)
    text.parse.cache_clear()


@pytest.fixture(params=list(IMPLEMENTATIONS))
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each implementation in turn."""
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(params=list(FAST))
def fast(request: pytest.FixtureRequest) -> Kernels:
    """Each implementation but the reference."""
    return FAST[request.param]


EMULATED = registry.Backend("cuda-emulated", "", "cpu", DTYPES, "run: make emulation")
ON_THE_HOST = [b.name for b in (*registry.BACKENDS, EMULATED) if b.device == "cpu" and b.name not in MISSING]


@pytest.fixture(params=[*ON_THE_HOST, "cpp, float32 products first"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend that runs here in turn, as what "auto" chooses; the compiled one also as it treats large inputs."""
    name, _, large = request.param.partition(", ")
    if large:
        monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    if name == EMULATED.name:
        monkeypatch.setattr(registry, "BACKENDS", (*registry.BACKENDS, EMULATED))
        monkeypatch.setitem(registry._loaded, name, IMPLEMENTATIONS[name])
    with rk.use_backend(name):
        yield name


@pytest.fixture(params=DTYPES, ids=lambda d: d.name)
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    """Each dtype of rows."""
    return request.param


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests choose backends and threads themselves."""
    for name in ("ROBUSTKERN_BACKEND", "ROBUSTKERN_ISA", "ROBUSTKERN_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for read_once in (registry._from_environment, threads.requested_threads):
        read_once.cache_clear()
    yield
    for read_once in (registry._from_environment, threads.requested_threads):
        read_once.cache_clear()
    rk.set_num_threads(None)

"""Double momentum, attacks and the simulation: against float64 references, the authors' outputs, and the theory."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

import robustkern as rk  # noqa: E402
from robustkern import training  # noqa: E402
from robustkern.training import asynchronous, attacks, data, session, simulation  # noqa: E402
from robustkern.training.settings import Settings  # noqa: E402

Array = NDArray[Any]
GOLDEN: dict[str, Array] = dict(np.load(Path(__file__).parent / "data" / "authors_outputs.npz"))
DIGITS = data.load_data("digits")


# ---- schedules -------------------------------------------------------------------------------------------------


def test_schedules_are_the_papers() -> None:
    theory = training.Schedule("theory")
    alphas = [theory.alpha_at(t) for t in range(1, 60)]
    assert alphas == list(range(1, 60))
    for t in range(1, 58):
        assert math.isclose(theory.gamma_at(t), alphas[t] / sum(alphas[: t + 1]), rel_tol=1e-15)
        assert math.isclose(theory.beta_at(t), 1 / alphas[t - 1], rel_tol=1e-15)


def test_the_practical_schedule_is_the_authors() -> None:
    practical = training.Schedule()
    steps = range(1, 251)
    assert [practical.gamma_at(t) for t in steps] == GOLDEN["ANY/sync_gammas_alpha_t"].tolist()
    assert [practical.beta_at(t) for t in steps] == GOLDEN["EST/storm_sync_beta_t/betas"].tolist()
    fixed = training.Schedule(beta=0.25, gamma=0.1)
    assert [fixed.beta_at(t) for t in (1, 2, 300)] == [1, 0.25, 0.25]
    assert [fixed.gamma_at(t) for t in (1, 2, 300)] == [0.1] * 3
    assert practical.alpha_at(7) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "fast"}, "schedule must be one of theory, practical; got 'fast'"),
        ({"beta": 0}, r"beta must be in \(0, 1\].*got 0"),
        ({"gamma": 1.5}, r"gamma must be in \(0, 1\].*got 1.5"),
        ({"gamma": math.nan}, r"gamma must be in \(0, 1\].*got nan"),
    ],
)
def test_errors_of_schedules(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.Schedule(**values)


# ---- the torch optimizers --------------------------------------------------------------------------------------


def traced_worker(worker_of: Any, pairs: Array) -> Array:
    """What a worker sends for given gradients; on two parameters, to see that they are one vector."""
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), torch.nn.Parameter(torch.zeros(3).double())]
    worker = worker_of(parameters)
    sent = []
    for gradient, before in pairs:
        calls: list[int] = []

        def closure(gradient: Array = gradient, before: Array = before, calls: list[int] = calls) -> float:
            two = len(sent) > 0 and isinstance(worker, training.Mu2Worker)
            values = torch.from_numpy(before if two and not calls else gradient)  # at the previous point first
            calls.append(1)
            parameters[0].grad, parameters[1].grad = values[:1].clone(), values[1:].clone()
            return 0.0

        worker.step(closure)
        sent.append(torch.cat([p.grad for p in parameters]).numpy().copy())
    return np.array(sent)


@pytest.mark.parametrize(("key", "beta"), [("beta_t", None), ("b0.9", 0.9), ("b0.1", 0.1)])
def test_estimates_are_the_authors(key: str, beta: float | None) -> None:
    pairs = np.stack([GOLDEN["EST/G"], GOLDEN["EST/Gtilde"]], axis=1)
    got = traced_worker(lambda p: training.Mu2Worker(p, beta=beta), pairs)
    np.testing.assert_allclose(got, GOLDEN[f"EST/storm_sync_{key}"], rtol=1e-12, atol=1e-12)
    # The fused update gives the same.
    momenta = np.full((1, 4), np.nan)
    schedule = training.Schedule(beta=beta)
    for t, (g, h) in enumerate(pairs, start=1):
        rk.kernels.update_momenta(momenta, g[None].copy(), h[None].copy(), keep=1 - schedule.beta_at(t))
        np.testing.assert_allclose(momenta[0], GOLDEN[f"EST/storm_sync_{key}"][t - 1], rtol=1e-12, atol=1e-12)


def test_momentum_is_the_authors() -> None:
    pairs = np.stack([GOLDEN["EST/G"], GOLDEN["EST/G"]], axis=1)
    got = traced_worker(lambda p: training.MomentumWorker(p, momentum=0.9), pairs)
    np.testing.assert_allclose(got, GOLDEN["EST/momentum_b0.9"], rtol=1e-12, atol=1e-12)
    assert np.array_equal(traced_worker(lambda p: training.MomentumWorker(p, momentum=0), pairs), GOLDEN["EST/G"])


@pytest.mark.parametrize(("key", "gamma"), [("alpha_t", None), ("g0.1", 0.1)])
def test_averaging_is_the_authors(key: str, gamma: float | None) -> None:
    x = torch.nn.Parameter(torch.tensor([1, -2, 0.5, 3], dtype=torch.float64))
    server = training.Mu2Server([x], lr=0.1, gamma=gamma)
    for t, gradient in enumerate(GOLDEN["EST/G"]):
        x.grad = torch.from_numpy(gradient)
        server.step()
        np.testing.assert_allclose(x.detach(), GOLDEN[f"ANY/sync_{key}/x"][t], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(server.state[x]["iterate"], GOLDEN[f"ANY/sync_{key}/w"][t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("radius", [None, 0.3])
def test_theory_against_a_float64_reference(radius: float | None) -> None:
    """alpha_t, gamma_t and the projection, written down once more in NumPy, on two parameters that are one vector."""
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(5), rng.standard_normal((80, 5))
    parts = [
        torch.nn.Parameter(torch.from_numpy(start[:2].copy())),
        torch.nn.Parameter(torch.from_numpy(start[2:].copy())),
    ]
    server = training.Mu2Server(parts, lr=0.01, schedule="theory", radius=radius)
    w, x, total = start.copy(), start.copy(), 1.0
    for t, gradient in enumerate(gradients, start=1):
        w = w - 0.01 * t * gradient
        away = np.linalg.norm(w - start)
        if radius is not None and away > radius:
            w = start + (w - start) * radius / away
        total += t + 1
        x = (1 - (t + 1) / total) * x + (t + 1) / total * w
        for p, piece in zip(parts, (gradient[:2], gradient[2:]), strict=True):
            p.grad = torch.from_numpy(piece.copy())
        server.step()
        np.testing.assert_allclose(np.concatenate([p.detach() for p in parts]), x, rtol=1e-11, atol=1e-12)
    assert (radius is not None) == (np.linalg.norm(w - start) <= 0.3 + 1e-12)


def small_problem(seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    return model, torch.randn(60, 16, 4)


@pytest.mark.parametrize("schedule", ["practical", "theory"])
def test_state_dicts_resume_bit_for_bit(schedule: str, tmp_path: Path) -> None:
    def optimizers(model: Any) -> tuple[Any, Any]:
        lr = 0.1 if schedule == "practical" else 0.002
        worker = training.Mu2Worker(model.parameters(), schedule=schedule, clip=1.0)
        return worker, training.Mu2Server(model.parameters(), lr=lr, schedule=schedule, radius=2.0)

    def train(model: Any, worker: Any, server: Any, batches: Any) -> None:
        for batch in batches:

            def closure(batch: Any = batch) -> Any:
                worker.zero_grad()
                loss = (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
                loss.backward()
                return loss

            worker.step(closure)
            server.step()

    model, batches = small_problem()
    pair = optimizers(model)
    train(model, *pair, batches[:30])
    torch.save([model.state_dict(), *(o.state_dict() for o in pair), torch.get_rng_state()], tmp_path / "state.pt")
    train(model, *pair, batches[30:])
    again, _ = small_problem(1)
    resumed = optimizers(again)
    saved = torch.load(tmp_path / "state.pt")
    for what, state in zip((again, *resumed), saved, strict=False):
        what.load_state_dict(state)
    torch.set_rng_state(saved[-1])
    train(again, *resumed, batches[30:])
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_both_gradients_see_the_same_dropout() -> None:
    """At equal points the correction is then exact: the estimate is the mean of nothing but the new gradient's past."""
    model, batches = small_problem()
    worker = training.Mu2Worker(model.parameters(), beta=0.5)
    seen = []

    def closure() -> Any:
        worker.zero_grad()
        loss = model(batches[0]).square().mean()
        loss.backward()
        seen.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        return loss

    worker.step(closure)
    assert len(seen) == 1
    worker.step(closure)  # nobody moved the parameters
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_the_worker_leaves_parameters_where_they_are() -> None:
    model, batches = small_problem()
    before = [p.detach().clone() for p in model.parameters()]
    worker = training.Mu2Worker(model.parameters())
    for _ in range(3):
        worker.step(lambda: model(batches[0]).sum().backward())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def fails() -> None:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        worker.step(fails)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parameters_without_gradients() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    worker, server = training.Mu2Worker([used, unused]), training.Mu2Server([used, unused], lr=0.1)

    def closure() -> Any:
        worker.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        assert worker.step(closure).item() > 0
        server.step()
    assert torch.equal(unused, torch.ones(3))
    assert (used < 1).all()
    assert server.step(lambda: 5) == 5
    plain = training.MomentumWorker([used])
    assert plain.step(closure).item() > 0


def test_groups_of_parameters() -> None:
    fast, slow = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    server = training.Mu2Server([{"params": [fast]}, {"params": [slow], "lr": 0.1}], lr=1.0)
    fast.grad = slow.grad = torch.ones(1)
    server.step()
    assert (fast.item(), slow.item()) == (-1.0, pytest.approx(-0.1))
    with pytest.raises(ValueError, match="Mu2Server: parameters must be added before the first step; 1 are done"):
        server.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert len(server.param_groups) == 2  # what is refused changes nothing
    given = [{"params": [fast]}]
    pair = (
        training.MomentumWorker(given),
        training.Mu2Server(given, lr=1.0),
    )  # of which neither counts the other's steps
    pair[0].step()
    assert [each.param_groups[0]["steps"] for each in pair] == [1, 0]
    worker = training.MomentumWorker([{"params": [fast]}, {"params": [slow]}])
    worker.param_groups[1]["momentum"] = 0.0
    with pytest.raises(ValueError, match=r"momentum must be the same for all groups .*; got 0\.9 and 0\.0"):
        worker.step()


def test_a_nan_of_which_nothing_is_kept_is_gone() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    for worker in (training.MomentumWorker([p], momentum=0), training.Mu2Worker([p], beta=1)):
        for value in (1.0, math.nan, math.inf, 2.0):

            def closure(value: float = value) -> None:
                p.grad = torch.full_like(p, value)

            worker.step(closure)
        assert p.grad.tolist() == [2.0, 2.0]


def test_the_ball_is_of_all_parameters() -> None:
    """Also of those without a gradient in this step; and what leads far out of it ends at its border, not in NaN."""
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    server = training.Mu2Server([first, second], lr=1.0, radius=1.0, gamma=1.0)
    for p, other in ((first, second), (second, first)):
        p.grad, other.grad = torch.tensor([-5.0]), None
        server.step()
    np.testing.assert_allclose((first.item(), second.item()), np.array([1, 5]) / math.sqrt(26), rtol=1e-6)
    far = torch.nn.Parameter(torch.zeros(2))
    server = training.Mu2Server([far], lr=1e38, radius=1.0)
    far.grad = torch.tensor([100.0, 1.0])
    server.step()
    np.testing.assert_allclose(far.detach(), np.array([-100, -1]) / math.sqrt(10001), rtol=1e-6)


@pytest.mark.parametrize("make", [training.MomentumWorker, training.Mu2Worker, lambda p: training.Mu2Server(p, lr=0.1)])
def test_gradients_must_be_dense(make: Any) -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = make(table.parameters())
    with pytest.raises(TypeError, match=r"expected dense gradients; got torch.sparse_coo .* \(5, 2\) \(.*to_dense\(\)"):
        optimizer.step(lambda: table(torch.tensor([1])).sum().backward())
    assert optimizer.param_groups[0]["steps"] == 0
    assert not optimizer.state
    table.weight.grad = table.weight.grad.to_dense()
    optimizer.step(lambda: None)


def test_the_state_of_another_optimizer() -> None:
    p = [torch.nn.Parameter(torch.zeros(1))]
    state = training.MomentumWorker(p).state_dict()
    with pytest.raises(ValueError, match="expected the state_dict of a Mu2Worker; got one without schedule, beta"):
        training.Mu2Worker(p).load_state_dict(state)


def test_clipping_is_of_the_whole_gradient() -> None:
    parts = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    worker = training.MomentumWorker(parts, clip=1.0)
    for values, want in (((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.9 * 0.6 + 0.1 * 0.3, 0.9 * 0.8 + 0.1 * 0.4))):
        for p, value in zip(parts, values, strict=True):
            p.grad = torch.tensor([value])
        worker.step()
        np.testing.assert_allclose([float(p.grad) for p in parts], want, rtol=1e-6)
    for p, value in zip(parts, (3e30, 4e30), strict=True):  # whose squares float32 does not hold
        p.grad = torch.tensor([value])
    alone = training.MomentumWorker(parts, clip=1.0)
    alone.step()
    np.testing.assert_allclose([float(p.grad) for p in parts], (0.6, 0.8), rtol=1e-6)
    for dtype, values in ((torch.float64, [3e300, -4e300, 0]), (torch.complex64, [3, -4, 0])):
        wide = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        wide.grad = torch.tensor(values, dtype=dtype)
        training.MomentumWorker([wide], clip=1.0).step()
        np.testing.assert_allclose(wide.grad, (0.6, -0.8, 0), rtol=1e-6)
    parts[0].grad = torch.tensor([math.nan])
    worker.step()
    assert math.isnan(float(parts[1].grad))  # a norm that is not known cannot be kept to


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: training.Mu2Worker(p, clip=0), "Mu2Worker: clip must be a finite number above 0; got 0"),
        (lambda p: training.Mu2Worker(p, schedule="x"), "schedule must be one of"),
        (lambda p: training.Mu2Worker(p).step(), "step needs a closure"),
        (lambda p: training.MomentumWorker(p, momentum=1), r"momentum must be in \[0, 1\); got 1"),
        (lambda p: training.Mu2Server(p, lr=-1), "Mu2Server: lr must be a finite number above 0; got -1"),
        (lambda p: training.Mu2Server(p, lr=math.inf), "lr must be a finite number above 0; got inf"),
        (lambda p: training.Mu2Server(p, lr=1, radius=0), "radius must be a finite number above 0; got 0"),
        (lambda p: training.Mu2Server(p, lr=1, gamma=2), "gamma must be in"),
        (lambda p: training.Mu2Server(p, lr=None), "lr must be a finite number above 0; got None"),
        (
            lambda p: training.Mu2Worker(
                [{"params": p}, {"params": [torch.nn.Parameter(torch.zeros(1))], "clip": 1.0}]
            ),
            "Mu2Worker: clip must be the same for all groups of parameters; got None and 1.0",
        ),
        (lambda p: training.Mu2Worker([{"params": p, "clip": -1.0}]), "Mu2Worker: clip must be .* got -1.0"),
        (lambda p: training.Mu2Worker([{"params": p, "beta": 2}]), "beta must be in"),
        (lambda p: training.MomentumWorker([{"params": p, "momentum": 5}]), r"momentum must be in \[0, 1\); got 5"),
        (lambda p: training.Mu2Server([{"params": p, "lr": math.nan}], lr=1), "lr must be .* got nan"),
        (lambda p: training.Mu2Server([{"params": p, "schedule": "x"}], lr=1), "schedule must be one of"),
        (lambda p: training.Mu2Server([{"params": p, "radius": -3}], lr=1), "radius must be .* got -3"),
        (lambda p: training.Mu2Server([{"params": p, "steps": 9}], lr=1), "steps are counted, not set; got .* 9"),
    ],
)
def test_errors_of_optimizers(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 2e38), (torch.float16, 4e4), (torch.float64, 1e308)])
def test_a_learning_rate_that_its_schedule_makes_too_large(dtype: torch.dtype, lr: float) -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    server = training.Mu2Server([p], lr=lr, schedule="theory")
    p.grad = torch.zeros(2, dtype=dtype)
    server.step()
    before = server.state_dict()["state"][0]["iterate"].clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"Mu2Server: the learning rate of step 2 is .*more than {dtype} holds"):
            server.step()
    assert server.param_groups[0]["steps"] == 1
    assert torch.equal(server.state_dict()["state"][0]["iterate"], before)
    server.param_groups[0]["lr"] = lr / 4
    server.step()


def test_examples_in_docstrings() -> None:
    import doctest

    from robustkern.training import optimizers

    result = doctest.testmod(optimizers)
    assert result.attempted > 0
    assert result.failed == 0


# ---- theory ----------------------------------------------------------------------------------------------------


def noisy_quadratic(steps: int, *, correct: bool, seeds: int = 40, d: int = 10) -> tuple[float, float]:
    """Mean squared error of the estimate d_T and mean excess loss of x_T on f(x) = |x|^2 / 2 with noise.

    The gradient of a sample (A, b) is ``A x + b``, where A has mean 1 and b mean 0, so that the noise at two near points is
    nearly the same: what the correction lives on. One worker, theory's schedule, all seeds at once.
    """
    rng = np.random.default_rng(5)
    schedule, lr = training.Schedule("theory"), 1 / (4 * 2 * steps)
    x = np.ones((seeds, d))
    w, previous, momenta = x.copy(), x.copy(), np.zeros((seeds, d))
    for t in range(1, steps + 1):
        a, b = 1 + 0.5 * rng.standard_normal((seeds, d)), rng.standard_normal((seeds, d))
        rk.kernels.update_momenta(
            momenta, a * x + b, a * previous + b if correct else None, keep=1 - schedule.beta_at(t)
        )
        if not correct:
            momenta /= 2 - schedule.beta_at(t) if t > 1 else 1
        error = ((momenta - x) ** 2).sum(axis=1).mean()
        previous = x.copy()
        w = w - lr * schedule.alpha_at(t) * momenta
        x = (1 - schedule.gamma_at(t)) * x + schedule.gamma_at(t) * w
    return float(error), float((x**2).sum(axis=1).mean() / 2)


def test_the_estimate_gets_better_as_the_theory_says() -> None:
    """E|d_t - grad f(x_t)|^2 = O(1/t); four times the steps: a quarter of the error. Without correction it stays."""
    errors = [noisy_quadratic(steps, correct=True)[0] for steps in (50, 200, 800)]
    assert errors[0] / errors[1] > 2.5
    assert errors[1] / errors[2] > 2.5
    assert errors[2] < 10 * 1.25 / 800 * 5  # of the order of the variance of a mean of t samples
    losses = [noisy_quadratic(steps, correct=True)[1] for steps in (50, 200, 800)]
    assert losses[0] > losses[1] > losses[2]
    # d_t = g_t + (1 - beta_t) d_{t-1}, brought to the scale of a gradient: what is left when the correction is dropped.
    without = [noisy_quadratic(steps, correct=False)[0] for steps in (50, 800)]
    assert without[1] > 20 * errors[2]
    assert without[0] / without[1] < 2.5


@pytest.mark.parametrize("schedule", ["practical", "theory"])
def test_the_optimizers_converge_on_the_quadratic(schedule: str) -> None:
    """The same through the torch pair, where a dropped correction would show too."""
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))
    lr = 0.1 if schedule == "practical" else 1 / (4 * 2 * 400)
    worker, server = training.Mu2Worker([x], schedule=schedule), training.Mu2Server([x], lr=lr, schedule=schedule)
    errors = []
    for _ in range(400):
        a, b = 1 + 0.5 * torch.randn(10).double(), torch.randn(10).double()

        def closure(a: Any = a, b: Any = b) -> None:
            x.grad = a * x.detach() + b

        worker.step(closure)
        errors.append(float((x.grad - x.detach()).square().sum()))
        server.step()
    assert np.mean(errors[300:]) < np.mean(errors[:10]) / 10  # a single sample's noise stays at 10
    assert float(x.detach().square().sum()) < 1.5


# ---- attacks ---------------------------------------------------------------------------------------------------


def situation(n: int, f: int, workers: tuple[int, ...] = (0,), aggregate: Any = None) -> attacks.Situation:
    return attacks.Situation(n, f, f, workers, (1, 2), aggregate or (lambda rows: np.mean(rows, axis=0)))


HONEST = GOLDEN["ATK/honest"]
OWN = np.arange(40.0).reshape(2, 20)


def test_attacks_are_the_authors() -> None:
    for epsilon in (0.1, 0.5, 2):
        got = attacks.parse_attack(f"ipm(epsilon={epsilon})").send(OWN, HONEST, situation(17, 8, (9, 10)))
        np.testing.assert_allclose(got, np.repeat(GOLDEN[f"ATK/ipm_eps{epsilon:g}"][None], 2, axis=0), rtol=1e-13)
    got = attacks.parse_attack("alie").send(OWN, HONEST, situation(17, 8))
    np.testing.assert_allclose(got, GOLDEN["ATK/alie_17_8"][None], rtol=1e-12)


def test_alie_z() -> None:
    for m, b, z in GOLDEN["ATK/alie_zmax_table_m_b_z"]:
        if b >= 1:
            assert math.isclose(training.alie_z(int(m), int(b)), z, rel_tol=1e-12, abs_tol=1e-12)
    assert round(training.alie_z(17, 8), 4) == 1.2206
    assert round(training.alie_z(17, 4), 4) == 0.2934
    for n, f in ((17, 0), (16, 8)):
        with pytest.raises(ValueError, match=f"f must be at least 1 and 2\\*f below n; got f={f} with n={n}"):
            training.alie_z(n, f)


def test_formulas() -> None:
    here = situation(12, 3, (9, 11))
    mean = HONEST.mean(axis=0)
    parse = training.parse_attack
    assert np.array_equal(parse("none").send(OWN, HONEST, here), OWN)
    assert np.array_equal(parse("label_flip").send(OWN, HONEST, here), OWN)
    assert np.array_equal(parse("sign_flip").send(OWN, HONEST, here), -OWN)
    assert np.array_equal(parse("sign_flip(scale=3)").send(OWN, HONEST, here), -3 * OWN)
    assert np.array_equal(parse("mimic").send(OWN, HONEST, here), HONEST[[0, 0]])
    assert np.array_equal(parse("mimic(worker=99)").send(OWN, HONEST, here), HONEST[[8, 8]])
    np.testing.assert_allclose(parse("alie(z=2)").send(OWN, HONEST, here)[1], mean - 2 * HONEST.std(axis=0, ddof=1))
    assert np.isnan(parse("nan").send(OWN, HONEST, here)).all()
    assert np.isposinf(parse("inf").send(OWN, HONEST, here)).all()
    bomb = parse("bomb(value='-inf', share=0.1)").send(OWN, HONEST, here)
    assert np.isneginf(bomb[:, :2]).all()
    np.testing.assert_allclose(bomb[:, 2:], np.repeat(mean[None, 2:], 2, axis=0))
    noise = parse("gaussian(sigma=4)").send(OWN, np.zeros((9, 50_000), dtype=np.float32), here)
    assert noise.shape == (2, 50_000)
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise.std(axis=1), 4, rtol=0.02)
    assert abs(np.corrcoef(noise)[0, 1]) < 0.02
    alone = parse("gaussian(sigma=4)").send(OWN[:1], HONEST, situation(12, 3, (11,)))
    both = parse("gaussian(sigma=4)").send(OWN, HONEST, here)
    assert np.array_equal(alone[0], both[1])  # each worker its own, wherever it runs


@pytest.mark.parametrize("rule", ["mean", "median", "ctma(geometric_median)"])
@pytest.mark.parametrize("direction", ["alie", "ipm", "both"])
def test_the_optimised_attack_is_worse_than_any_fixed_strength(rule: str, direction: str) -> None:
    f = 4

    def aggregate(rows: Array) -> Array:
        assert len(rows) == len(HONEST) + f
        return rk.aggregate(rows, rule, f=f)

    def harm(sent: Array) -> float:
        return float(np.linalg.norm(aggregate(np.concatenate([HONEST, np.repeat(sent[:1], f, axis=0)])) - mean))

    here, mean = situation(13, f, (9, 10, 11, 12), aggregate), HONEST.mean(axis=0)
    sent = training.parse_attack(f"optimised(direction={direction!r})").send(OWN, HONEST, here)
    assert sent.shape == (4, 20)
    fixed = {
        "alie": [f"alie(z={z})" for z in (0.25, 0.5, 1.0, 1.22, 2.0, 4.0, 16.0)],
        "ipm": [f"ipm(epsilon={2.0**k - 1})" for k in range(-2, 6)],
    }
    for text in [t for kind, texts in fixed.items() if direction in (kind, "both") for t in texts]:
        other = training.parse_attack(text).send(OWN, HONEST, here)
        assert harm(sent) >= 0.9 * harm(other)


@pytest.mark.parametrize("name", training.available_attacks())
def test_attacks_keep_shape_and_dtype_and_write_nothing(name: str) -> None:
    own, honest = OWN.astype(np.float32), HONEST.astype(np.float32)
    before = own.copy(), honest.copy()
    sent = training.parse_attack(name).send(own, honest, situation(11, 2, (9, 10)))
    assert sent.shape == own.shape
    assert sent.dtype == np.float32
    assert np.array_equal(own, before[0])
    assert np.array_equal(honest, before[1])
    one = training.parse_attack(name).send(own[:1], honest[:1], situation(3, 1, (2,)))  # a single honest worker
    assert one.shape == (1, 20)


@pytest.mark.parametrize("text", ["alie", "alie(z=2.5)", "ipm(epsilon=0.1)", "bomb(value='inf', share=0.5)", "none"])
def test_text_of_attacks(text: str) -> None:
    attack = training.parse_attack(f" {text} ")
    assert str(attack) == text
    assert training.parse_attack(str(attack)) == attack


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alei", "'alei' is not known; did you mean 'alie'.*known: alie, bomb"),
        ("", "not in Python call syntax"),
        ("ipm(", "not in Python call syntax"),
        ("ipm | alie", "neither a name nor a call"),
        ("ipm(__import__('os'))", "not in Python call syntax"),
        ("ipm(strength=1)", r"ipm: .*unexpected keyword argument 'strength' \(its parameters: epsilon\)"),
        ("label_flip(1)", "label_flip: .*its parameters: none"),
        ("nan(1)", "'nan' is not known"),
        ("ipm(epsilon=1, epsilon=2)", "a parameter is there twice"),
        ("ipm(epsilon='a')", "ipm: epsilon must be a finite number; got 'a'"),
        ("sign_flip(scale=1e999)", "sign_flip: scale must be a finite number; got inf"),
        ("ipm(epsilon=1" + "0" * 400 + ")", "ipm: epsilon must be a finite number; got 1000"),
        ("alie(z=True)", "alie: z must be a finite number; got True"),
        ("gaussian(sigma=-1)", "sigma must be a finite number of at least 0; got -1"),
        ("mimic(worker=-1)", "worker must be an integer of at least 0; got -1"),
        ("bomb(value='x')", "value must be 'nan', 'inf' or '-inf'; got 'x'"),
        ("bomb(share=0)", r"share must be in \(0, 1\]; got 0"),
        ("optimised(direction='up')", "direction must be 'alie', 'ipm' or 'both'; got 'up'"),
        ("optimised(steps=1.5)", "steps must be an integer of at least 0; got 1.5"),
        ("(" * 300 + "ipm" + ")" * 300, "not in Python call syntax"),
    ],
)
def test_texts_that_are_no_attack(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.parse_attack(text)


# ---- the simulation --------------------------------------------------------------------------------------------


BASES = {"avg": "mean", "cwmed": "median(even='low')", "cwtm": "trimmed_mean", "rfa": "rfa"}
FORMS = {"None": "{}", "ctma": "ctma({})", "nnm": "nnm | {}", "nnm+ctma": "ctma(nnm | {})"}
ATTACKS = {"None": "none", "lf": "label_flip", "sf": "sign_flip", "empire": "ipm", "little": "alie"}


class AuthorsTask(simulation.Task):
    """The authors' data, order of samples and start, in place of ours."""

    def start(self) -> Any:
        return torch.from_numpy(np.concatenate([GOLDEN["E2E/W0"].ravel(), GOLDEN["E2E/b0"]])).float()

    def samples(self, t: int) -> NDArray[np.intp]:
        # Their workers draw a new sample after they have used the last one at the new point: mu^2-SGD sees the first twice.
        batch = max(t - 1, 1) if self.settings.optimizer == "mu2sgd" else t
        return ((batch - 1) * 12 + np.arange(12).reshape(6, 2)) % 120


@pytest.mark.parametrize("key", sorted(k for k in GOLDEN if k.startswith("E2E/sync")))
def test_whole_runs_are_the_authors(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimators, attacks, rules, averaging and clipping together; they train in float64, and clip to 2 / (norm + 1e-6)."""
    _, _, optimizer, attack, rule, size = key.split("/")
    form, _, base = rule.rpartition("+")
    fixed = "fixed" in optimizer
    f = int(size[-1])
    settings = Settings(
        workers=6,
        byzantine=f,
        attack=ATTACKS[attack],
        rule=FORMS[form].format(BASES[base]),
        optimizer="mu2sgd" if fixed else optimizer,
        beta=0.25 if fixed else None,
        gamma=0.1 if fixed else None,
        batch=2,
        rounds=20,
    )
    images = GOLDEN["E2E/X"].astype(np.float32)[:, None, None]
    labels = GOLDEN["E2E/Y"].astype(np.int64)
    monkeypatch.setattr(simulation, "Task", AuthorsTask)
    monkeypatch.setattr(
        simulation, "make_model", lambda *_: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 10))
    )
    run = simulation.Simulation(settings, data.DataSet("theirs", images, labels, images, labels))
    for want in GOLDEN[key][1:]:
        run.round()
        np.testing.assert_allclose(run.server.x.detach(), want, rtol=1e-4, atol=3e-6)


def settings_of(**changes: Any) -> Settings:
    return dataclasses.replace(Settings(model="softmax", workers=7, byzantine=2, rounds=40), **changes)


def trained_on(run: simulation.Simulation, rounds: int) -> None:
    for _ in range(rounds):
        run.round()


def trained(settings: Settings) -> simulation.Simulation:
    run = simulation.Simulation(settings, DIGITS)
    trained_on(run, settings.rounds)
    return run


@pytest.mark.parametrize("optimizer", ["mu2sgd", "momentum", "sgd"])
@pytest.mark.parametrize("attack", [name for name in training.available_attacks() if name != "optimised"])
def test_training_survives(optimizer: str, attack: str) -> None:
    run = trained(settings_of(optimizer=optimizer, attack=attack, rounds=80, rule="ctma(geometric_median)"))
    assert run.evaluate()[0] > 0.75


def test_the_mean_does_not() -> None:
    for attack in ("nan", "gaussian", "sign_flip(scale=10)", "optimised"):
        assert trained(settings_of(attack=attack, rule="mean")).evaluate()[0] < 0.6


@pytest.mark.parametrize("model", ["mlp", "cnn", "paper", "paper_groupnorm"])
def test_gradients_are_those_of_one_worker_at_a_time(model: str) -> None:
    task = simulation.Task(settings_of(model=model), DIGITS)
    x, samples = task.start(), task.samples(3)
    flipped = np.array([False] * 5 + [True] * 2)
    got = task.gradients(x, samples, flipped)
    module = training.make_model(model, (1, 8, 8), 10, 0)
    for i in range(7):
        module.zero_grad()
        labels = torch.from_numpy(DIGITS.labels[samples[i]])
        labels = 9 - labels if flipped[i] else labels
        torch.nn.functional.cross_entropy(module(torch.from_numpy(DIGITS.images[samples[i]])), labels).backward()
        want = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-6)
        alone = task.gradients(x, samples[i : i + 1], flipped[i : i + 1])
        assert alone.shape == (1, task.d)
        np.testing.assert_allclose(alone[0], want, rtol=1e-4, atol=1e-6)
    assert task.d == got.shape[1] == sum(p.numel() for p in module.parameters())


def test_resnet18_takes_gradients_too() -> None:
    few = data.DataSet("few", DIGITS.images[:40], DIGITS.labels[:40], DIGITS.images[:40], DIGITS.labels[:40])
    run = simulation.Simulation(settings_of(model="resnet18", workers=3, byzantine=1, batch=1, rounds=1), few)
    run.round()
    assert run.task.d > 11_000_000
    assert np.isfinite(run.evaluate()[1])


def test_the_same_settings_give_the_same_bits() -> None:
    for attack in ("alie", "gaussian", "label_flip"):
        runs = [
            trained(settings_of(attack=attack, rule="bucketing | median", split="dirichlet(0.3)")) for _ in range(2)
        ]
        assert torch.equal(runs[0].server.x, runs[1].server.x)
        other = trained(settings_of(attack=attack, rule="bucketing | median", split="dirichlet(0.3)", seed=1))
        assert not torch.equal(runs[0].server.x, other.server.x)


def test_buckets_are_fresh_each_round() -> None:
    seen = []
    run = simulation.Simulation(settings_of(rule="bucketing(size=2) | mean"), DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "aggregate", lambda rows, rule, f, seed: seen.append(seed) or rows[0])
        run.round()
        run.round()
    assert len(set(seen)) == 2


def test_no_vector_is_copied_on_its_way_to_the_rule() -> None:
    seen: list[Any] = []
    run = simulation.Simulation(settings_of(attack="ipm", failures=((3, 1, "crash"),)), DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "aggregate", lambda rows, rule, f, seed: seen.extend(rows) or rows[0])
        run.round()
    momenta = run.workers.momenta
    assert len(seen) == 6
    assert [row.ctypes.data for row in seen[:4]] == [row.ctypes.data for row in momenta]
    assert seen[4].ctypes.data == seen[5].ctypes.data  # all attackers send one vector


def test_unequal_workers_draw_from_their_own_shares() -> None:
    task = simulation.Task(settings_of(split="dirichlet(0.1)"), DIGITS)
    for t in (1, 2):
        for shard, drawn in zip(task.shards, task.samples(t), strict=True):
            assert np.isin(drawn, shard).all()
    assert not np.array_equal(task.samples(1), task.samples(2))


def test_draws_are_fresh_for_every_worker_and_round() -> None:
    task = simulation.Task(settings_of(batch=50), DIGITS)
    drawn = [task.samples(t) for t in (1, 2)]
    every = np.concatenate(drawn).ravel()
    # 700 draws with replacement from 1400 samples: some 551 are different, 19 in expectation in any two of 50.
    assert 510 < len(np.unique(every)) < 590
    assert len({row.tobytes() for part in drawn for row in part}) == 14
    assert np.array_equal(task.samples(1), drawn[0])
    assert every.min() < 50
    assert every.max() > 1350


def test_the_papers_model_is_theirs() -> None:
    model = training.make_model("paper", (1, 28, 28), 10, 0)
    assert sum(p.numel() for p in model.parameters()) == 29_034
    assert not list(model.buffers())
    grouped = training.make_model("paper_groupnorm", (1, 28, 28), 10, 0)
    assert sum(p.numel() for p in grouped.parameters()) == 29_034
    both = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(grouped(both)[:1], grouped(both[:1]))  # each sample by itself
    assert not torch.allclose(model(both)[:1], model(both[:1]))  # and here with its batch


def test_lost_workers_count_as_faulty() -> None:
    run = simulation.Simulation(settings_of(failures=((1, 3, "crash"), (6, 5, "stall"), (2, 9, "crash"))), DIGITS)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            simulation, "aggregate", lambda rows, rule, f, seed: sizes.append((len(rows), f)) or rk.median(rows)
        )
        with pytest.raises(training.TooManyLost, match="3 workers are lost, more than the f=2 that are tolerated"):
            trained_on(run, 10)
    assert sizes == [(7, 2)] * 2 + [(6, 1)] * 2 + [(5, 0)] * 4
    assert run.server.lost[1] == "crash in round 3"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "svhn"}, "data must be one of digits, mnist5k, mnist, cifar10; got 'svhn'"),
        ({"model": "vgg"}, "model must be one of softmax, mlp, cnn, paper, paper_groupnorm, resnet18; got 'vgg'"),
        ({"arrivals": "id", "rule": "krum"}, "weights must be 'equal' with arrivals='id': krum takes none"),
        ({"rule": "centred_clipping(tau=1.0)"}, "measures from a centre, and training gives none"),
        ({"arrivals": "x"}, r"arrivals must be one of together, id, id\^2; got 'x'"),
        ({"weights": "x"}, "weights must be one of updates, equal; got 'x'"),
        ({"byzantine_share": 0.5}, r"byzantine_share must be None or in \[0, 0.5\); got 0.5"),
        ({"byzantine_share": "x"}, r"byzantine_share must be None or in \[0, 0.5\); got 'x'"),
        (
            {"arrivals": "id", "failures": ((1, 1, "crash"),)},
            "failures must be none with arrivals='id'; got",
        ),
        ({"optimizer": "adam"}, "optimizer must be one of mu2sgd, momentum, sgd; got 'adam'"),
        ({"workers": 0}, "workers must be an integer of at least 1; got 0"),
        ({"batch": 1.5}, "batch must be an integer of at least 1; got 1.5"),
        ({"rounds": True}, "rounds must be an integer of at least 1; got True"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63; got 9223372036854775808"),
        ({"lr": 10**400}, "lr must be a finite number above 0; got 1000"),
        ({"byzantine": 4}, r"2\*byzantine must be below workers; got byzantine=4 with workers=7"),
        ({"f": 4}, r"f must satisfy 0 <= 2\*f < workers; got f=4 with workers=7"),
        ({"lr": 0}, "lr must be a finite number above 0; got 0"),
        ({"lr": 1e300}, r"lr must give learning rates that float32 holds; got 1e\+300, in round 40 1e\+300 \(lower it"),
        ({"lr": 1e39, "optimizer": "sgd"}, "lr must give learning rates that float32 holds"),
        ({"lr": 1e37, "schedule": "theory"}, r"got 1e\+37, in round 40 4e\+38"),
        ({"clip": -1}, "clip must be a finite number of at least 0; got -1"),
        ({"radius": math.nan}, "radius must be a finite number above 0; got nan"),
        ({"split": "dirichlet(0)"}, r"split must be iid, shards or dirichlet\(A\) .*got 'dirichlet\(0\)'"),
        ({"momentum": 1}, r"momentum must be in \[0, 1\); got 1"),
        ({"beta": 2}, "beta must be in"),
        ({"attack": "x"}, "attack: 'x' is not known"),
        ({"rule": "x"}, "rule: 'x' is not known"),
        ({"failures": ((0, 1, "crash"),)}, r"failures must be .*worker 0 lives with the server.*got \(0, 1, 'crash'\)"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(**values)


# ---- one worker at a time --------------------------------------------------------------------------------------


def turns_of(**changes: Any) -> Settings:
    changed = {"arrivals": "id^2", "byzantine_share": 0.3, "clip": 0.0, "beta": 0.25, "gamma": 0.1} | changes
    return settings_of(**changed)


def test_a_server_of_turns_goes_on_to_the_last_bit() -> None:
    """With so many workers that it keeps inner products; their last bits are in the weights, where results round them."""
    settings = turns_of(workers=70, byzantine=20, rule="geometric_median", weights="equal")
    run = asynchronous.AsynchronousSimulation(settings, DIGITS)
    for _ in range(6):
        run.round()
    again = asynchronous.AsynchronousSimulation(settings, DIGITS)
    again.restore({name: np.array(x) for name, x in run.state().items()}, run.t, {})
    for _ in range(2):
        run.round()
        again.round()
        mine, other = (x.received.aggregate(return_info=True)[1].weights for x in (run, again))
        assert np.array_equal(mine, other)


@pytest.mark.parametrize(("arrivals", "power"), [("id", 1), ("id^2", 2)])
def test_who_takes_the_turns(arrivals: str, power: int) -> None:
    run = asynchronous.AsynchronousSimulation(turns_of(arrivals=arrivals), DIGITS)
    turns = np.array([run.turn(t) for t in range(1, 5001)])
    attackers = turns >= 5
    assert attackers.sum() == 1500  # lambda, exactly, and at any time
    assert (abs(np.cumsum(attackers) - 0.3 * np.arange(1, 5001)) <= 1).all()
    for first, last in ((0, 5), (5, 7)):
        law = np.arange(1, last - first + 1.0) ** power
        some = turns[(turns >= first) & (turns < last)] - first
        np.testing.assert_allclose(np.bincount(some) / len(some), law / law.sum(), atol=0.03)


@pytest.mark.parametrize("optimizer", ["mu2sgd", "momentum", "sgd"])
def test_turns_against_a_plain_reference(optimizer: str) -> None:
    """The algorithm with dicts and loops: last query points per worker, weights that count, one step a turn."""
    settings = turns_of(optimizer=optimizer, attack="sign_flip", rule="ctma(median)", lr=0.05, batch=3)
    run = asynchronous.AsynchronousSimulation(settings, DIGITS)
    task, n = simulation.Task(settings, DIGITS), 7

    def gradient(x: Any, worker: int, t: int) -> Array:
        return task.gradients(x, task.samples(t)[worker : worker + 1], np.array([False]))[0].astype(np.float64)

    x = w = task.start()
    at, before, counts = {i: x for i in range(n)}, {i: x for i in range(n)}, np.ones(n)
    own = {i: gradient(x, i, 1) for i in range(n)}
    for t in range(1, 41):
        i = run.turn(t)
        counts[i] += 1
        g = gradient(at[i], i, t)
        if optimizer == "mu2sgd":
            own[i] = g + 0.75 * (own[i] - gradient(before[i], i, t))
        else:
            keep = 0.9 if optimizer == "momentum" else 0.0
            own[i] = keep * own[i] + (1 - keep) * g
        rows = np.array([own[k] if k < 5 else -own[k] for k in range(n)]).astype(np.float32)
        delta = (2 + math.floor(0.3 * t + 1e-9)) / counts.sum()
        d = torch.from_numpy(rk.aggregate(rows, "ctma(median)", delta=delta, weights=counts))
        w = w - 0.05 * d
        x = 0.9 * x + 0.1 * w if optimizer == "mu2sgd" else w
        before[i], at[i] = at[i], x
        run.round()
        assert np.array_equal(run.counts, counts)
        np.testing.assert_allclose(run.server.x.detach(), x, rtol=1e-3, atol=2e-6)


def test_weighted_attacks_are_the_authors() -> None:
    """Nine honest workers and five attackers, weighed by their numbers of updates."""
    honest, weights = GOLDEN["ATK/honest"], GOLDEN["ATK/async_weights"].astype(np.int64)
    here = dataclasses.replace(situation(14, 5), weights=weights)
    got = attacks.parse_attack("ipm(epsilon=0.1)").send(OWN, honest, here)
    np.testing.assert_allclose(got[0], GOLDEN["ATK/async_ipm_eps0.1"], rtol=1e-6)
    got = attacks.parse_attack("alie").send(OWN, honest, here)
    np.testing.assert_allclose(got[0], GOLDEN["ATK/async_alie"], rtol=1e-5)
    for name in training.available_attacks():
        assert attacks.parse_attack(name).send(OWN[:1], honest, here).shape == (1, 20)


@pytest.mark.parametrize("attack", ["label_flip", "ipm(epsilon=0.1)", "alie", "optimised", "nan"])
def test_training_in_turns_survives(attack: str) -> None:
    run = asynchronous.simulate(turns_of(attack=attack, lr=0.1, rounds=400, batch=8), DIGITS)
    trained_on(run, 400)
    assert run.evaluate()[0] > 0.8


def test_weights_are_what_helps() -> None:
    """Attackers that are nearly half of the workers, and take a fifth of the turns."""
    found = {}
    for weights in ("updates", "equal"):
        settings = turns_of(workers=17, byzantine=8, byzantine_share=0.2, attack="sign_flip", rule="median",
                            weights=weights, lr=0.05, rounds=400, batch=8)  # fmt: skip
        run = asynchronous.simulate(settings, DIGITS)
        trained_on(run, 400)
        found[weights] = run.evaluate()[0]
    assert found["updates"] > found["equal"] + 0.2


@pytest.mark.parametrize("optimizer", ["mu2sgd", "momentum"])
@pytest.mark.parametrize("stop_after", [3, 8, 22])
def test_resuming_turns_gives_the_same_run(tmp_path: Path, optimizer: str, stop_after: int) -> None:
    settings = turns_of(optimizer=optimizer, attack="sign_flip")
    whole = run_in(tmp_path / "whole", settings)
    assert run_in(tmp_path / "cut", settings, stop_after) == []
    assert facts(run_in(tmp_path / "cut", settings)) == facts(whole)
    a, b = (session.last_checkpoint(settings, tmp_path / name) for name in ("whole", "cut"))
    assert a is not None
    assert b is not None
    assert {"at", "counts", "sent", "previous", "momenta"} <= a[0].keys()
    assert all(np.array_equal(a[0][name], b[0][name]) for name in a[0])
    with pytest.raises(ValueError, match="run with other settings"):
        run_in(tmp_path / "cut", settings_of(optimizer=optimizer, attack="sign_flip"))


# ---- runs in folders -------------------------------------------------------------------------------------------


def run_in(out: Path, settings: Settings, stop_after: int | None = None) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)

    class Stopped(Exception):
        pass

    def progress(t: int, line: Any) -> None:
        if t == stop_after:
            raise Stopped

    found = session.last_checkpoint(settings, out)
    try:
        return session.run(
            asynchronous.simulate(settings, DIGITS),
            out,
            evaluate_every=5,
            checkpoint_every=8,
            found=found,
            progress=progress,
        )
    except Stopped:
        return []


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "log.jsonl", ".lock", "checkpoint.safetensors.new"])
def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with (
        pytest.raises(ValueError, match=r"is no regular file \(remove it, or choose another --out\)"),
        session.alone_in(tmp_path),
    ):
        pass
    if name in ("checkpoint.safetensors", "log.jsonl"):
        with pytest.raises(ValueError, match="is no regular file"):
            session.last_checkpoint(settings_of(), tmp_path)


def facts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("optimizer", ["mu2sgd", "momentum"])
@pytest.mark.parametrize("stop_after", [3, 8, 22])
def test_resuming_gives_the_same_run(tmp_path: Path, optimizer: str, stop_after: int) -> None:
    settings = settings_of(optimizer=optimizer, attack="label_flip", failures=((2, 6, "crash"),), radius=3.0)
    whole = run_in(tmp_path / "whole", settings)
    assert run_in(tmp_path / "cut", settings, stop_after) == []
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"round": 39, "accu')  # what a kill leaves
    again = run_in(tmp_path / "cut", settings)
    assert facts(again) == facts(whole)
    assert [line["round"] for line in again[1:]] == list(range(5, 41, 5))
    logged = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert facts(logged) == facts(whole)
    a, b = (session.last_checkpoint(settings, tmp_path / name) for name in ("whole", "cut"))
    assert a is not None
    assert b is not None
    assert a[1:] == b[1:] == (40, {2: "crash in round 6"})
    assert all(np.array_equal(a[0][name], b[0][name]) for name in a[0])
    assert facts(run_in(tmp_path / "cut", settings)) == facts(whole)  # nothing left to do
    longer = dataclasses.replace(settings, rounds=50)
    more = run_in(tmp_path / "cut", longer)
    assert [line["round"] for line in more[1:]] == list(range(5, 51, 5))
    assert facts(more[1:]) == facts(run_in(tmp_path / "longer", longer)[1:])
    with pytest.raises(ValueError, match="holds 50 rounds, more than the 40 that are asked for"):
        run_in(tmp_path / "cut", settings)


@pytest.mark.parametrize(("dirichlet", "split"), [(None, "shards"), (0.1, "dirichlet(0.1)")])
def test_a_run_of_the_first_version_goes_on_with_its_split(tmp_path: Path, dirichlet: Any, split: str) -> None:
    """Its workers owned shards, which nothing said; all other draws are the same."""
    settings = settings_of(split=split)
    run_in(tmp_path, settings)
    whole = facts(run_in(tmp_path / "whole", dataclasses.replace(settings, rounds=50)))
    from safetensors.numpy import load_file, save_file

    new = ("split", "arrivals", "byzantine_share", "weights")
    old = {k: v for k, v in settings.as_dict().items() if k not in new} | {"dirichlet": dirichlet}
    path, log = tmp_path / "checkpoint.safetensors", tmp_path / "log.jsonl"
    save_file(load_file(path), path, metadata={"settings": json.dumps(old), "round": "40", "lost": "{}"})
    lines = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps({"settings": old}), *lines[1:]]) + "\n")
    said = f"run with other settings \\(split: '{re.escape(split)}' there, as in all runs of version 0.1, 'iid' here"
    with pytest.raises(ValueError, match=said):
        run_in(tmp_path, settings_of(rounds=50))
    assert facts(run_in(tmp_path, dataclasses.replace(settings, rounds=50)))[1:] == whole[1:]


def test_a_folder_with_another_run(tmp_path: Path) -> None:
    run_in(tmp_path, settings_of())
    with pytest.raises(ValueError, match=r"run with other settings \(lr: 0.1 there, 0.2 here\); choose another --out"):
        run_in(tmp_path, settings_of(lr=0.2))
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(ValueError, match=r"checkpoint.safetensors: cannot be read: .*start again with --overwrite"):
        run_in(tmp_path, settings_of())
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="run with other settings"):
        run_in(tmp_path, settings_of(lr=0.2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros(9, np.float32)}, r"expected float32 of .*'x': \(650,\).*got .*\(\(9,\), 'float32'\)"),
        ({"x": np.zeros((2, 650), np.float32)}, "checkpoint: expected float32"),
        ({"previous": np.zeros(650)}, "'previous': .*'float64'"),
        ({"previous": np.zeros(0, np.float32)}, "checkpoint: expected float32"),
        ({"momenta": np.zeros((4, 650), np.float32)}, "checkpoint: expected float32"),
        ({"server.iterate": None}, "checkpoint: expected float32"),
        ({"server.more": np.zeros(650, np.float32)}, "checkpoint: expected float32"),
        ({"ids": np.arange(1, 6)}, r"checkpoint: holds workers \[1, 2, 3, 4, 5\]; expected \[0, 1, 2, 3, 4\]"),
        ({"ids": None}, "cannot be read: it lacks ids"),
        ({"metadata": {"round": "-3"}}, r"cannot be read: round -3 and lost workers \[\] cannot be"),
        ({"metadata": {"round": "x"}}, "cannot be read: invalid literal"),
        ({"metadata": {"lost": '{"-1": "x"}'}}, r"lost workers \[-1\] cannot be"),
        ({"metadata": {"lost": '{"99": "x"}'}}, r"lost workers \[99\] cannot be"),
        ({"metadata": {"lost": "[]"}}, "cannot be read"),
        ({"metadata": {"settings": "[1]"}}, r"run with other settings \(\[1\] there\)"),
        ({"metadata": {"settings": "{"}}, "cannot be read"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from safetensors.numpy import load_file, save_file

    settings, path = settings_of(), tmp_path / "checkpoint.safetensors"
    run_in(tmp_path, settings)
    facts = {"settings": json.dumps(settings.as_dict()), "round": "40", "lost": "{}"} | change.pop("metadata", {})
    state = {name: values for name, values in (load_file(path) | change).items() if values is not None}
    save_file(state, path, metadata=facts)
    with pytest.raises(ValueError, match=message):
        run_in(tmp_path, dataclasses.replace(settings, rounds=50))


def test_a_log_that_is_gone_or_mangled(tmp_path: Path) -> None:
    settings = settings_of()
    whole = run_in(tmp_path, settings)
    log = tmp_path / "log.jsonl"
    good = json.loads(log.read_text().splitlines()[1])
    hostile = [
        *({"round": 1}, {"round": 2, "seconds": 3}, [], {"settings": {}, "round": 1}, {"settings": {}, **good}),
        *(good | {key: value} for key in good for value in ("1", None, [], {}, True) if key != "loss" or value),
        good | {"seconds": good["seconds"] | {"total": "1"}},
    ]
    hostile = [line for line in hostile if not (isinstance(line, dict) and line.get("lost") == {} and line == good)]
    deep = '{"round": 1, "accuracy": ' + "[" * 100_000
    extra = "\n".join([*map(json.dumps, hostile), deep, "x", "1" * 5000])
    log.write_text(log.read_text() + extra + "\n")
    assert facts(run_in(tmp_path, settings)) == facts(whole)
    log.unlink()
    again = run_in(tmp_path, settings)
    assert facts(again) == [*facts(whole[:1]), *facts(whole[-1:])]
    (tmp_path / "checkpoint.safetensors").unlink()
    log.write_text("my notes")
    with pytest.raises(ValueError, match=r"log.jsonl is no log of a training \(choose another --out"):
        run_in(tmp_path, settings)
    assert log.read_text() == "my notes"


def test_the_log_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of()
    whole = run_in(tmp_path, settings)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run_in(tmp_path, dataclasses.replace(settings, rounds=50))
    assert facts(run_in(tmp_path, settings)) == facts(whole)


def test_one_process_in_a_folder(tmp_path: Path) -> None:
    with session.alone_in(tmp_path):
        busy = robustkern("train", *SHORT, "--out", str(tmp_path), cwd=tmp_path)
        assert busy.returncode == 1
        assert "another process is writing there (wait for it, or choose another --out)" in busy.stderr
        assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.slow
def test_overwriting_begins_when_the_new_run_is_possible(tmp_path: Path) -> None:
    out = str(tmp_path / "[/x]")  # no markup
    short = ("train", "--model", "softmax", "--rounds", "20", "--out", out)
    assert robustkern(*short, cwd=tmp_path).returncode == 0
    failed = robustkern(*short, "--overwrite", "--workers", "5000", "--split", "shards", cwd=tmp_path)
    assert failed.returncode == 1
    assert "--workers must be between 1 and the 1400 training samples; got 5000" in failed.stderr
    again = robustkern(*short, cwd=tmp_path)
    assert again.returncode == 0
    assert "going on after round 20 of 20" in again.stderr
    fresh = robustkern(*short, "--overwrite", "--seed", "1", cwd=tmp_path)
    assert fresh.returncode == 0
    assert "going on" not in fresh.stderr


def test_a_log_of_a_diverged_run_is_json(tmp_path: Path) -> None:
    lines = run_in(tmp_path, settings_of(rule="mean", attack="nan"))
    assert lines[-1]["loss"] is None
    for text in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# ---- the command line ------------------------------------------------------------------------------------------


def robustkern(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "robustkern", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=cwd,
        check=False,
        env={**os.environ, "COLUMNS": "150", **options},
    )


SHORT = ("--model", "softmax", "--workers", "7", "--byzantine", "2", "--rounds", "600")


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    whole = robustkern("train", *SHORT, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for text in ("2 of 7 workers, alie", "ctma(median), f = 2", "test accuracy", "accuracy.png"):
        assert text in whole.stdout
    assert (tmp_path / "whole" / "accuracy.png").stat().st_size > 10_000
    killed = subprocess.Popen(
        [sys.executable, "-m", "robustkern", "train", *SHORT, "--out", "cut", "--checkpoint-every", "10"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    log = tmp_path / "cut" / "log.jsonl"
    while not (log.exists() and '"round": 50,' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = robustkern("train", *SHORT, "--out", "cut", "--checkpoint-every", "10", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    went_on = re.search(r"going on after round (\d+) of 600", again.stderr)
    assert went_on
    assert 40 <= int(went_on[1]) < 600
    logs = [[json.loads(t) for t in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "cut")]
    assert facts(logs[0]) == facts(logs[1])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--attack", "x"), 2, "--attack: 'x' is not known"),
        (("--rule", "x"), 2, "--rule: 'x' is not known"),
        (("--lr", "-1"), 2, "--lr must be a finite number above 0; got -1"),
        (("--f", "4"), 2, "--f must satisfy 0 <= 2[*]f < workers; got --f 4 with --workers 7"),
        (("--byzantine", "4"), 2, "2[*]byzantine must be below workers; got --byzantine 4 with --workers 7"),
        (("--model", "x"), 2, "--model must be one of softmax, mlp, cnn, paper, paper_groupnorm, resnet18; got 'x'"),
        (("--split", "x"), 2, "--split must be iid, shards or dirichlet"),
        (("--arrivals", "id", "--crash", "1@1"), 2, "--crash and --stall must be none with --arrivals 'id'; got"),
        (("--beta", "2"), 2, "--beta must be in"),
        (("--crash", "3@20,9@1"), 2, "--crash and --stall must be .*worker, round"),
        (("--timeout", "nan"), 2, "--timeout: expected a number of seconds from 0.1 on; got nan"),
        (("--stall", ","), 2, "--stall: expected worker@round such as 3@20, with commas; got nothing"),
        (("--crash", "x"), 2, "--crash must be worker@round, such as 3@20; got 'x'"),
        (("--data", "mnist"), 1, "mnist needs the files train-images-idx3-ubyte.*no folder was given"),
        (("--data", "cifar10", "--data-dir", "."), 1, "cifar10 needs cifar-10-batches-py.*looked in"),
        (("--crash", "1@1,2@1", "--crash", "3@1"), 1, "3 workers are lost, more than the --f 2"),
    ],
)
def test_errors_of_the_command(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = robustkern("train", *SHORT, *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_who_torchrun_starts_trains_in_rounds(tmp_path: Path) -> None:
    started = {"TORCHELASTIC_RUN_ID": "one", "RANK": "0", "WORLD_SIZE": "7"}
    done = robustkern("train", *SHORT, "--arrivals", "id", cwd=tmp_path, **started)
    assert done.returncode == 2
    message = "--arrivals id: torchrun's processes train in rounds (drop torchrun, or --arrivals)"
    assert message in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "train-output").exists()


def test_small_models_take_one_thread(tmp_path: Path) -> None:
    """Threads that wait for each other cost up to sixty times as much where another process has a core."""
    code = (
        "import atexit, sys, torch, robustkern; torch.set_num_threads(2); robustkern.set_num_threads(2)\n"
        "atexit.register(lambda: print('threads', torch.get_num_threads(), robustkern.info()['threads']))\n"
        "from robustkern.cli import main; sys.argv[1:] = ['train', '--model', 'softmax', '--rounds', '3']; main()"
    )
    found = []
    for environment in ({}, {"OMP_NUM_THREADS": "2"}):
        inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                              env={**inherited, **environment})  # fmt: skip
        found.append(done.stdout.splitlines()[-1])
    assert found == ["threads 1 1", "threads 2 2"]


def test_training_without_torch_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    done = robustkern("train", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "pip install 'robustkern[train]'" in done.stderr


# ---- real processes --------------------------------------------------------------------------------------------


def launch(tmp_path: Path, out: str, *arguments: str, processes: int = 5) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *("-m", "robustkern", "train", "--workers", str(processes), "--byzantine", str(processes // 2)),
            *("--rounds", "40", "--checkpoint-every", "16", "--out", out),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"},
    )


def compare_with_simulation(tmp_path: Path, out: str, settings: Settings) -> None:
    found = session.last_checkpoint(settings, tmp_path / out)
    assert found is not None
    state, t, _ = found
    run = trained(settings)
    assert t == run.t
    want = run.state()
    assert set(state) == set(want)
    for name, values in want.items():
        np.testing.assert_allclose(state[name], values, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_processes_give_the_simulations_result(tmp_path: Path) -> None:
    done = launch(tmp_path, "run", "--attack", "alie", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    compare_with_simulation(tmp_path, "run", Settings(workers=5, byzantine=2, rounds=40, seed=3))


@pytest.mark.slow
def test_processes_go_on_without_workers_that_crash_or_stall(tmp_path: Path) -> None:
    """Worker 1 is killed, worker 4 (an attacker) stops without a word; both count against f. Then all are resumed."""
    faults = ("--crash", "1@10", "--stall", "4@20", "--attack", "label_flip", "--timeout", "4")
    done = launch(tmp_path, "run", *faults)
    assert done.returncode == 0, done.stderr
    assert "worker 1 has ended: signal 9" in done.stderr
    assert "worker 1 is lost: the connection was lost in round 10" in done.stderr
    assert "worker 4 is lost: no answer within 4 s in round 20" in done.stderr
    failures = ((1, 10, "crash"), (4, 20, "stall"))
    settings = Settings(workers=5, byzantine=2, rounds=40, attack="label_flip", failures=failures)
    compare_with_simulation(tmp_path, "run", settings)
    more = launch(tmp_path, "run", *faults, "--rounds", "60")
    assert more.returncode == 0, more.stderr
    assert "going on after round 40 of 60" in more.stderr
    compare_with_simulation(tmp_path, "run", dataclasses.replace(settings, rounds=60))


@pytest.mark.slow
def test_processes_without_an_attacker_that_searches(tmp_path: Path) -> None:
    """The others plan their attack as the simulation does, without the one that is gone."""
    done = launch(tmp_path, "run", "--attack", "optimised", "--crash", "4@30", "--rounds", "32")
    assert done.returncode == 0, done.stderr
    settings = Settings(workers=5, byzantine=2, rounds=32, attack="optimised", failures=((4, 30, "crash"),))
    compare_with_simulation(tmp_path, "run", settings)


@pytest.mark.slow
def test_processes_end_when_too_many_are_lost(tmp_path: Path) -> None:
    done = launch(tmp_path, "run", "--crash", "1@3", "--crash", "2@4", processes=3)
    assert done.returncode == 1
    assert "2 workers are lost, more than the --f 1 that are tolerated" in done.stderr


@pytest.mark.parametrize(
    ("rank", "why"), [(0, r"Timed out .* waiting for clients"), (1, r"The client socket has timed out")]
)
def test_processes_that_nobody_joins(monkeypatch: pytest.MonkeyPatch, rank: int, why: str) -> None:
    """The server without workers, and a worker without the server; in less time than they have."""
    from robustkern.training import processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in (place | {"RANK": str(rank), "WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "STARTUP", timedelta(seconds=1))
    begin: Any = processes.work if rank else functools.partial(processes.ProcessServer, checkpoint_every=1)
    with pytest.raises(rk.RobustkernError, match=rf"^the 3 processes did not come together: {why}"):
        begin(Settings(workers=3, byzantine=1), DIGITS, timeout_s=1)


@pytest.mark.slow
def test_as_many_processes_as_workers(tmp_path: Path) -> None:
    done = launch(tmp_path, "run", "--workers", "6", processes=3)
    assert done.returncode == 1
    assert "/robustkern/training/" not in done.stderr  # torchrun has a traceback of its own
    assert "--workers must be the number of processes; got --workers 6 with 3 processes" in done.stderr

"""Aggregation inside a JAX step.

Per-worker gradients by `vmap`, combined inside of `jit`. Two of eight workers send what would ruin an average.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from robustkern.adapters.jax import aggregate
from robustkern.measure import style

WORKERS, HOSTILE, STEPS = 8, 2, 40
truth = jnp.arange(1.0, 6.0)
x = jax.random.normal(jax.random.key(0), (WORKERS, 100, 5))
y = x @ truth + 0.1 * jax.random.normal(jax.random.key(1), (WORKERS, 100))


def loss(w, x, y):
    """Mean squared error of one worker."""
    return jnp.mean((x @ w - y) ** 2)


def step(rule, f):
    """Return a compiled step of gradient descent."""

    @jax.jit
    def go(w):
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(w, x, y)
        gradients = gradients.at[:HOSTILE].multiply(-5.0)
        return w - 0.1 * aggregate(gradients, rule, f=f)

    return go


errors = {}
for rule, f in (("mean", None), ("trimmed_mean", HOSTILE), ("nnm | krum", HOSTILE)):
    w, go = jnp.zeros(5), step(rule, f)
    errors[rule] = []
    for _ in range(STEPS):
        w = go(w)
        errors[rule].append(float(jnp.linalg.norm(w - truth)))
    print(f"{rule}: {errors[rule][-1]:.4f} from the truth")
assert errors["mean"][-1] > 10 * errors["nnm | krum"][-1]

figure = style.figure(7, 3.4)
axes = figure.subplots()
looks = style.looks(errors)
for rule, values in errors.items():
    axes.plot(range(1, STEPS + 1), values, **looks[rule] | {"marker": ""})
axes.set(xlabel="step", ylabel="distance from the truth", yscale="log", xlim=(1, STEPS))
style.plain_ticks(axes)
style.name_ends(axes, [((STEPS, np.float64(v[-1])), rule, looks[rule]["color"]) for rule, v in errors.items()])
style.save(figure, sys.argv[1] if len(sys.argv) > 1 else "jax_step.png")

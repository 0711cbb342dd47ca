"""Federated averaging with hostile clients.

Ten clients train a softmax model on scikit-learn's digits, each on data of its own; three of them send back ten times
the opposite of what they learnt. One line of the server decides whether the model survives: `rk.aggregate`.
"""

import sys

import numpy as np
from sklearn.datasets import load_digits

import robustkern as rk
from robustkern.measure import style

CLIENTS, HOSTILE, ROUNDS = 10, 3, 25

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(labels))
test, train = order[:400], np.array_split(order[400:], CLIENTS)


def trained(model, samples):
    """Return the client's model after some steps on its own samples."""
    w, b = model["w"].copy(), model["b"].copy()
    x, y = images[samples], np.eye(10, dtype=np.float32)[labels[samples]]
    for _ in range(5):
        scores = x @ w + b
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = scores / scores.sum(axis=1, keepdims=True) - y
        w -= x.T @ error / len(x)
        b -= error.mean(axis=0)
    return {"w": w, "b": b}


def accuracy(model):
    """Return the share of test images that a model gets right."""
    return float(((images[test] @ model["w"] + model["b"]).argmax(axis=1) == labels[test]).mean())


found = {}
for rule in ("mean", "median", "ctma(geometric_median)"):
    model = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
    found[rule] = []
    for _ in range(ROUNDS):
        replies = [trained(model, samples) for samples in train]
        for reply in replies[:HOSTILE]:
            for name, value in reply.items():
                reply[name] = model[name] - 10 * (value - model[name])
        f = None if rule == "mean" else HOSTILE
        model, info = rk.aggregate(replies, rule, f=f, return_info=True)
        found[rule].append(accuracy(model))
    print(f"{rule}: accuracy {found[rule][-1]:.3f}; kept {'all' if info.kept is None else np.flatnonzero(info.kept)}")
assert found["mean"][-1] < 0.5
assert found["ctma(geometric_median)"][-1] > 0.85

figure = style.figure(7, 3.6)
axes = figure.subplots()
looks = style.looks(found)
for rule, values in found.items():
    axes.plot(range(1, ROUNDS + 1), values, **looks[rule] | {"marker": ""})
axes.set(xlabel="round", ylabel="accuracy", ylim=(0, 1), xlim=(1, ROUNDS))
style.plain_ticks(axes)
style.name_ends(axes, [((ROUNDS, values[-1]), rule, looks[rule]["color"]) for rule, values in found.items()])
style.save(figure, sys.argv[1] if len(sys.argv) > 1 else "fedavg.png")

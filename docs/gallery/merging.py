"""Merging ten checkpoints, of which two are broken.

Ten fine-tuned copies of a model lie in safetensors files. One was written by a process that lost its mind (a NaN), one
was trained on poisoned data. `robustkern aggregate` does this on the command line; nothing is ever loaded whole.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import robustkern as rk
from robustkern.measure import style

g = np.random.default_rng(0)
base = {f"layer{k}.weight": g.standard_normal((64, 64), dtype=np.float32) for k in range(4)}

with tempfile.TemporaryDirectory() as folder:
    paths = [Path(folder, f"client-{k}.safetensors") for k in range(10)]
    for k, path in enumerate(paths):
        tuned = {name: w + 0.1 * g.standard_normal(w.shape, dtype=np.float32) for name, w in base.items()}
        if k == 3:
            tuned["layer2.weight"][5, 7] = np.nan
        if k == 8:
            tuned = {name: w - 0.8 * base[name] for name, w in tuned.items()}
        save_file(tuned, path)
    out = Path(folder, "merged.safetensors")
    info = rk.aggregate_files(paths, "ctma(geometric_median)", f=2, out=out)
    merged = load_file(out)

print(f"not finite: rows {info.nonfinite_rows}; left out: {np.flatnonzero(~info.kept)}")
assert np.flatnonzero(~info.kept).tolist() == [3, 8]
error = max(float(np.abs(merged[name] - w).max()) for name, w in base.items())
assert error < 0.2

figure = style.figure(7, 3.2)
axes = figure.subplots()
distances = np.sqrt(np.where(np.isfinite(info.sq_distances), info.sq_distances, np.nan))
for kept, label, colour in ((True, "kept", style.COLOURS[1]), (False, "left out", style.COLOURS[4])):
    rows = np.flatnonzero(info.kept == kept)
    axes.bar(rows, np.nan_to_num(distances[rows]), color=colour, label=label)
axes.annotate("holds a NaN", (3, 0), (3, 35), ha="center", arrowprops={"arrowstyle": "->"})
axes.set(xlabel="checkpoint", ylabel="distance from the anchor", xticks=range(10))
axes.legend(frameon=False, loc="upper left")
style.save(figure, sys.argv[1] if len(sys.argv) > 1 else "merging.png")

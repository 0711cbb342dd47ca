"""Aggregation of update files tensor by tensor: memory is bounded by the largest tensor times the number of files.

By the column-block law a file read piece by piece is the same thing as leaves of a pytree, so every rule works. The
output appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustkern.contract.rows import DTYPES, Block, PlainLeaf, Rows, Undivided
from robustkern.engine import Info, run
from robustkern.files.formats import FileError, Writer, complete_or_absent, naming, open_reader, writer_for
from robustkern.files.workers import expand
from robustkern.inputs.memory import lower_median
from robustkern.rules.base import Aggregator, as_aggregator

__all__ = ["FileSource", "aggregate_files"]

Progress = Callable[[str, int, int], None]


class FileSource(Undivided):
    """Rows that are read tensor by tensor into one reused buffer, and results that are written one by one."""

    device = "cpu"
    plain: Sequence[PlainLeaf] = ()  # a tensor is an array

    def __init__(self, paths: Sequence[Path], centre: Path | None = None, progress: Progress | None = None) -> None:
        self.has_centre = centre is not None
        self.readers = [open_reader(path) for path in [*paths, *([] if centre is None else [centre])]]
        self.n = len(paths)
        self.tensors = self.readers[0].tensors
        self._check()
        self.floats = {name: t for name, t in self.tensors.items() if t.dtype in DTYPES}
        self.counters = {name: t for name, t in self.tensors.items() if t.dtype not in DTYPES}
        self.dtypes = {t.dtype for t in self.floats.values()}
        self.d = sum(t.size for t in self.floats.values())
        self.nbytes = len(self.readers) * sum(t.size * t.dtype.itemsize for t in self.floats.values())
        largest = max((t.size * t.dtype.itemsize for t in self.tensors.values()), default=0)
        self._rows = np.empty((len(self.readers), -(-largest // 64) * 64), dtype=np.uint8)
        self._out = np.empty(self._rows.shape[1], dtype=np.uint8)
        self._progress, self._phase, self._done = progress, "measuring", 0
        self.open_output: Callable[[], Writer] | None = None

    def _check(self) -> None:
        first = self.readers[0]
        if not first.tensors:
            raise FileError(f"{first.path}: holds no tensors")
        for name, tensor in first.tensors.items():
            if tensor.dtype not in DTYPES and (tensor.dtype.kind not in "iub" or not tensor.dtype.isnative):
                raise FileError(
                    f"{first.path}: tensor {name!r} has dtype {tensor.dtype}; expected float16, bfloat16, float32, "
                    "float64 or native integers"
                )
        for other in self.readers[1:]:
            missing = sorted(first.tensors.keys() - other.tensors.keys())
            extra = sorted(other.tensors.keys() - first.tensors.keys())
            if missing or extra:
                parts = [f"lacks {', '.join(map(repr, missing[:5]))}"] if missing else []
                parts += [f"adds {', '.join(map(repr, extra[:5]))}"] if extra else []
                raise FileError(f"{other.path}: its tensors differ from {first.path}: {', '.join(parts)}")
            for name, tensor in first.tensors.items():
                if other.tensors[name] != tensor:
                    theirs = other.tensors[name]
                    raise FileError(
                        f"{other.path}: tensor {name!r} has shape {theirs.shape} and dtype {theirs.dtype}; "
                        f"{first.path} has shape {tensor.shape} and dtype {tensor.dtype}"
                    )

    def row_name(self, row: int) -> str:
        """Return the file's name."""
        return str(self.readers[row].path)

    def blocks(self) -> Iterator[Block]:
        """Yield one tensor of all files after the other."""
        for name in self.floats:
            yield self._block(name)

    def results(self) -> Iterator[Block]:
        """Yield one tensor of all files after the other, in the order of the output, and write their results there."""
        assert self.open_output is not None
        self._phase, self._done = "writing", 0
        writer = self.open_output()
        for name in writer.order:
            tensor = self.tensors[name]
            if name in self.floats:
                yield self._block(name)
                values = self._out[: tensor.size * tensor.dtype.itemsize].view(tensor.dtype)
            else:
                values = lower_median(self.load(name)[: self.n])
            writer.write(name, values.reshape(tensor.shape))

    def _block(self, name: str) -> Block:
        tensor = self.tensors[name]
        rows = self.load(name)
        out = self._out[: tensor.size * tensor.dtype.itemsize].view(tensor.dtype)
        self._done += rows.nbytes
        if self._progress is not None:
            self._progress(self._phase, self._done, self.nbytes)
        return Block((Rows.of(rows),), (Rows.of(out[None]),))

    def load(self, name: str) -> NDArray[Any]:
        """Return one tensor of all files as (n, size) in the reused buffer."""
        tensor = self.tensors[name]
        rows = self._rows[:, : tensor.size * tensor.dtype.itemsize].view(tensor.dtype)
        for i, reader in enumerate(self.readers):
            with naming(reader.path):
                values = reader.read(name)
                if values.shape != tensor.shape or values.dtype != tensor.dtype:
                    raise ValueError(f"tensor {name!r} changed while it was being read")
                rows[i] = values.reshape(-1)
        return rows


def aggregate_files(
    paths: Sequence[str | os.PathLike[str]],
    rule: Aggregator | str,
    /,
    *,
    out: str | os.PathLike[str],
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Info:
    """Aggregate update files into one file.

    Parameters
    ----------
    paths : sequence of paths
        One update each: safetensors, npz or npy with the same tensors; a directory stands for the files in it.
    rule, f, delta, weights, seed, backend
        As for `robustkern.aggregate`.
    centre : path, optional
        A file like the updates, for rules that measure from a centre.
    out : path
        Written under a temporary name beside it and renamed when complete; the suffix decides the kind.
    progress : callable, optional
        Called with what is being done, bytes read so far, and bytes of one read of all files.

    Returns
    -------
    Info

    Raises
    ------
    FileError
        If a file is corrupt, truncated or does not match the others, naming it. Nothing is written then.
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `robustkern.aggregate`; rows are called by their files.

    Notes
    -----
    Memory: the largest tensor times n + 2. Integer and boolean tensors come back as column-wise lower median.
    """
    plan = as_aggregator(rule)
    files = expand(paths)
    if not files:
        raise FileError("no update files were given")
    source = FileSource(files, None if centre is None else Path(centre), progress)
    target = Path(out)
    make_writer = writer_for(target, source.tensors, [reader.path for reader in source.readers])
    with contextlib.ExitStack() as stack:

        def open_output() -> Writer:
            file = stack.enter_context(complete_or_absent(target))
            writer = make_writer(file, source.tensors, source.readers[0].metadata)
            return stack.enter_context(contextlib.closing(writer))

        source.open_output = open_output
        info = run(plan, source, f=f, delta=delta, weights=weights, seed=seed, backend=backend)
    assert info is not None
    return info

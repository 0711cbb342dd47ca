"""Aggregation of update files: pieces of all files at a time, in memory of a bounded size.

By the column-block law a file read piece by piece is the same thing as leaves of a pytree, so every rule works. The
next piece is read while one is computed. What was judged is what is added: whoever changes a file between the passes
is found out. The output appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustkern.contract.counters import lower_median
from robustkern.contract.rows import DTYPES, Block, PlainLeaf, Rows, Undivided
from robustkern.engine import Info, Limits, combining, joined, limits, run
from robustkern.errors import shown
from robustkern.files.digest import Digest
from robustkern.files.formats import MARK, FileError, Reader, Tensor, naming, open_reader
from robustkern.files.output import Output, Writer, in_order
from robustkern.files.workers import Pool, Worker, capped, claimed, find_workers, named_weights
from robustkern.inputs.leaves import Choice, computed
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.rules.mean import Mean

__all__ = ["Weights", "aggregate_files", "aggregate_pool", "memory_of"]

Progress = Callable[[str, int, int], None]
Bytes = NDArray[np.uint8]

#: Bytes of a piece of all rows: what fits the caches beside the kernels, so that the copy from the files costs least.
PIECE_BYTES = 8 << 20
LEAST_PIECE = 1 << 14
READERS = 4


# ---- one worker's files ----------------------------------------------------------------------------------------


@dataclass
class _Row:
    """A worker, or another file like the updates, that was opened."""

    name: str
    readers: Sequence[Reader] = ()
    tensors: dict[str, tuple[Reader, Tensor]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    wrong: str | None = None

    @classmethod
    def of(cls, worker: Worker, hold: bool) -> _Row:
        """Open a worker's files; what is wrong with them is kept."""
        row = cls(worker.name, wrong=worker.wrong)
        opened: list[Reader] = []
        try:
            for path in worker.files if row.wrong is None else ():
                reader = open_reader(path, hold)
                opened.append(reader)
                row.metadata |= reader.metadata
                for name, tensor in reader.tensors.items():
                    if name in row.tensors:
                        raise FileError(f"{path}: holds {shown(name)}, as another file of {worker.name} does")
                    if worker.expected is not None and worker.expected.get(name) != path.name:
                        raise FileError(f"{path}: holds {shown(name)}, which the index does not find there")
                    row.tensors[name] = reader, tensor
            if row.wrong is None and not row.tensors:
                raise FileError(f"{worker.path}: holds no tensors")
            missing = sorted((worker.expected or {}).keys() - row.tensors.keys())
            if missing and row.wrong is None:
                raise FileError(f"{worker.path}: lacks {shown(missing[0])}, which its index names")
        except FileError as error:
            row.wrong = str(error)
            for reader in opened:
                reader.held.close()
            opened = []
        row.readers = opened
        return row

    def close(self) -> None:
        """Let its files go."""
        for reader in self.readers:
            reader.held.close()


def _descriptors() -> int:
    """How many files may be held open: half of what the process may have."""
    try:
        import resource
    except ImportError:  # no Unix
        return 256
    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


# ---- pieces ----------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Values of a tensor in a piece: which, and where in a row of the buffer."""

    name: str
    begin: int
    length: int
    at: int


@dataclass
class _Piece:
    """Some values of all rows that are read, computed and written at once; all of one dtype."""

    dtype: np.dtype[Any]  # that is computed in; integers are their own
    parts: list[_Part] = field(default_factory=list)
    count: int = 0


@dataclass(eq=False)
class _Source(Undivided):
    """The rows of some tensors, as the engine wants them."""

    files: Files
    pieces: Sequence[_Piece]
    n: int
    d: int
    dtypes: set[np.dtype[Any]]
    has_centre: bool
    device: str = "cpu"
    plain: Sequence[PlainLeaf] = ()
    combine: Any = lower_median

    def row_name(self, row: int) -> str:
        """Return the worker's name."""
        return self.files.rows[row].name

    def blocks(self) -> Iterator[Block]:
        """Yield the pieces."""
        floating = [piece for piece in self.pieces if piece.dtype in DTYPES]
        for _, block in self.files.read(floating, judged=False):
            yield block

    def results(self) -> Iterator[Block]:
        """Yield the pieces in the order of the output, and write their results there."""
        self.files.combine = self.combine
        for piece, block in self.files.read(self.pieces, judged=True):
            if piece.dtype in DTYPES:
                yield block
            self.files.write(piece, block)


# ---- all files -------------------------------------------------------------------------------------------------


class Files:
    """The tensors of all workers, read piece by piece, and the results of the pieces, written one after the other.

    Parameters
    ----------
    rows : sequence of _Row
        The workers, perhaps a centre, and perhaps a model that supplies what takes no part.
    n : int
        How many of them are workers.
    choice : Choice
        Which tensors take part, and in what dtype.
    within : Limits
        Which rows may be bad.
    bad : {"error", "count"}
        What a file is that cannot be used.
    drops : bool
        Whether rows that are not finite, as bad ones are, are left out by the engine.
    apart : bool
        Whether no two tensors share a piece.
    memory : int
        Most bytes of all buffers.
    progress : callable, optional
        See `aggregate_files`.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        n: int,
        has_centre: bool,
        base: _Row | None,
        choice: Choice,
        within: Limits,
        bad: str,
        drops: bool,
        apart: bool,
        memory: int,
        progress: Progress | None,
    ) -> None:
        self._drops, self._apart = drops, apart
        self.rows, self.n, self.has_centre, self.base = rows, n, has_centre, base
        self.choice, self.within, self.bad, self.memory = choice, within, bad, memory
        self.combine: Any = lower_median
        self._progress, self._done = progress, 0
        self._digest = Digest()
        self._digests: dict[tuple[str, int], list[int]] = {}
        self._settle_structure()
        self._cut()
        self.writer: Callable[[], Writer] | None = None
        self._spilled: dict[str, IO[bytes]] = {}
        self._ending: list[_Part] = []

    # -- which tensors, and which rows have them -------------------------------------------------------------------

    def _settle_structure(self) -> None:
        """Find the tensors that enough rows share; rows with others are bad."""
        forms: list[Any] = []
        for row in self.rows:
            chosen = {name: tensor for name, (_, tensor) in row.tensors.items() if self.choice.takes(name)}
            form = tuple(sorted((k, t.shape, self.choice.kind(t.dtype)) for k, t in chosen.items()))
            forms.append(None if row.wrong else form)
        votes = Counter(form for form in forms[: self.n] if form is not None)
        if self.bad == "error":
            for row in self.rows:
                if row.wrong is not None:
                    raise FileError(row.wrong)
        if not votes:
            raise FileError(f"no update can be used; the first: {self.rows[0].wrong}")
        shared = votes.most_common(1)[0][0]
        model = self.rows[forms.index(shared)]
        self.tensors = {name: model.tensors[name][1] for name, _, _ in shared}
        self.choice.check(model.tensors)
        for name, tensor in self.tensors.items():
            if computed(tensor.dtype) is None and (tensor.dtype.kind not in "iub" or not tensor.dtype.isnative):
                raise FileError(
                    f"{model.readers[0].path}: tensor {shown(name)} has dtype {tensor.dtype}; expected float16, "
                    "bfloat16, float32, float64, complex64, complex128, a float8 or native integers"
                )
        for row, form in zip(self.rows, forms, strict=True):
            if row.wrong is None and form != shared:
                row.wrong = self._difference(row, model)
                if self.bad == "error" or (row is self.rows[-1] and self.has_centre):
                    raise FileError(row.wrong)
        self.check_bad()

    def _difference(self, row: _Row, model: _Row) -> str:
        """Say what is different in a row from what most have."""
        path, theirs = row.readers[0].path, model.readers[0].path
        names = {name for name in row.tensors if self.choice.takes(name)}
        missing, extra = sorted(self.tensors.keys() - names), sorted(names - self.tensors.keys())
        if missing or extra:
            parts = [f"lacks {', '.join(map(shown, missing[:3]))}"] if missing else []
            parts += [f"adds {', '.join(map(shown, extra[:3]))}"] if extra else []
            return f"{path}: its tensors differ from {theirs}: {', '.join(parts)}"
        for name, tensor in self.tensors.items():
            other = row.tensors[name][1]
            if other.shape != tensor.shape or self.choice.kind(other.dtype) != self.choice.kind(tensor.dtype):
                mixed = other.shape == tensor.shape and computed(other.dtype) and computed(tensor.dtype)
                return (
                    f"{path}: tensor {shown(name)} has shape {other.shape} and dtype {other.dtype}; {theirs} has shape "
                    f"{tensor.shape} and dtype {tensor.dtype}" + (" (dtype= combines such updates)" if mixed else "")
                )
        raise AssertionError(name)

    def check_bad(self) -> None:
        """Raise where more files are bad than may be."""
        wrong = [row for row in self.rows[: self.n] if row.wrong is not None]
        mask = np.array([row.wrong is not None for row in self.rows[: self.n]])
        if wrong and not self.within.tolerates(mask):
            limit = "fewer than half" if self.within.f is None else f"f={self.within.f}"
            raise FileError(
                f"{len(wrong)} of {self.n} updates cannot be used, more than {limit}; the first: {wrong[0].wrong}"
            )

    @property
    def bad_rows(self) -> dict[str, str]:
        """Workers whose files cannot be used, and why."""
        return {row.name: row.wrong for row in self.rows[: self.n] if row.wrong is not None}

    def _tied(self) -> dict[str, str]:
        """Tensors that are one with another in all rows but some that may be bad: by name, that one's name."""
        names: dict[str, list[tuple[Any, ...]]] = {}
        good = [row for row in self.rows[: self.n] if row.wrong is None]
        for name in in_order(self.tensors):
            places = []
            for row in good:
                reader, tensor = row.tensors[name]
                places.append((id(reader), reader.place_of(name), tensor.shape, tensor.dtype))
            names[name] = places
        first: dict[tuple[Any, ...], str] = {}
        tied: dict[str, str] = {}
        for name, places in names.items():
            votes = Counter(first[place] for place in places if place in first)
            for place in places:
                first.setdefault(place, name)
            if votes:
                other, _ = votes.most_common(1)[0]
                apart = np.array([row.wrong is not None for row in self.rows[: self.n]])
                where = {id(row): first.get(place) == other for row, place in zip(good, places, strict=True)}
                apart |= np.array([not where.get(id(row), False) for row in self.rows[: self.n]])
                if self.within.tolerates(apart):
                    tied[name] = tied.get(other, other)
        return tied

    # -- cutting ---------------------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Cut the tensors into pieces, in the order of the output."""
        self.out: dict[str, Tensor] = {}
        base = {} if self.base is None else {k: t for k, (_, t) in self.base.tensors.items() if k not in self.tensors}
        results = {name: replace(t, dtype=self.choice.result(t.dtype)) for name, t in self.tensors.items()}
        for name in in_order(results | base):
            self.out[name] = (results | base)[name]
        self.tied = self._tied()
        self.floats = {k: t for k, t in self.tensors.items() if computed(t.dtype) is not None and k not in self.tied}
        self.integers = [k for k, t in self.tensors.items() if computed(t.dtype) is None]
        rows, self.pieces = len(self.rows), []
        bytes_each = min(max(PIECE_BYTES // rows, LEAST_PIECE), self.memory // (2 * rows + 4))
        if bytes_each < 64:
            raise ValueError(f"memory: {self.memory:,} bytes are too few for {rows} rows (allow {128 * (rows + 2):,})")
        piece: _Piece | None = None
        for name in self.out:
            source = self.tensors.get(name)
            if source is None or name in self.tied:
                self.pieces.append(_Piece(np.dtype(np.void), [_Part(name, 0, 0, 0)]))
                piece = None
                continue
            form = self.choice.form(source.dtype)
            dtype, factor = (source.dtype, 1) if form is None else (form.dtype, form.factor)
            limit = bytes_each // 8  # of values, however wide those in the files are
            size, begin = source.size * factor, 0
            whole = not all(r.tensors[name][0].in_pieces(name) for r in self.rows if r.wrong is None)
            if whole and size * dtype.itemsize > self.memory // (2 * rows + 4):
                which = next(r for r in self.rows if r.wrong is None and not r.tensors[name][0].in_pieces(name))
                raise FileError(
                    f"{which.readers[0].path}: tensor {shown(name)} has its axes in another order, and is too large "
                    "to be read whole (save numpy.ascontiguousarray(x), or allow more memory)"
                )
            alone = whole or self._apart or name in self.tied.values()
            while True:
                if piece is None or piece.dtype != dtype or alone or piece.count >= limit:
                    piece = _Piece(dtype)
                    self.pieces.append(piece)
                count = size - begin if whole else min(size - begin, limit - piece.count)
                piece.parts.append(_Part(name, begin, count, piece.count))
                piece.count += count
                begin += count
                if begin >= size:
                    break
            if alone:
                piece = None
        largest = max((p.count * p.dtype.itemsize for p in self.pieces), default=0)
        self._width = -(-max(largest, 64) // 64) * 64
        self._result = np.empty(self._width, dtype=np.uint8)
        self._buffers = [np.empty((rows, self._width), dtype=np.uint8) for _ in range(2)]
        self.nbytes = sum(p.count * p.dtype.itemsize for p in self.pieces if p.dtype in DTYPES) * rows

    def source(self, names: set[str] | None = None) -> _Source:
        """Return the rows of some tensors, which are pieces of their own then; None: all that take part."""
        pieces = [p for p in self.pieces if names is None or p.parts[0].name in names]
        floating = [p for p in pieces if p.dtype in DTYPES]
        d = sum(p.count for p in floating)
        return _Source(self, pieces, self.n, d, {p.dtype for p in floating}, self.has_centre)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, pieces: Sequence[_Piece], judged: bool) -> Iterator[tuple[_Piece, Block]]:
        """Yield pieces of all rows; the next one is read meanwhile.

        Parameters
        ----------
        pieces : sequence
            Which.
        judged : bool
            Whether these values go into the result; those that were read before must be the same.
        """
        if judged and self._digests:
            self._check_files()
        if judged != self._judging:
            self._judging, self._done = judged, 0
        with ThreadPoolExecutor(READERS, thread_name_prefix="robustkern") as pool:
            waiting: list[Future[None]] = []
            try:
                for k, piece in enumerate(pieces):
                    waiting = waiting or self._fill(pool, piece, self._buffers[k % 2], judged)
                    for future in waiting:
                        future.result()
                    waiting = []
                    if k + 1 < len(pieces):
                        waiting = self._fill(pool, pieces[k + 1], self._buffers[(k + 1) % 2], judged)
                    yield piece, self._block(piece, self._buffers[k % 2])
            finally:
                for future in waiting:
                    future.cancel()
        if judged:
            self._check_files()

    _judging = False

    def _fill(self, pool: ThreadPoolExecutor, piece: _Piece, buffer: Bytes, judged: bool) -> list[Future[None]]:
        if piece.dtype == np.void:
            return []
        count = min(READERS, len(self.rows))

        def some(first: int) -> None:
            for i in range(first, len(self.rows), count):
                self._read_row(i, piece, buffer[i, : piece.count * piece.dtype.itemsize], judged)

        return [pool.submit(some, first) for first in range(count)]

    def _read_row(self, i: int, piece: _Piece, data: Bytes, judged: bool) -> None:
        row, floating = self.rows[i], piece.dtype in DTYPES
        key = (piece.parts[0].name, piece.parts[0].begin)
        before = self._digests.get(key, [])[i:] or [-1]
        try:
            if row.wrong is None:
                for part in piece.parts:
                    self._read_part(row, part, piece.dtype, data)
        except FileError as error:
            if self.bad == "error" or before[0] >= 0 or i >= self.n:
                raise
            row.wrong = str(error)
        if row.wrong is not None:
            if floating:
                data.view(piece.dtype)[:] = np.nan
            return
        if not floating or (judged and before[0] < 0):
            return
        found = self._digest(data)
        if before[0] < 0:
            self._digests.setdefault(key, [-1] * len(self.rows))[i] = found
        elif found != before[0]:
            path = row.readers[0].path
            raise FileError(f"{path}: changed while it was being read (updates must stay until the end)")

    def _read_part(self, row: _Row, part: _Part, dtype: np.dtype[Any], data: Bytes) -> None:
        reader, tensor = row.tensors[part.name]
        form = computed(tensor.dtype)
        stored = tensor.dtype if form is None else form.stored
        target = data[part.at * dtype.itemsize : (part.at + part.length) * dtype.itemsize]
        with naming(reader.path):
            if stored == dtype:
                reader.read_into(target, part.name, part.begin * stored.itemsize)
                return
            raw = np.empty(part.length * stored.itemsize, dtype=np.uint8)
            reader.read_into(raw, part.name, part.begin * stored.itemsize)
            with np.errstate(all="ignore"):
                target.view(dtype)[:] = raw.view(stored).astype(dtype)

    def _check_files(self) -> None:
        for row in self.rows:
            for reader in row.readers if row.wrong is None else ():
                reader.held.check()

    def _block(self, piece: _Piece, buffer: Bytes) -> Block:
        if piece.dtype == np.void:
            return Block((), ())
        width = piece.count * piece.dtype.itemsize
        rows = buffer[:, :width].view(piece.dtype)
        out = self._result[:width].view(piece.dtype)
        if piece.dtype not in DTYPES:
            good = [i for i, row in enumerate(self.rows[: self.n]) if self._drops or row.wrong is None]
            self._integers = rows[good]
            return Block((), ())
        self._done += rows.nbytes
        if self._progress is not None:
            self._progress("writing" if self._judging else "measuring", self._done, max(self.nbytes, self._done))
        return Block((Rows.of(rows),), (Rows.of(out[None]),)) if piece.count else Block((), ())

    # -- writing ---------------------------------------------------------------------------------------------------

    def write(self, piece: _Piece, block: Block) -> None:
        """Write the result of a piece, which the engine has put into the buffer."""
        assert self.writer is not None
        writer = self.writer()
        for part in piece.parts:
            tensor = self.out[part.name]
            if part.begin == 0:
                writer.begin(part.name, tensor)
            if piece.dtype == np.void:
                for data in self._copied(part.name):
                    writer.write(data)
                continue
            if piece.dtype in DTYPES:
                values = self._result[: piece.count * piece.dtype.itemsize].view(piece.dtype)
                values = values[part.at : part.at + part.length]
            else:
                columns = self._integers[:, part.at : part.at + part.length]
                values = self.combine(columns, tensor.dtype if tensor.dtype != piece.dtype else None)
            form = computed(tensor.dtype)
            wanted = tensor.dtype if form is None else form.stored
            with np.errstate(all="ignore"):
                data = np.ascontiguousarray(values if values.dtype == wanted else values.astype(wanted)).view(np.uint8)
            writer.write(data)
            if part.name in self.tied.values():
                if part.name not in self._spilled:
                    self._spilled[part.name] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the files)
                self._spilled[part.name].write(data.data)

    def _copied(self, name: str) -> Iterator[Bytes]:
        """Yield what a tensor is that is tied to another one, or that only the base has."""
        step = max(self._width, 1 << 20)
        if name in self.tied:
            file = self._spilled[self.tied[name]]
            file.seek(0)
            while chunk := file.read(step):
                yield np.frombuffer(chunk, dtype=np.uint8)
            return
        assert self.base is not None
        reader, tensor = self.base.tensors[name]
        if not reader.in_pieces(name):
            step = tensor.nbytes
        for begin in range(0, tensor.nbytes, step):
            data = np.empty(min(step, tensor.nbytes - begin), dtype=np.uint8)
            with naming(reader.path):
                reader.read_into(data, name, begin)
            yield data

    def close(self) -> None:
        """Let all files go."""
        for row in (*self.rows, *([] if self.base is None else [self.base])):
            row.close()
        for file in self._spilled.values():
            file.close()


def memory_of(text: str | int) -> int:
    """Return a number of bytes from one, or from a text such as "512MiB" or "2GB"."""
    if isinstance(text, int) and not isinstance(text, bool):
        number, unit = float(text), ""
    else:
        letters = str(text).strip()
        digits = letters.rstrip("KMGTiBkmgtb ")
        unit = letters[len(digits) :].strip().lower().removesuffix("b")
        try:
            number = float(digits)
        except ValueError:
            number = -1.0
    powers = {
        "": 1,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
        "t": 10**12,
        "ki": 2**10,
        "mi": 2**20,
        "gi": 2**30,
        "ti": 2**40,
    }
    if unit not in powers or not 0 < number * powers[unit] < 2**62:
        raise ValueError(f"expected a number of bytes such as 512MiB or 2GB; got {str(text)!r}")
    return int(number * powers[unit])


def aggregate_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    rule: Aggregator | str,
    /,
    *,
    out: str | os.PathLike[str],
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | Mapping[str, float] | None = None,
    weights_from: str | None = None,
    cap_weights: float | None = None,
    centre: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    scope: str = "update",
    dtype: Any = None,
    nonfinite: str = "error",
    bad: str = "error",
    memory: int | str = "1GiB",
    shard_size: int | str | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Info:
    """Aggregate update files into one file.

    Parameters
    ----------
    paths : path, or sequence of paths
        One a worker: a safetensors, npz or npy file, a file of ``torch.save`` (extra ``torch``; only its weights are
        loaded), the index of a checkpoint in shards, or a folder with one of these. A single folder is a pool, with an
        entry for each worker, in natural order of their names ("client-2" before "client-10").
    rule, f, delta, seed, only, exclude, scope, dtype, nonfinite, backend
        As for `robustkern.aggregate`; leaves are called by their tensors' names.
    out : path
        Written under a temporary name beside it, looked at, and renamed when complete; the suffix decides the kind.
    weights : array_like of shape (n,), or mapping of str to float, optional
        In the order of the paths, or by worker name; for a pool by name only.
    weights_from : str, optional
        Instead: the key of metadata under which the updates say how much they count, such as "num_samples". What they
        say is not trusted: `cap_weights` is 10 then, and a claim that is no weight makes the update a bad file.
    cap_weights : float, optional
        Cut each weight to so many times their median.
    centre : path, optional
        A file like the updates, for rules that measure from a centre.
    base : path, optional
        The model before this round, which supplies the tensors that take no part; the output lacks them otherwise.
    bad : {"error", "count"}
        What an update is that cannot be read, or has not the names, shapes and dtypes that at least n - f updates
        share: an error, or one of the f rows that may be Byzantine (`Info.bad`), so that no client can block a round.
    memory : int or str
        Most bytes of all buffers; larger tensors are read in pieces. Headers are not in it.
    shard_size : int or str, optional
        Write safetensors in shards of at most so many bytes, and their index.
    progress : callable, optional
        Called with what is being done, bytes read so far, and bytes of one read of all files.

    Returns
    -------
    Info

    Raises
    ------
    FileError
        If a file is corrupt, truncated, changes while it is read, or does not match the others, naming it. Nothing is
        written then.
    ImportError
        If a package is missing that a kind of file needs, naming it.
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `robustkern.aggregate`; rows are called by their files.

    Notes
    -----
    Reads of the files: as `robustkern.aggregate`. Between two passes nothing may change: files are held open, and every
    piece is compared with what was read before by a hash under a secret key. Integer and boolean tensors come back as
    column-wise lower median, for `mean` as their rounded mean. Metadata that at least n - f updates share are kept.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    pool = find_workers(given, Path(out))
    info, _ = aggregate_pool(
        pool,
        as_aggregator(rule),
        out=Path(out),
        f=f,
        delta=delta,
        weights=weights,
        weights_from=weights_from,
        cap_weights=cap_weights,
        centre=centre,
        seed=seed,
        choice=Choice.of(only, exclude, dtype),
        base=base,
        scope=scope,
        nonfinite=nonfinite,
        bad=bad,
        memory=memory_of(memory),
        shard_size=None if shard_size is None else memory_of(shard_size),
        backend=backend,
        progress=progress,
    )
    return info


def aggregate_pool(
    pool: Pool,
    rule: Aggregator,
    *,
    out: Path,
    f: int | None,
    delta: float | None,
    weights: ArrayLike | Mapping[str, float] | None,
    weights_from: str | None,
    cap_weights: float | None,
    centre: str | os.PathLike[str] | None,
    seed: int | None,
    choice: Choice,
    base: str | os.PathLike[str] | None,
    scope: str,
    nonfinite: str,
    bad: str,
    memory: int,
    shard_size: int | None,
    backend: str,
    progress: Progress | None,
) -> tuple[Info, Weights]:
    """Aggregate workers that were found; see `aggregate_files`. Also return what they weigh."""
    if bad not in ("error", "count"):
        raise ValueError(f"bad must be 'error' or 'count'; got {bad!r}")
    if scope not in ("update", "leaf"):
        raise ValueError(f"scope must be 'update' or 'leaf'; got {scope!r}")
    mean = isinstance(rule, Mean)
    if mean and bad == "count":
        raise ValueError(f"{rule}: bad='count' needs a rule that tolerates bad rows (use bad='error', or another rule)")
    others = [Path(path) for path in (centre, base) if path is not None]
    hold = sum(len(worker.files) for worker in pool.workers) + len(others) <= _descriptors()
    with contextlib.ExitStack() as stack:
        rows = [_Row.of(worker, hold) for worker in pool.workers]
        for row in rows:
            stack.callback(row.close)
        beside = [_Row.of(Worker(str(path), path, (path,)), hold) for path in others]
        for row in beside:
            stack.callback(row.close)
            if row.wrong is not None:
                raise FileError(row.wrong)
        weighed = _weights(pool, rows, weights, weights_from, cap_weights, bad)
        within = limits(rule, len(rows), lambda i: rows[i].name, f, delta, weighed.used)
        files = Files(
            [*rows, *(beside[:1] if centre is not None else [])],
            len(rows),
            centre is not None,
            beside[-1] if base is not None else None,
            replace(choice, integers=mean and choice.dtype is not None),
            within,
            bad,
            nonfinite == "drop",
            scope == "leaf",
            memory,
            progress,
        )
        stack.callback(files.close)
        inputs = [reader.path for row in (*rows, *beside) for reader in row.readers]
        output = Output(out, files.out, _shared_metadata(rows, within), inputs, shard_size)
        opened: list[Writer] = []

        def writer() -> Writer:
            if not opened:
                opened.append(stack.enter_context(output.open()))
            return opened[0]

        files.writer = writer
        options = {"delta": delta, "f": f, "weights": weighed.used, "seed": seed}
        info = _run(rule, files, scope, options | {"nonfinite": nonfinite, "backend": backend})
        files.check_bad()
        return replace(info, bad=files.bad_rows, integers=len(files.integers)), weighed


def _run(rule: Aggregator, files: Files, scope: str, options: dict[str, Any]) -> Info:
    """Run the rule on all tensors at once, or on each."""
    if scope == "update":
        info = run(rule, files.source(), **options)
        assert info is not None
        return info
    leaves: dict[str, Info] = {}
    for name in files.out:
        if name in files.floats:
            found = run(rule, files.source({name}), **options)
            assert found is not None
            leaves[name] = found
        else:
            source = files.source({name})
            source.combine = combining(rule, files.within)
            for _ in source.results():
                pass
    return joined(leaves)


class Weights(NamedTuple):
    """What workers say that they weigh, and what is used; None where there are none."""

    claimed: list[float] | None = None
    used: list[float] | None = None


def _weights(
    pool: Pool,
    rows: Sequence[_Row],
    weights: ArrayLike | Mapping[str, float] | None,
    weights_from: str | None,
    cap: float | None,
    bad: str,
) -> Weights:
    if cap is not None and not cap >= 1:
        raise ValueError(f"cap_weights must be at least 1, so many times the median; got {cap}")
    if weights is not None and weights_from is not None:
        raise ValueError("weights and weights_from say the same thing (pass one of them)")
    if weights_from is not None:
        said: list[float | None] = []
        for row in rows:
            said.append(None)
            if row.wrong is None:
                try:
                    said[-1] = claimed(row.metadata, weights_from)
                except ValueError as error:
                    row.wrong = f"{row.readers[0].path}: {error}"
        if bad == "error":
            for row in rows:
                if row.wrong is not None:
                    raise FileError(row.wrong)
        known = [value for value in said if value is not None]
        if not known:
            raise FileError(f"no update can be used; the first: {rows[0].wrong}")
        middle = statistics.median(known)
        claims = [middle if value is None else value for value in said]
        return Weights(claims, capped(claims, 10.0 if cap is None else cap))
    if weights is None:
        if cap is not None:
            raise ValueError("cap_weights is given, but no weights")
        return Weights()
    if isinstance(weights, Mapping):
        claims = named_weights(weights, pool.workers)
    elif pool.folder:
        raise ValueError(
            "weights: a list of weights does not say which worker of a folder each is for (pass them by name, or "
            "weights_from=)"
        )
    else:
        claims = [float(value) for value in np.asarray(weights, dtype=np.float64).reshape(-1)]
    if len(claims) != len(rows):
        raise ValueError(f"weights: expected one for each of the {len(rows)} workers; got {len(claims)}")
    return Weights(claims, claims if cap is None else capped(claims, cap))


def _shared_metadata(rows: Sequence[_Row], within: Limits) -> dict[str, str]:
    """Return the texts of metadata that enough updates share; no single worker decides them."""
    votes = Counter((k, v) for row in rows for k, v in row.metadata.items() if isinstance(v, str))
    found = {}
    for (key, text), _ in votes.items():
        if within.tolerates(np.array([row.metadata.get(key) != text for row in rows])) and key != MARK:
            found[key] = text
    return found if sum(len(k) + len(v) for k, v in found.items()) <= 1 << 20 else {}

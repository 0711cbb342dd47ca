"""The rows of files: the same part of a tensor of all of them at a time, in memory of a bounded size.

By the column-block law a file read piece by piece is the same thing as leaves of a pytree, so every rule works. What
was judged is what is added: whoever changes a file between the passes is found out.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import (
    DTYPES,
    Block,
    PlainLeaf,
    Rows,
    RowsInFiles,
    Stretches,
    Undivided,
    address_of,
    one_segment,
)
from robustkern.engine import Limits
from robustkern.errors import plain, shown
from robustkern.files.digest import Digest
from robustkern.files.formats import FileError, Reader, Tensor, naming, open_reader
from robustkern.files.output import Target, Writer, in_order
from robustkern.files.workers import Worker
from robustkern.inputs.leaves import Choice, computed
from robustkern.rules.base import Aggregator
from robustkern.rules.mean import Mean

__all__ = ["Files", "Progress", "Row", "Source", "check_bad_option", "descriptors", "require_few"]

Progress = Callable[[str, int, int], None]
Bytes = NDArray[np.uint8]

#: Bytes of a piece of all rows, which the kernels then find in the caches. 20 files of 100 MB from the page cache, two
#: cores with 32 MB of shared cache, median, in reads of the files on one thread: 3.6 with 2 MiB, 2.2 with 8 MiB, 2.3
#: with 16 MiB; with threads that read the next pieces meanwhile 4.2, 2.3 and 2.1, as they keep the kernels' threads
#: waiting for each other. Where each thread reads what it will combine, on Zen 5: 1.3 to 1.4 with 4, 8 and 16 MiB; and
#: where it does so a step at a time, on an Intel: 1.09 with 8 MiB, 0.92 with 16 and 32, 1.0 with 64. From a disk the
#: system reads ahead.
PIECE_BYTES = 16 << 20
LEAST_PIECE = 1 << 14
#: A line of the caches. Copies from a file take up to six times as long where they go to a few bytes further into a
#: page than they come from (2 GB: 0.16 s, to 1 to 16 bytes further 0.9 to 1.0 s, from 32 bytes on 0.18 s).
LINE, PAGE = 64, 4096
#: Of a piece a thread reads so many bytes of all rows before it goes on with them, which its core's caches hold. As
#: above, on an Intel with 2 MiB a core: 1.0 with 256 KiB and 2 MiB, 0.95 to 0.98 with 512 KiB and 1 MiB.
STEP_BYTES = 1 << 20
STEPS = PIECE_BYTES // STEP_BYTES
UNREAD = np.uint64(2**64 - 1)  # no hash


# ---- one worker's files ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """A worker, or another file like the updates, that was opened."""

    name: str
    readers: Sequence[Reader] = ()
    tensors: dict[str, tuple[Reader, Tensor]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    wrong: str | None = None
    missing: ImportError | None = None
    lost: str | None = None  # why its integers could not be read, where its floats could

    @classmethod
    def of(cls, worker: Worker, hold: bool) -> Row:
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
        except (FileError, ImportError, MemoryError) as error:
            row.wrong = plain(str(error) or "it takes more memory than there is", 1000)
            row.missing = error if isinstance(error, ImportError) else None
            for reader in opened:
                reader.held.close()
            opened = []
        row.readers = opened
        return row

    def check(self) -> None:
        """Raise what is wrong with it."""
        if self.missing is not None:
            raise self.missing
        if self.wrong is not None:
            raise FileError(self.wrong)

    def close(self) -> None:
        """Let its files go."""
        for reader in self.readers:
            reader.held.close()


def check_bad_option(bad: str, rule: Aggregator) -> None:
    """Raise where nobody can say what updates that cannot be used are."""
    if bad not in ("error", "count"):
        raise ValueError(f"bad must be 'error' or 'count'; got {bad!r:.80}")
    if bad == "count" and isinstance(rule, Mean):
        raise ValueError(f"{rule}: bad='count' needs a rule that tolerates bad rows (use bad='error', or another rule)")


def require_few(within: Limits, reasons: Sequence[str | None]) -> None:
    """Raise where more updates cannot be used, for the reasons that some of n have, than may be bad."""
    wrong = [reason for reason in reasons if reason is not None]
    if wrong and not within.tolerates(np.array([reason is not None for reason in reasons])):
        limit = "fewer than half" if within.f is None else f"f={within.f}"
        raise FileError(
            f"{len(wrong)} of {len(reasons)} updates cannot be used, more than {limit}; the first: {wrong[0]}"
        )


def descriptors() -> int:
    """How many files may be held open: half of what the process may have."""
    try:
        import resource
    except ImportError:  # no Unix
        return 256
    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


# ---- pieces ----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Values of a tensor in a piece: which, and where in a row of the buffer."""

    name: str
    begin: int
    length: int
    at: int


@dataclass
class Piece:
    """Some values of all rows that are read, computed and written at once; all of one dtype."""

    dtype: np.dtype[Any]  # that is computed in; integers are their own
    parts: list[Part] = field(default_factory=list)
    count: int = 0


@dataclass(eq=False)
class Source(Undivided):
    """The rows of some tensors, as the engine wants them."""

    files: Files
    pieces: Sequence[Piece]
    n: int
    d: int
    dtypes: set[np.dtype[Any]]
    has_centre: bool
    device: str = "cpu"
    plain: Sequence[PlainLeaf] = ()
    combine: Any = None  # a `Combine`

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
        self.files.begin()
        for piece, block in self.files.read(self.pieces, judged=True):
            if piece.dtype in DTYPES:
                yield block
            self.files.write(piece, block)


# ---- all files -------------------------------------------------------------------------------------------------


class Files:
    """The tensors of all workers, read piece by piece, and the results of the pieces, written one after the other.

    Parameters
    ----------
    rows : sequence of Row
        The workers, perhaps a centre, and perhaps a model that supplies what takes no part.
    n : int
        How many of them are workers.
    choice : Choice
        Which tensors take part, and in what dtype.
    within : Limits
        Which rows may be bad.
    bad : {"error", "count"}
        What a file is that cannot be used.
    apart : bool
        Whether no two tensors share a piece.
    memory : int
        Most bytes of all buffers.
    progress : callable, optional
        See `aggregate_files`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        n: int,
        has_centre: bool,
        base: Row | None,
        choice: Choice,
        within: Limits,
        bad: str,
        apart: bool,
        memory: int,
        progress: Progress | None,
    ) -> None:
        self._apart = apart
        self.rows, self.n, self.has_centre, self.base = rows, n, has_centre, base
        self.choice, self.within, self.bad, self.memory = choice, within, bad, memory
        self.combine: Any = None  # a `Combine`
        self._progress, self._done = progress, 0
        self._digest = Digest()
        self._digests: dict[tuple[str, int], NDArray[np.uint64]] = {}
        self._stretches: dict[str, NDArray[np.int64] | None] = {}
        self._settle_structure()
        self._cut()
        self.target: Target | None = None
        self._spool: IO[bytes] | None = None
        self._spilled: dict[str, IO[bytes]] = {}

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
                row.check()
        if not votes:
            raise FileError(f"no update can be used; the first: {self.rows[0].wrong}")
        shared = votes.most_common(1)[0][0]
        model = self.rows[forms.index(shared)]
        self.tensors = {name: model.tensors[name][1] for name, _, _ in shared}
        self.choice.check(dict.fromkeys(name for row in (model, *self.rows) for name in row.tensors))
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

    def _difference(self, row: Row, model: Row) -> str:
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
        require_few(self.within, [row.wrong or row.lost for row in self.rows[: self.n]])

    @property
    def bad_rows(self) -> dict[str, str]:
        """Workers whose files cannot be used, and why."""
        found = {row.name: row.wrong or row.lost for row in self.rows[: self.n]}
        return {name: reason for name, reason in found.items() if reason is not None}

    def _tied(self) -> dict[str, str]:
        """Tensors that are one with another in all rows but some that may be bad: by name, that one's name."""
        names: dict[str, list[tuple[Any, ...]]] = {}
        good = [row for row in self.rows[: self.n] if row.wrong is None]
        for name in in_order(self.tensors):
            places = []
            for row in good:
                reader, tensor = row.tensors[name]
                # What is empty is nothing that two names could share.
                place = reader.place_of(name) if tensor.size else name
                places.append((id(reader), place, tensor.shape, tensor.dtype))
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
        self._twins = set(self.tied.values())
        self.floats = {k: t for k, t in self.tensors.items() if computed(t.dtype) is not None and k not in self.tied}
        self.integers = [k for k, t in self.tensors.items() if computed(t.dtype) is None]
        rows, self.pieces = len(self.rows), []
        bytes_each, step = max(PIECE_BYTES // rows, LEAST_PIECE), max(STEP_BYTES // rows // PAGE * PAGE, PAGE)
        bytes_each = min(bytes_each, STEPS * step, self.memory // (rows + 4))
        if bytes_each < 64:
            raise ValueError(f"memory: {self.memory:,} bytes are too few for {rows} rows (allow {64 * (rows + 4):,})")
        piece: Piece | None = None
        for name in self.out:
            source = self.tensors.get(name)
            if source is None or name in self.tied:
                self.pieces.append(Piece(np.dtype(np.void), [Part(name, 0, 0, 0)]))
                piece = None
                continue
            form = self.choice.form(source.dtype)
            dtype, factor = (source.dtype, 1) if form is None else (form.dtype, form.factor)
            widest = max(dtype.itemsize, *(stored.itemsize for stored in self._stored(name)))
            limit = bytes_each // LINE * LINE // widest  # of values
            size, begin = source.size * factor, 0
            whole = self._needs_whole(name, size * dtype.itemsize > self.memory // (rows + 4))
            alone = whole or self._apart or name in self._twins
            while True:
                if piece is None or piece.dtype != dtype or alone or piece.count >= limit:
                    piece = Piece(dtype)
                    self.pieces.append(piece)
                count = size - begin if whole else min(size - begin, limit - piece.count)
                piece.parts.append(Part(name, begin, count, piece.count))
                piece.count += count
                begin += count
                if begin >= size:
                    break
            if alone:
                piece = None
        largest = max((p.count * p.dtype.itemsize for p in self.pieces), default=0)
        self._width = -(-largest // LINE) * LINE + LINE
        self._result = np.empty(self._width, dtype=np.uint8)
        memory = np.empty(rows * (self._width + 2 * LINE) + 2 * PAGE, dtype=np.uint8)
        begin = -address_of(memory) % LINE
        self._buffer = memory[begin : begin + rows * self._width].reshape(rows, self._width)
        first = address_of(self._buffer)
        self._first = np.arange(first, first + rows * self._width, self._width, dtype=np.uint64)
        # What is on the way into kernels takes the place of the buffer.
        begin = -address_of(memory) % PAGE
        self._memory = address_of(memory) + begin, len(memory) - begin
        self._step = max(min(step, largest // 4 // PAGE * PAGE), PAGE)
        self._steps_fit = rows * (self._step + 2 * LINE) + PAGE <= min(self._memory[1], 2 * STEP_BYTES)
        self.nbytes = sum(p.count * p.dtype.itemsize for p in self.pieces if p.dtype in DTYPES) * rows

    def _needs_whole(self, name: str, too_large: bool) -> bool:
        """Tell whether a row's tensor cannot be read in pieces; where it is too large to be read whole, it is bad."""
        whole = False
        for row in self.rows:
            if row.wrong is None and not row.tensors[name][0].in_pieces(name):
                whole = True
                if too_large:
                    error = (
                        f"{row.readers[0].path}: tensor {shown(name)} has its axes in another order, and is too large "
                        "to be read whole (save numpy.ascontiguousarray(x), or allow more memory)"
                    )
                    if self.bad == "error" or (row is self.rows[-1] and self.has_centre):
                        raise FileError(error)
                    row.wrong, whole = error, False
                    self.check_bad()
        return whole

    def _stored(self, name: str) -> set[np.dtype[Any]]:
        """Dtypes of the values of a tensor in the files."""
        dtypes = {row.tensors[name][1].dtype for row in self.rows if row.wrong is None}
        return {form.stored if (form := computed(dtype)) else dtype for dtype in dtypes}

    def source(self, names: set[str] | None = None) -> Source:
        """Return the rows of some tensors, which are pieces of their own then; None: all that take part."""
        pieces = [p for p in self.pieces if names is None or p.parts[0].name in names]
        floating = [p for p in pieces if p.dtype in DTYPES]
        d = sum(p.count for p in floating)
        return Source(self, pieces, self.n, d, {p.dtype for p in floating}, self.has_centre)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, pieces: Sequence[Piece], judged: bool) -> Iterator[tuple[Piece, Block]]:
        """Yield pieces of all rows.

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
        for piece in pieces:
            rows = None if piece.dtype == np.void or not piece.count else self._rows(piece, judged)
            yield piece, self._block(piece, rows)
        if judged:
            self._check_files()

    _judging = False

    def _rows(self, piece: Piece, judged: bool) -> Rows:
        """Return the rows of a piece, in memory, or in files where kernels can read them."""
        load, offsets = functools.partial(self._load, piece, judged), one_segment(piece.count)
        if not self._is_stretch(piece) or not self._steps_fit:
            return Rows(load(), offsets, piece.dtype, self._buffer)
        by = functools.partial(self._read_by, piece, judged)
        return RowsInFiles(len(self.rows), offsets, piece.dtype, self._buffer, load, by)

    def _is_stretch(self, piece: Piece) -> bool:
        """Tell whether a piece is one stretch of one open file in all rows: then one call reads it."""
        name = piece.parts[0].name
        if len(piece.parts) > 1 or piece.dtype not in DTYPES or self._digest.compiled is None:
            return False
        if any(row.wrong is not None for row in self.rows):
            return False
        if name not in self._stretches:
            found = [row.tensors[name] for row in self.rows]
            offsets = [reader.offset_of(name) for reader, _ in found]
            files = [reader.held.fileno for reader, _ in found]
            lies = self._stored(name) == {piece.dtype}
            if not lies or None in offsets or None in files:
                self._stretches[name] = None
            else:
                self._stretches[name] = np.array([files, offsets], dtype=np.int64)
        return self._stretches[name] is not None

    def _load(self, piece: Piece, judged: bool) -> NDArray[np.uint64]:
        """Read a piece into the buffer; return where its rows are."""
        compiled, at = self._digest.compiled, self._first

        def read(where: Stretches) -> bool:
            nonlocal at
            assert compiled is not None
            further = (self._first - where.places.view(np.uint64)) % PAGE
            at = self._first + np.where((further > 0) & (further < LINE), LINE, 0).astype(np.uint64)
            return compiled.read_rows(where, at)

        if not self._is_stretch(piece) or not self._read_by(piece, judged, read):
            at = self._first
            for i in range(len(self.rows)):
                self._read_row(i, piece, self._buffer[i, : piece.count * piece.dtype.itemsize], judged)
        return at[None]

    def _read_by(self, piece: Piece, judged: bool, read: Callable[[Stretches], bool]) -> bool:
        """Have a piece read that is one stretch of each file; false where something is wrong with a row."""
        part, stretch = piece.parts[0], self._stretches[piece.parts[0].name]
        assert stretch is not None
        key, width = (part.name, part.begin), piece.count * piece.dtype.itemsize
        before = self._digests.get(key)
        secret = self._digest.key if before is not None or not judged else None
        found = np.empty((-(-width // self._step), len(self.rows)), dtype=np.uint64)
        places = stretch[1] + part.begin * piece.dtype.itemsize
        if not read(Stretches(stretch[0], places, width, self._step, secret, self._digest.point, found, *self._memory)):
            return False
        if before is not None:
            changed = (found != before) & (before != UNREAD)
            if changed.any():
                raise self._changed(int(changed.any(axis=0).argmax()))
        elif secret is not None:
            self._digests[key] = found
        return True

    def _changed(self, row: int) -> FileError:
        path = self.rows[row].readers[0].path
        return FileError(f"{path}: changed while it was being read (updates must stay until the end)")

    def _read_row(self, i: int, piece: Piece, data: Bytes, judged: bool) -> None:
        row, floating = self.rows[i], piece.dtype in DTYPES
        key = (piece.parts[0].name, piece.parts[0].begin)
        digests = self._digests.get(key)
        known = digests is not None and bool((digests[:, i] != UNREAD).any())
        try:
            if row.wrong is None and (floating or row.lost is None):
                self._read_parts(row, piece, data)
        except FileError as error:
            if self.bad == "error" or known or i >= self.n:
                raise
            if not floating:  # what was judged of it stays
                row.lost = str(error)
                return
            row.wrong = str(error)
        if row.wrong is not None:
            if floating:
                data.view(piece.dtype)[:] = np.nan
            return
        if not floating or (judged and not known):
            return
        found = np.array([self._digest(data[k : k + self._step]) for k in range(0, len(data), self._step)], np.uint64)
        if digests is None:
            digests = self._digests[key] = np.full((len(found), len(self.rows)), UNREAD)
        if known and (found != digests[:, i]).any():
            raise self._changed(i)
        digests[:, i] = found

    def _read_parts(self, row: Row, piece: Piece, data: Bytes) -> None:
        """Fill a row of a piece; what lies in one stretch of a file is read in one go."""
        dtype = piece.dtype
        held, begin, first, end = None, 0, 0, 0  # bytes of the file from `begin` on go to [first, end) of the row
        for part in piece.parts:
            reader, tensor = row.tensors[part.name]
            form = computed(tensor.dtype)
            stored = tensor.dtype if form is None else form.stored
            at, size = part.at * dtype.itemsize, part.length * dtype.itemsize
            offset = reader.offset_of(part.name) if stored == dtype else None
            if offset is not None:
                offset += part.begin * dtype.itemsize
                if held is reader.held and offset - begin == at - first == end - first:
                    end = at + size
                    continue
                if held is not None:
                    held.read_into(data[first:end], begin)
                held, begin, first, end = reader.held, offset, at, at + size
                continue
            target, place = data[at : at + size], part.begin * stored.itemsize
            with naming(reader.path):
                if stored == dtype:
                    reader.read_into(target, part.name, place)
                    continue
                raw = np.empty(part.length * stored.itemsize, dtype=np.uint8)
                reader.read_into(raw, part.name, place)
            with np.errstate(all="ignore"):
                target.view(dtype)[:] = raw.view(stored).astype(dtype)
        if held is not None:
            held.read_into(data[first:end], begin)

    def _check_files(self) -> None:
        for row in self.rows:
            for reader in row.readers if row.wrong is None else ():
                reader.held.check()

    def _block(self, piece: Piece, rows: Rows | None) -> Block:
        if piece.dtype == np.void:
            return Block((), ())
        width = piece.count * piece.dtype.itemsize
        out = self._result[:width].view(piece.dtype)
        if piece.dtype not in DTYPES:
            columns = self._buffer[:, :width].view(piece.dtype)
            good = np.flatnonzero([row.wrong is None and row.lost is None for row in self.rows[: self.n]])
            self._counting = None if len(good) == self.n else good
            self._integers = columns[: self.n] if self._counting is None else columns[good]
            return Block((), ())
        self._done += width * len(self.rows)
        if self._progress is not None:
            self._progress("writing" if self._judging else "measuring", self._done, max(self.nbytes, self._done))
        if rows is None:
            return Block((), ())
        return Block((rows,), (Rows.of(out[None]),))

    # -- writing ---------------------------------------------------------------------------------------------------

    def write(self, piece: Piece, block: Block) -> None:
        """Write the result of a piece, which the engine has put into the buffer."""
        assert self.target is not None
        writer: Writer = self if self._apart else self.target.writer()
        for part in piece.parts:
            tensor = self.out[part.name]
            if part.begin == 0:
                writer.start(part.name, tensor)
                if part.name in self._twins:
                    self._spilled.setdefault(part.name, tempfile.TemporaryFile()).seek(0)  # noqa: SIM115
            if piece.dtype == np.void:
                for data in self._copied(part.name):
                    writer.put(data)
                continue
            if piece.dtype in DTYPES:
                values = self._result[: piece.count * piece.dtype.itemsize].view(piece.dtype)
                values = values[part.at : part.at + part.length]
            else:
                columns = self._integers[:, part.at : part.at + part.length]
                wanted = tensor.dtype if tensor.dtype != piece.dtype else None
                values = self.combine(columns, wanted, self._counting)
            form = computed(tensor.dtype)
            wanted = tensor.dtype if form is None else form.stored
            with np.errstate(all="ignore"):
                data = np.ascontiguousarray(values if values.dtype == wanted else values.astype(wanted)).view(np.uint8)
            writer.put(data)
            if part.name in self._twins:
                self._spilled[part.name].write(data.data)

    # Leaf by leaf, a leaf's result waits for the rule's last word: it may begin again without shared infinities.

    def begin(self) -> None:
        """Begin to write the results, or to write them again."""
        assert self.target is not None
        if not self._apart:
            self.target.restart()
        elif self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the files)

    def together(self) -> None:
        """Write all leaves as they come."""
        self._apart = False

    def start(self, name: str, tensor: Tensor) -> None:
        """Go on to a leaf that waits."""
        assert self._spool is not None
        self._spool.seek(0)
        self._waiting = name, tensor

    def put(self, data: Bytes) -> None:
        """Let bytes of it wait."""
        assert self._spool is not None
        self._spool.write(data.data)

    def commit(self) -> None:
        """Write the leaf that waits."""
        assert self._spool is not None
        assert self.target is not None
        name, tensor = self._waiting
        writer, left = self.target.writer(), tensor.nbytes
        writer.start(name, tensor)
        self._spool.seek(0)
        while left:
            data = self._spool.read(min(left, 1 << 20))
            writer.put(np.frombuffer(data, dtype=np.uint8))
            left -= len(data)

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
        for file in (*self._spilled.values(), *([] if self._spool is None else [self._spool])):
            file.close()

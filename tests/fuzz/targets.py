"""What is fuzzed: for each target, a function of bytes that raises where a promise is broken, and seeds that it takes.

The promises: bytes that somebody else wrote are read as they are or end in the one kind of error that is documented,
whatever they say; what is read is what another library reads; and one worker's file never ends a round of four.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import robustkern as rk
from robustkern.distributed.dcp import Folder
from robustkern.files.formats import FileError, Reader, naming, open_reader
from robustkern.rules import text
from robustkern.training import session
from robustkern.training.settings import Settings

#: Values of a tensor that are read: a header may promise more than a target can hold.
MOST_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Target:
    """`run` returns whether the bytes were understood; `seeds` are, all of them; `words` are what mutations insert."""

    run: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    words: tuple[str, ...] = ()


# ---- folders and the parts of an input -------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


def joined(*parts: bytes) -> bytes:
    """Return an input of several files: each but the last after its length."""
    return b"".join(struct.pack("<H", len(part)) + part for part in parts[:-1]) + parts[-1]


def cut(data: bytes, count: int) -> list[bytes]:
    """Return the files of an input, whatever its lengths say."""
    parts = []
    for _ in range(count - 1):
        (length,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
        parts.append(data[2 : 2 + length])
        data = data[2 + length :]
    return [*parts, data]


# ---- files ---------------------------------------------------------------------------------------------------------

UPDATE = {
    "layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layer.bias": np.array([0.5, -0.5, 2.0], dtype=np.float16),
    "batches": np.array(7, dtype=np.int64),
}


def _safetensors(update: dict[str, np.ndarray], **metadata: str) -> bytes:
    return safetensors.numpy.save(update, metadata=metadata or None)


def _npz(update: dict[str, np.ndarray], write: Callable[..., None] = np.savez) -> bytes:
    file = io.BytesIO()
    write(file, **update)
    return file.getvalue()


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _stored_twice() -> bytes:
    """Return an archive with a member behind a comment and extra fields."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("a.npy")
        info.extra, info.comment = b"\x01\x00\x04\x00abcd", b"a comment"
        archive.writestr(info, _npy(np.ones(3, dtype=np.float32)))
        archive.comment = b"another"
    return file.getvalue()


def _torch(update: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(values) for name, values in update.items()}, file)
    return file.getvalue()


def _values(reader: Reader) -> dict[str, np.ndarray | None]:
    """Read every tensor, in two parts where that can be; None for one that promises too much."""
    found: dict[str, np.ndarray | None] = {}
    for name, tensor in reader.tensors.items():
        if tensor.nbytes > MOST_BYTES:
            found[name] = None
            continue
        data = np.empty(tensor.nbytes, dtype=np.uint8)
        half = tensor.nbytes // 2 if reader.in_pieces(name) else 0
        reader.read_into(data[:half], name, 0)
        reader.read_into(data[half:], name, half)
        found[name] = data.view(tensor.dtype).reshape(tensor.shape)
    return found


def _read(folder: Path, suffix: str, data: bytes) -> dict[str, np.ndarray | None] | None:
    """Return what a file holds; None where it is refused."""
    path = folder / f"update{suffix}"
    path.write_bytes(data)
    try:
        reader = open_reader(path)
    except FileError as error:
        _check_message(str(error))
        return None
    try:
        with naming(path):
            return _values(reader)
    except FileError:
        return None
    finally:
        reader.held.close()


def _check_message(said: str) -> None:
    assert len(said) <= 1000
    assert said.isprintable()


def _same(ours: dict[str, np.ndarray | None], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        if values is not None:
            assert values.shape == theirs[name].shape
            assert values.tobytes() == np.ascontiguousarray(theirs[name]).tobytes()


def _safetensors_file(data: bytes) -> bool:
    if data[:1] == b"{":  # a header whose length is right, which mutations seldom are
        header, values = data.partition(b"\n")[::2]
        data = struct.pack("<Q", len(header)) + header + values
    with _folder() as folder:
        ours = _read(folder, ".safetensors", data)
    if ours is not None:
        try:
            theirs = safetensors.numpy.load(data)
        except Exception:  # what it cannot read: dtypes that NumPy lacks, or headers that it finds too large
            return True
        _same(ours, theirs)
    return ours is not None


def _npz_file(data: bytes) -> bool:
    with _folder() as folder:
        ours = _read(folder, ".npz", data)
    if ours is not None:
        with np.load(io.BytesIO(data)) as archive:
            _same(ours, {name: archive[name] for name in ours if ours[name] is not None} | _absent(ours))
    return ours is not None


def _npy_file(data: bytes) -> bool:
    with _folder() as folder:
        ours = _read(folder, ".npy", data)
    if ours is not None and (values := next(iter(ours.values()))) is not None:
        theirs = np.load(io.BytesIO(data))
        assert values.shape == theirs.shape
        assert values.tobytes() == np.ascontiguousarray(theirs).tobytes()
    return ours is not None


def _torch_file(data: bytes) -> bool:
    with _folder() as folder:
        ours = _read(folder, ".pt", data)
    if ours is not None:
        theirs = torch.load(io.BytesIO(data), weights_only=True)
        theirs = theirs if isinstance(theirs, dict) else {"array": theirs}
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor) and ours.get(str(name)) is not None and value.dtype != torch.bfloat16:
                _same({"it": ours[str(name)]}, {"it": value.numpy()})
    return ours is not None


def _absent(ours: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    return {name: np.empty(0) for name, values in ours.items() if values is None}


def _round(data: bytes) -> bool:
    """Three honest workers and one whose file is the input: the round ends, and within what honest values span."""
    suffix = (".safetensors", ".npz")[data[0] & 1] if data else ".npz"
    with _folder() as folder:
        pool = folder / "pool"
        pool.mkdir()
        for i in range(3):
            honest = {name: np.asarray(values + values.dtype.type(i)) for name, values in UPDATE.items()}
            (pool / f"client-{i}.safetensors").write_bytes(_safetensors(honest))
        (pool / f"hostile{suffix}").write_bytes(data[1:])
        out = folder / "merged.safetensors"
        info = rk.aggregate_files(pool, "median", out=out, f=1, bad="count")
        for name, values in safetensors.numpy.load_file(out).items():
            assert (values >= UPDATE[name]).all()
            assert (values <= UPDATE[name] + UPDATE[name].dtype.type(2)).all()
    return not info.bad


FILE_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "safetensors": lambda: [
        _safetensors(UPDATE, num_samples="12"),
        _safetensors({"empty": np.empty((0, 3), dtype=np.float64), "flag": np.array([True, False])}),
        b'{"x":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}\nabcd',
    ],
    "npz": lambda: [_npz(UPDATE), _npz(UPDATE, np.savez_compressed), _stored_twice()],
    "npy": lambda: [
        _npy(UPDATE["layer.weight"]),
        _npy(np.asfortranarray(UPDATE["layer.weight"].astype(np.float64))),
        _npy(np.array(3, dtype=np.int8)),
    ],
    "torch": lambda: [_torch(UPDATE)],
    "round": lambda: [b"\0" + _safetensors(UPDATE), b"\1" + _npz(UPDATE)],
}


# ---- rule text -----------------------------------------------------------------------------------------------------


def _rule(data: bytes) -> bool:
    try:
        written = data.decode()
        rule = text.parse(written)
    except ValueError:  # of either
        return False
    again = text.parse(str(rule))
    assert again == rule or again != again, (written, str(rule))
    assert str(again) == str(rule)
    return True


def _rule_seeds() -> list[bytes]:
    return [
        *(
            name.encode()
            for name in sorted(text.known_names())
            if name in text.available_rules() and _rule(name.encode())
        ),
        b"nnm | ctma(geometric_median)",
        b"bucketing(size=2) | nnm | trimmed_mean",
        b"multi_krum(m=3)",
        b"ctma('median')",
    ]


# ---- checkpoints ---------------------------------------------------------------------------------------------------

SETTINGS = Settings(rounds=20)


def _training(data: bytes) -> bool:
    log, checkpoint = cut(data, 2)
    with _folder() as folder:
        (folder / session.LOG).write_bytes(log)
        if checkpoint:
            (folder / session.CHECKPOINT).write_bytes(checkpoint)
        try:
            session.last_checkpoint(SETTINGS, folder)
        except ValueError:
            return False
    return True


def _training_seeds() -> list[bytes]:
    settings = json.dumps(SETTINGS.as_dict())
    line = {"round": 1, "accuracy": 0.5, "loss": 1.5, "lost": {}, "seconds": {"total": 1.0}}
    log = f"{json.dumps({'settings': SETTINGS.as_dict()})}\n{json.dumps(line)}\n".encode()
    state = {name: np.zeros((2, 3), dtype=np.float32) for name in ("x", "momenta", "previous")}
    facts = {"settings": settings, "round": "1", "lost": '{"2": "gone"}'}
    return [joined(log, b""), joined(log, _safetensors(state | {"ids": np.arange(2)}, **facts))]


def _dcp(data: bytes) -> bool:
    index, piece = cut(data, 2)
    with _folder() as folder, ExitStack() as files:
        (folder / ".metadata").write_bytes(index)
        (folder / "__0_0.distcp").write_bytes(piece)
        try:
            found = Folder(folder, files)
            for name, (shape, dtype) in found.tensors.items():
                if np.prod(shape, dtype=float) * dtype.itemsize <= MOST_BYTES:
                    found.read(name, 0, shape[0] if shape else 1)
        except ValueError:
            return False
    return True


def _dcp_seeds() -> list[bytes]:
    with _folder() as folder:
        save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
        return [joined((folder / ".metadata").read_bytes(), (folder / "__0_0.distcp").read_bytes())]


def _rule_words() -> tuple[str, ...]:
    fields = {field.name for rule in text.registered().values() for field in dataclasses.fields(rule)}
    return (
        *sorted(text.known_names()),
        *(f"{name}=" for name in sorted(fields)),
        " | ",
        "(",
        ")",
        "None",
        "1e400",
        "-1",
    )


HEADER_WORDS = (
    '"dtype":',
    '"shape":',
    '"data_offsets":',
    "__metadata__",
    "F32",
    "F8_E4M3",
    "BOOL",
    "[0,0]",
    "-1",
    "1e9",
)
NPY_WORDS = (
    "'descr': ",
    "'fortran_order': ",
    "'shape': ",
    "'<f4'",
    "'|b1'",
    "'<c16'",
    "True",
    "()",
    "(2,)",
    "\x93NUMPY",
)
ZIP_WORDS = ("PK\x01\x02", "PK\x03\x04", "PK\x05\x06", "PK\x06\x06", "PK\x06\x07", ".npy", "\x08\x00")
TARGETS = {
    "safetensors": Target(_safetensors_file, FILE_SEEDS["safetensors"], HEADER_WORDS),
    "npz": Target(_npz_file, FILE_SEEDS["npz"], ZIP_WORDS + NPY_WORDS),
    "npy": Target(_npy_file, FILE_SEEDS["npy"], NPY_WORDS),
    "torch": Target(_torch_file, FILE_SEEDS["torch"], (*ZIP_WORDS, "data.pkl", "cbuiltins\n")),
    "round": Target(_round, FILE_SEEDS["round"], HEADER_WORDS + ZIP_WORDS),
    "rule": Target(_rule, _rule_seeds, _rule_words()),
    "training": Target(_training, _training_seeds, (*HEADER_WORDS, "settings", "NaN", "{}", "[[")),
    "dcp": Target(_dcp, _dcp_seeds, ("ctorch\n", "cbuiltins\neval\n", "R", "\x81", "(tR.", "TensorStorageMetadata")),
}


def main() -> None:
    """Run a target on files: what a finding did."""
    name, *paths = sys.argv[1:]
    for path in paths:
        print(path, TARGETS[name].run(Path(path).read_bytes()))


if __name__ == "__main__":
    main()

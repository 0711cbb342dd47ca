"""Installing: sdist to wheel, small, and usable without a compiler. Builds in a temporary folder, from PyPI's tools."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from typing import Any

import pytest
from support import REQUIRED

#: What these tests build is built once, by one of the processes that run tests side by side.
pytestmark = pytest.mark.xdist_group("install")

ROOT = pathlib.Path(__file__).parent.parent
#: Build with the tools that are installed here, where what they build is not the point; `make test` installs them.
HERE = ["--no-build-isolation"] if importlib.util.find_spec("nanobind") else []

CHECK = """
import sys, warnings
blocked = sys.argv[1:]
for name in blocked:
    sys.modules[name] = None
import numpy as np, robustkern as rk
assert rk.__file__.startswith(sys.path[0]), rk.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        value, info = rk.ctma(np.arange(12.0).reshape(4, 3), f=1, anchor="median", return_info=True)
assert np.allclose(value, [3, 4, 5]), value
print(info.backend, len([c for c in caught if "robustkern runs on" in str(c.message)]), *(c.message for c in caught))
print(rk.info()["backends"]["cuda"])
"""


def build(folder: pathlib.Path, source: pathlib.Path, *options: str, **environment: str) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(
        [*command, *options],
        env={**os.environ, **environment},
        check=True,
        timeout=800,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: pathlib.Path, site: pathlib.Path, *blocked: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = subprocess.run(
        # -S would lose the dependencies; the folder given first wins over the editable install's finder.
        [sys.executable, "-c", "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in "
         "type(f).__module__]; sys.path.insert(0, sys.argv.pop(1))\n" + CHECK, str(site), *blocked],
        capture_output=True,
        text=True,
        check=False,
        cwd=site,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split(maxsplit=2)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(ROOT)],
        check=True,
        timeout=800,
        capture_output=True,
    )
    (path,) = folder.glob("*.tar.gz")
    return path


def test_sdist_holds_the_sources_and_nothing_else(sdist: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {
        "csrc/kernels.h",
        "csrc/cpu/select.cpp",
        "csrc/cuda/select.cu",
        "csrc/cuda/cuda.cmake",
        "csrc/cuda/check/CMakeLists.txt",
        "csrc/cuda/check/check.cu",
        "csrc/bindings/module_cuda.cpp",
        "csrc/bindings/module_jax.cpp",
        "csrc/emulation/emulation.h",  # for the tests, which are here too
        "tests/test_install.py",
        "packaging/build_backend.py",
        "robustkern/functions.py",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
    } <= names
    assert not [
        name for name in names if name.endswith((".so", ".pyc", ".png")) or name.startswith((".venv", "build/"))
    ]


@pytest.fixture(scope="module")
def wheel(sdist: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Without a CUDA compiler, which is no reason to fail, but one to be told; kernels as for an unknown processor."""
    nvcc = {"RK_CUDA": "AUTO", "CUDACXX": "/nowhere/nvcc"}
    quick = ["-C", "cmake.define.RK_X86_LEVELS=OFF", "-C", "cmake.define.RK_OPTIMIZATION=-O1"]
    return build(tmp_path_factory.mktemp("wheel"), sdist, *quick, RK_REQUIRE_EXTENSION="1", **nvcc)


@pytest.mark.slow
@pytest.mark.timeout(900)  # compiles everything beside other tests
def test_wheel_from_the_sdist(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    site = tmp_path / "site"
    backend, warnings, text = check(wheel, site)
    assert (backend, warnings) == ("cpp", "0")
    assert text.startswith("not built: CUDA did not work: Could not find the compiler specified in the environment variable "
                           "CUDACXX: /nowhere/nvcc. Install CUDA 12.8 or newer with nvcc on PATH")  # fmt: skip
    assert not list(site.glob("robustkern/_cuda*.so"))
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 10e6
    assert not list(site.rglob("*.cpp"))


#: What is tried in an environment that has the published wheel and its dependencies only, then with torch besides.
PUBLISHED = """
import os, signal, sys, time
before = time.perf_counter()
import numpy as np, robustkern as rk
print(f"import {time.perf_counter() - before:.2f}")
assert "site-packages" in rk.__file__ and rk.info()["isa"], rk.__file__
x = np.random.default_rng(0).standard_normal((9, 300_000)).astype(np.float32)
want = {rule: rk.aggregate(x, rule, f=2) for rule in ("median", "ctma(geometric_median)")}
rk.set_num_threads(1)
assert all(np.array_equal(rk.aggregate(x, rule, f=2), result) for rule, result in want.items())
rk.set_num_threads(None)
if "torch" in sys.argv[1:]:
    import torch
    torch.ones(400, 400) @ torch.ones(400, 400)
    torch.set_default_device("meta")
    got = rk.aggregate([torch.from_numpy(row) for row in x], "median", f=2)
    assert got.device.type == "cpu" and np.array_equal(got.numpy(), want["median"])
    torch.set_default_device("cpu")
maps = open("/proc/self/maps").read()
print("libgomp", "robustkern.libs/libgomp-" in maps)
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if np.array_equal(rk.aggregate(x, "median", f=2), want["median"]) else 3)
print("child", os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_published_wheel(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Repaired by auditwheel, with an OpenMP runtime of its own: from a fresh environment, alone and beside torch."""
    pytest.importorskip("auditwheel")
    spec = importlib.util.spec_from_file_location("wheel", ROOT / "packaging" / "wheel.py")
    assert spec is not None
    assert spec.loader is not None
    packaging = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packaging)
    found = packaging.repaired(wheel, tmp_path)
    assert "manylinux" in found.name
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", str(found)], check=True, timeout=300, capture_output=True
    )
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    for beside in ([], ["torch"]):
        more = {"PYTHONPATH": str(pathlib.Path(torch.origin).parents[1])} if beside else {}
        script = tmp_path / "published.py"
        # torch comes from where these tests run; its folder goes last, so that robustkern is the installed one.
        order = "import sys\nsys.path = [p for p in sys.path if p != sys.argv[1]] + [sys.argv[1]]\n" if beside else ""
        script.write_text(order + PUBLISHED)
        arguments = [*more.values(), *beside]
        done = subprocess.run(
            [python, str(script), *arguments], capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        said = dict(line.split() for line in done.stdout.splitlines())
        assert said["child"] == "0"
        assert said["libgomp"] == "True"
        assert float(said["import"]) < 2
    example = re.findall(r"```python\n(import numpy.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[0]
    *lines, last = example.strip().splitlines()
    call, want = last.split("  # ")
    code = "\n".join([*lines, f"print(repr({call}))"])
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == want
    done = subprocess.run([home / "bin" / "robustkern", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is wrong" in done.stdout


def test_python_started_in_a_clone_says_so(tmp_path: pathlib.Path) -> None:
    """The folder holds the package's sources, which Python finds before any installed package."""
    clone = tmp_path / "a clone"
    shutil.copytree(ROOT / "robustkern", clone / "robustkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", clone)
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]; "
    code += "import robustkern as rk; print(rk.info()['backends']['cpp'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        f"Python imported the source tree {clone}, not an installed package (start Python in another folder than "
        f"{clone}, or install it in place: pip install -e {clone})"
    )


@pytest.mark.slow
def test_install_without_a_compiler(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A pure Python wheel; Numba, or without it NumPy; one warning that says what to do."""
    wheel = build(tmp_path, sdist, *HERE, CXX="/bin/false", CC="/bin/false", RK_CUDA="OFF")
    assert "py3-none-any" in wheel.name
    backend, warnings, text = check(wheel, tmp_path / "with_numba")
    assert (backend, warnings) == ("numba", "1")
    assert "install a C++17 compiler with OpenMP, then robustkern again from its sources" in text
    assert (
        "not built: robustkern was installed without its compiled part. Install a C++17 compiler with OpenMP and"
        in text
    )
    backend, warnings, text = check(wheel, tmp_path / "without_numba", "numba")
    assert (backend, warnings) == ("reference", "1")
    assert "pip install 'robustkern[numba]'" in text


@pytest.mark.parametrize("by", ["environment", "setting"])
def test_cuda_that_is_insisted_on_fails_loudly(sdist: pathlib.Path, tmp_path: pathlib.Path, by: str) -> None:
    """And does not fall back to pure Python."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *HERE, "--wheel-dir", str(tmp_path), str(sdist)]
    environment = {**os.environ, "CUDACXX": "/nowhere/nvcc"}
    if by == "environment":
        environment["RK_CUDA"] = "ON"
    else:
        command += ["-C", "cmake.define.RK_CUDA=ON"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert (
        "RK_CUDA=ON, but CUDA did not work: Could not find the compiler specified in the environment variable" in said
    )
    assert "Install CUDA 12.8 or newer" in said
    assert "RK_CUDA=OFF builds without" in said
    assert not list(tmp_path.glob("*.whl"))


# ---- CMake: what it says where it does not build the CUDA backend, without building the rest -----------------------

PATH_WITHOUT_NVCC = os.pathsep.join(
    folder for folder in os.environ["PATH"].split(os.pathsep) if not pathlib.Path(folder, "nvcc").exists()
)
NVCC = shutil.which("nvcc")
OLD_NVCC = f"""#!/bin/sh
sed -i 's/DEC(__CUDACC_VER_MAJOR__)/DEC(11)/' CMakeCUDACompilerId.cu 2>/dev/null
exec {NVCC} "$@"
"""
NEW_HOST = """#!/bin/sh
exec c++ -U__GNUC__ -D__GNUC__=99 "$@"
"""


def configure(folder: pathlib.Path, *definitions: str, **environment: str) -> tuple[bool, str]:
    """Return whether CMake succeeded, and what it said in one line."""
    tools = pathlib.Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{tools}{os.pathsep}{os.environ['PATH']}")
    nanobind = pytest.importorskip("nanobind", reason="nanobind is not installed: make test installs it")
    if cmake is None:
        pytest.skip("CMake is not installed: make test installs it")
    unset = ("CUDACXX", "CUDAHOSTCXX", "CUDA_PATH")
    done = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(folder), "-DSKBUILD_PROJECT_VERSION=0", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dnanobind_DIR={nanobind.cmake_dir()}", "-DCMAKE_CUDA_ARCHITECTURES=90", *definitions],
        env={**{name: value for name, value in os.environ.items() if name not in unset}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("nvcc", "host", "definition", "reason"),
    [
        (None, None, "", "there was no CUDA compiler"),
        ("#!/bin/sh\nexit 1\n", None, "", "CUDA did not work: "),
        (OLD_NVCC, None, "", r"CUDA did not work: CUDA 11[0-9.]+ is older than 12.8 \(/.*nvcc\)"),
        ("", NEW_HOST, "", r"CUDA did not work: error -- unsupported GNU version! .* not supported!"),
        (
            "",
            None,
            "-DCMAKE_CUDA_ARCHITECTURES=75;52000",
            "CUDA did not work: Unsupported gpu architecture 'compute_52000'",
        ),
    ],
    ids=["none", "broken", "too old", "unsupported host compiler", "unknown architecture"],
)
def test_cuda_that_does_not_work_is_a_reason_or_an_error(
    tmp_path: pathlib.Path, nvcc: str | None, host: str | None, definition: str, reason: str
) -> None:
    environment = {"PATH": PATH_WITHOUT_NVCC} if nvcc is None else {}
    for name, variable, script in (("nvcc", "CUDACXX", nvcc), ("host", "CUDAHOSTCXX", host)):
        if script:
            (tmp_path / name).write_text(script)
            (tmp_path / name).chmod(0o755)
            environment[variable] = str(tmp_path / name)
    if NVCC is None and nvcc in ("", OLD_NVCC):
        pytest.skip("no CUDA compiler on PATH")
    if nvcc is None and shutil.which("c++", path=PATH_WITHOUT_NVCC) is None:
        pytest.skip("the C++ compiler is in the CUDA compiler's folder")
    remedy = (
        r"\. Install CUDA 12.8 or newer with nvcc on PATH \(or CUDACXX set to it\) and a host compiler that it supports"
    )
    done, said = configure(tmp_path / "auto", "-DRK_CUDA=AUTO", definition, **environment)
    assert done, said
    assert re.search(f"CUDA backend: not built: {reason}.*{remedy}", said), said
    done, said = configure(tmp_path / "on", "-DRK_CUDA=ON", definition, **environment)
    assert not done
    assert re.search(f"RK_CUDA=ON, but {reason}.*{remedy}.*RK_CUDA=OFF builds without", said), said


def test_cuda_that_is_switched_off(tmp_path: pathlib.Path) -> None:
    done, said = configure(tmp_path / "off", "-DRK_CUDA=OFF")
    assert done
    assert "CUDA backend: not built: switched off by RK_CUDA=OFF. Reinstall robustkern without it" in said
    done, said = configure(tmp_path / "maybe", "-DRK_CUDA=MAYBE")
    assert not done
    assert "RK_CUDA must be AUTO, ON or OFF; got 'MAYBE'" in said


def test_what_jax_calls_needs_its_headers(tmp_path: pathlib.Path) -> None:
    (tmp_path / "jaxlib").mkdir()
    (tmp_path / "jaxlib" / "__init__.py").touch()
    for state, built in (("AUTO", True), ("OFF", True), ("ON", False), ("MAYBE", False)):
        done, said = configure(tmp_path / state, "-DRK_CUDA=OFF", f"-DRK_JAX={state}", PYTHONPATH=str(tmp_path))
        assert done == built, said
        if state == "ON":
            assert re.search(r"RK_JAX=ON takes the headers of jaxlib, which \S+ does not find", said), said
        if state == "MAYBE":
            assert "RK_JAX must be AUTO, ON or OFF; got 'MAYBE'" in said
        if built:
            assert (tmp_path / state / "CMakeFiles" / "_cpu.dir").exists()
            assert not (tmp_path / state / "CMakeFiles" / "_jax.dir").exists()


def test_the_cuda_module_imports_without_a_driver() -> None:
    if importlib.util.find_spec("robustkern._cuda") is None:
        from robustkern._cpu import cuda as reason

        if "cuda-static" in REQUIRED:
            pytest.fail(f"ROBUSTKERN_REQUIRE=cuda-static, but {reason}")
        pytest.skip(f"robustkern._cuda is {reason}")
    source = """
from robustkern import _cuda
try:
    _cuda.devices()
except RuntimeError as error:
    print(error)
import robustkern as rk
print(rk.info()["backends"]["cuda"], rk.info()["gpus"])
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # as if there were no GPU where there is one
        capture_output=True,
        text=True,
        check=True,
    )
    error, said = done.stdout.splitlines()
    assert re.fullmatch(r"CUDA driver version is insufficient .*|no CUDA-capable device .*", error)
    assert re.fullmatch(r"no GPU can be used: CUDA driver .* Install one for CUDA \d+ or newer .*\[\]|"
                        r"no GPU can be used: no CUDA-capable .* that nvidia-smi lists a GPU.*\[\]", said)  # fmt: skip


# ---- the build backend ---------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """Give the build backend, on a machine that has nothing of CUDA and an environment that is put back."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "packaging" / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unset = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAToolkit_ROOT", "RK_CUDA", "RK_JAX", "RK_REQUIRE_EXTENSION")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    monkeypatch.setattr(os, "environ", {**kept, "PATH": str(tmp_path / "empty")})
    monkeypatch.setattr(module, "DEFAULT_ROOT", str(tmp_path / "cuda"))
    monkeypatch.setattr(module, "_driver", lambda: 0)
    return module


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
@pytest.mark.parametrize(
    ("driver", "environment", "settings", "asked"),
    [
        (13000, {}, None, True),
        (13010, {"RK_CUDA": "AUTO"}, {"cmake.define.RK_WERROR": "ON"}, True),
        (13000, {"RK_CUDA": ""}, None, True),
        (13000, {"RK_CUDA": "OFF"}, {"cmake.define.RK_CUDA": "AUTO"}, True),
        (13000, {"CUDACXX": "nvcc"}, None, False),
        (0, {}, None, False),
        (12080, {}, None, False),  # too old for what would be built
        (13000, {"RK_CUDA": "OFF"}, None, False),
        (13000, {"RK_CUDA": "ON"}, None, False),  # then a missing compiler is an error
        (13000, {}, {"cmake.define.RK_CUDA": "OFF"}, False),
    ],
)
def test_a_compiler_comes_from_pip_where_only_it_is_missing(
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    driver: int,
    environment: dict[str, str],
    settings: dict[str, str] | None,
    asked: bool,
) -> None:
    monkeypatch.setattr(backend, "_driver", lambda: driver)
    os.environ.update(environment)
    requires = getattr(backend, hook)(settings)
    assert any(name.startswith("cuda-toolkit[nvcc") for name in requires) == asked


@pytest.mark.parametrize("where", ["PATH", "CUDA_HOME", "CUDA_PATH", "CUDAToolkit_ROOT", "DEFAULT_ROOT"])
def test_a_compiler_is_found(backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, where: str) -> None:
    """Also where CMake does not look: that is told by CUDACXX."""
    monkeypatch.setattr(backend, "_driver", lambda: 13000)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc" if where == "DEFAULT_ROOT" else tmp_path / "else" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    if where != "DEFAULT_ROOT":
        os.environ[where] = str(nvcc.parent if where == "PATH" else nvcc.parent.parent)
    assert not backend._wants_compiler(None)
    backend._prepare(None)
    assert os.environ["CUDACXX"] == str(nvcc)


def test_cmake_is_pointed_at_what_pip_brought(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    root = tmp_path / "nvidia" / "cu13"
    for name in ("bin/nvcc", "lib/libcudart.so.13"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    module = types.ModuleType("nvidia")
    module.__path__ = [str(tmp_path / "nvidia")]
    monkeypatch.setitem(sys.modules, "nvidia", module)
    monkeypatch.setattr(backend, "_driver", lambda: 13000)
    for _ in range(2):
        os.environ.pop("CUDACXX", None)
        backend._prepare(None)
    assert os.environ["CUDACXX"] == str(root / "bin" / "nvcc")
    assert os.environ["CUDAToolkit_ROOT"] == str(root)
    assert (root / "lib64" / "libcudart.so").resolve() == root / "lib" / "libcudart.so.13"


@pytest.mark.parametrize("option", ["RK_CUDA", "RK_JAX"])
@pytest.mark.parametrize("name", ["{}", "cmake.define.{}", "skbuild.cmake.define.{}"])
def test_insisting_on_a_part_insists_on_the_extension(backend: Any, option: str, name: str) -> None:
    settings = None
    if name == "{}":
        os.environ[option] = "ON"
    else:
        settings = {name.format(option): "ON"}
    requires = backend.get_requires_for_build_wheel(settings)
    assert any(package.startswith("jaxlib") for package in requires) == (option == "RK_JAX")
    backend._prepare(settings)
    assert os.environ["RK_REQUIRE_EXTENSION"] == "1"
    assert os.environ[option] == "ON"


@pytest.mark.parametrize("option", ["RK_CUDA", "RK_JAX"])
def test_another_value_is_refused(backend: Any, option: str) -> None:
    """Not left to CMake, whose failure would leave the pure Python package."""
    os.environ[option] = "yes"
    with pytest.raises(ValueError, match=f"{option} must be AUTO, ON or OFF; got 'yes'"):
        backend.get_requires_for_build_wheel(None)
    with pytest.raises(ValueError, match=f"{option} must be AUTO, ON or OFF; got 'yes'"):
        backend._prepare(None)


def test_a_required_extension_fails_loudly(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, sdist, *HERE, CXX="/bin/false", CC="/bin/false", RK_CUDA="OFF", RK_REQUIRE_EXTENSION="1")

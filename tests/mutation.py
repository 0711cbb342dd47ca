"""Plant faults, one at a time, and see whether the tests notice: `python tests/mutation.py --count 40 --seed 1`.

A fault is one token of the rules, the cuts or the C++ kernels that becomes another: a comparison, a sign, a bound, a
number. All happens in a copy, in build/mutation. A share of 100 % cannot be had: where to switch to another algorithm,
and how much to fetch ahead, changes no result.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "mutation"
CLEAN = COPY / "clean"
OTHERS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*",
    "+=": "-=", "-=": "+=", "&": "|", "|=": "&=", "&=": "|=", "&&": "||", "||": "&&",
    "and": "or", "or": "and", "min": "max", "max": "min", "True": "False", "False": "True", "true": "false",
    "false": "true", "any": "all", "all": "any", "min64": "max64", "max64": "min64", "vmin": "vmax", "vmax": "vmin",
    "argmin": "argmax", "sum": "max", "low": "high", "high": "low",
}  # fmt: skip
#: What of a C++ file is code: comments, texts, preprocessor lines and template brackets are not.
CPP = re.compile(
    r"(?P<skip>//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|^[ \t]*#[^\n]*|template <[^;{(]*>"
    r"|(?:static|reinterpret|const)_cast<[^(]*>\(|sizeof\([^)]*\)|\w+<[\w:, *]*>)"
    r"|(?P<token><<|>>|->|\+\+|--|[<>=!+\-*/&|]=|&&|\|\||[<>+\-*/&|]|\b\d+\b|\b[A-Za-z_]\w*\b)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Fault:
    """One token of a file that becomes another."""

    path: str
    line: int
    begin: int
    old: str
    new: str

    def plant(self, folder: Path) -> None:
        """Write the file with it."""
        text = (CLEAN / self.path).read_text()
        assert text[self.begin :].startswith(self.old)
        (folder / self.path).write_text(text[: self.begin] + self.new + text[self.begin + len(self.old) :])

    def mend(self, folder: Path) -> None:
        """Write the file without it."""
        shutil.copy2(CLEAN / self.path, folder / self.path)


def _python_tokens(text: str) -> list[tuple[int, str]]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER):
            found.append((starts[token.start[0] - 1] + token.start[1], token.string))
    return found


def _cpp_tokens(text: str) -> list[tuple[int, str]]:
    return [(match.start(), match["token"]) for match in CPP.finditer(text) if match["token"]]


def faults(path: Path) -> list[Fault]:
    """Return every fault that can be planted in a file."""
    text = path.read_text()
    tokens = _python_tokens(text) if path.suffix == ".py" else _cpp_tokens(text)
    found = []
    for k, (begin, old) in enumerate(tokens):
        line = text[text.rfind("\n", 0, begin) + 1 : text.find("\n", begin)]
        new = str(int(old) + 1) if old.isdecimal() and len(old) < 6 else OTHERS.get(old)
        before = tokens[k - 1][1] if k else ""
        if new is None or line.lstrip().startswith(("def ", "class ", "from ", "import ", "@", "using ", "typedef ")):
            continue
        if path.suffix == ".py" and (before in ("(", ",", "=", "return", "[") and old in ("*", "-", "|")):
            continue  # an unpacking, or a number's sign
        if (path.suffix == ".py" and old == "|") or (old == "/" and before == ","):
            continue  # types, chains of rules, positional parameters
        if (
            path.suffix != ".py"
            and old in ("*", "&", "<", ">")
            and re.search(r"[\w>] ?[*&] ?\w+[,;)=]|const \w+\*", line)
        ):
            continue  # declarations of pointers and references
        found.append(Fault(str(path.relative_to(CLEAN)), text.count("\n", 0, begin) + 1, begin, old, new))
    return found


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"ROBUSTKERN_SOURCES": str(folder), "HYPOTHESIS_PROFILE": "few", "PYTHONDONTWRITEBYTECODE": "1"}


TESTS = {
    "python": ["-k", "not emulated and not numba and not cpp- and not 2_to_the_31 and not memory", "tests/test_rules.py",
               "tests/test_more_rules.py", "tests/test_geometric_median.py", "tests/test_own_rules.py",
               "tests/test_means.py", "tests/test_properties.py", "tests/test_divided.py", "tests/test_blocks.py"],
    "cpp": ["-k", "cpp-baseline and not 2_to_the_31 and not memory or threads and cpp", "tests/test_kernels.py", "tests/test_momenta.py",
            "tests/test_means.py", "tests/test_blocks.py"],
}  # fmt: skip


def _tests(folder: Path, kind: str, timeout: float) -> str:
    """Return what the tests say of a copy: caught, missed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *TESTS[kind]]
    variables = _environment(folder) | ({"ROBUSTKERN_WATCHED": "mutation"} if kind == "cpp" else {})
    try:
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return "caught"  # a loop that does not end
    return "missed" if done.returncode == 0 else "caught"


def _compile(folder: Path) -> bytes | None:
    """Compile the kernels of a copy for every x86 processor, into where ROBUSTKERN_WATCHED=mutation finds them.

    Returns their code, or None where they do not compile.
    """
    build = ROOT / "build" / "watched" / "mutation"
    if not (build / "build.ninja").exists():
        binaries = Path(sys.executable).parent
        nanobind = subprocess.run(
            [sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        subprocess.run(
            [binaries / "cmake", "-S", folder, "-B", build, "-G", "Ninja", "-DSKBUILD_PROJECT_VERSION=0",
             "-DRK_WATCH=plain", "-DRK_X86_LEVELS=OFF", f"-DPython_EXECUTABLE={sys.executable}",
             f"-DCMAKE_MAKE_PROGRAM={binaries / 'ninja'}", f"-Dnanobind_DIR={nanobind}", "--log-level=WARNING"],
            check=True,
        )  # fmt: skip
    command = [Path(sys.executable).parent / "cmake", "--build", build, "--", "--quiet"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    subprocess.run(["strip", "-o", build / "code", *build.glob("_cpu*.so")], check=True)
    return (build / "code").read_bytes()


def main() -> int:
    """Plant faults; print each that was missed, and the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=list(TESTS), nargs="*", default=list(TESTS))
    parser.add_argument("--count", type=int, default=30, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.0, help="exit with 1 where a smaller share is caught")
    parser.add_argument("--out", type=Path, help="a line of JSON for each fault")
    given = parser.parse_args()
    shutil.rmtree(COPY, ignore_errors=True)
    for name in ("robustkern", "csrc", "docs"):
        shutil.copytree(ROOT / name, CLEAN / name)
    for name in ("CMakeLists.txt", "README.md"):
        shutil.copy2(ROOT / name, CLEAN)
    files = {
        "python": [path for path in sorted((CLEAN / "robustkern" / "rules").glob("*.py")) if path.stem[0] != "_"],
        "cpp": [
            path for path in sorted((CLEAN / "csrc" / "cpu").glob("*.*")) if path.stem not in ("dispatch", "read_pass")
        ],
    }
    enough = True
    for kind in given.kind:
        folder = COPY / kind
        shutil.copytree(CLEAN, folder)
        code = _compile(folder) if kind == "cpp" else None
        if _tests(folder, kind, 1200) != "missed":
            raise RuntimeError(f"{kind}: the tests fail without any fault")
        possible = [fault for path in files[kind] for fault in faults(path)]
        caught = tried = 0
        for fault in random.Random(given.seed).sample(possible, len(possible)):
            if tried == given.count:
                break
            fault.plant(folder)
            if kind == "cpp" and _compile(folder) in (None, code):
                fault.mend(folder)
                continue  # of another instruction set, or no fault that anybody would meet
            verdict = _tests(folder, kind, 600)
            fault.mend(folder)
            tried += 1
            caught += verdict == "caught"
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(asdict(fault) | {"verdict": verdict}) + "\n")
            if verdict == "missed":
                print(f"missed: {fault.path}:{fault.line}: {fault.old} -> {fault.new}", flush=True)
        print(f"{kind}: {caught} of {tried} planted faults caught ({len(possible)} could be)", flush=True)
        enough &= caught >= given.least * tried
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())

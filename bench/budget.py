"""Holds what the compiler made of the CUDA kernels to a budget: python bench/budget.py [--check | --update | --list K]

No GPU is needed: registers, stack and shared memory are read from the compiled module and its instructions are counted,
for every architecture, by NVIDIA's cuobjdump and nvdisasm. The budget, csrc/cuda/budget.json, holds

- `limits`: the registers that a kernel may take on each architecture (up to `slack` more do not matter: they are given
  out eight at a time), and its static shared memory. The first line whose pattern fits a kernel's name counts;
- `columns`: on how many columns a thread of a kernel works, for rows up to a number. What must be seen follows: rows
  are read and results written 16 bytes at a time where the columns fill them, and a sorting network has as many
  instructions as its definition says, times the columns;
- `split_stores`: architectures whose compiler is known to take those writes apart.

A spill or a stack frame is never allowed. `--update` writes the limits of the module at hand: those of kernels that are
gone go, and a new kernel gets a line, which may be joined with others by hand (* and [HB] as in names of files).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

BUDGET = Path(__file__).parents[1] / "csrc/cuda/budget.json"
SIZES = {"float": 4, "double": 8, "Half": 2, "Bfloat": 2}
WIDE = 16  # bytes
UNROLLED = 4  # rows that weighted_sums reads at a time
RESERVED = 1024  # bytes of shared memory that are the system's from compute capability 9.0 on
#: Names of a kernel's flags, by their place among its arguments.
FLAGS = {
    "select_by_network": {2: ("sort", "median")},
    "select_by_merging": {2: ("sort", "median")},
    "select_mixed_rows": {2: ("sort", "median")},
    "select_by_counting": {1: ("plain", "weighted"), 2: ("reread", "kept")},
}


# ---- what a kernel is ------------------------------------------------------------------------------------------

_ARGUMENT = re.compile(
    r"(?P<plain>[df])|NS_\d+(?P<named>[A-Z][a-z]+)E|(?P<again>S\d_)|Li(?P<number>\d+)E|Lb(?P<flag>[01])E"
)


def readable(mangled: str) -> tuple[str, tuple[str, ...]]:
    """Return the function and the template arguments of a kernel of rk::cuda."""
    start = re.match(r"_ZN2rk4cuda(\d+)", mangled)
    if not start:
        return mangled, ()
    end = start.end() + int(start[1])
    function, arguments, named = mangled[start.end() : end], [], ""
    if mangled[end] != "I":
        return function, ()
    end += 1
    while found := _ARGUMENT.match(mangled, end):
        end = found.end()
        if found["plain"]:
            arguments.append({"f": "float", "d": "double"}[found["plain"]])
        elif found["flag"]:
            arguments.append(FLAGS[function][len(arguments)][int(found["flag"])])
        else:
            named = found["named"] or named  # the one type of ours, which a kernel's name spells out once
            arguments.append(found["number"] or named)
    if mangled[end] != "E":
        raise ValueError(f"{mangled}: an argument that this script cannot read follows {arguments}")
    return function, tuple(arguments)


def width(instruction: str) -> int:
    """Return the bytes that a load or store moves for a thread."""
    for part in instruction.split(".")[1:]:
        if part in ("U8", "S8", "U16", "S16", "64", "128", "256"):
            return int(part.lstrip("US")) // 8
    return 4


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    architecture: str
    mangled: str
    registers: int
    stack: int
    local: int
    shared: int
    code: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.function, self.arguments = readable(self.mangled)
        if self.number >= 90:
            self.shared = max(0, self.shared - RESERVED)

    @property
    def number(self) -> int:
        return int(re.sub(r"\D", "", self.architecture))

    @property
    def name(self) -> str:
        return f"{self.function}<{', '.join(self.arguments)}>" if self.arguments else self.function

    def count(self, *instructions: str) -> int:
        """Return how many there are of instructions whose first parts are these."""
        return sum(n for code, n in self.code.items() if any(f"{code}.".startswith(f"{i}.") for i in instructions))

    def accesses(self, kinds: tuple[str, str], of_width: int) -> int:
        """Return how many global (or generic) accesses have this width, a wider one counted as several.

        Without those that must see what others wrote, which are looks at a row's flag.
        """
        moved = [
            (width(code), n) for code, n in self.code.items() if code.split(".")[0] in kinds and ".STRONG" not in code
        ]
        return sum(n * (w // of_width) for w, n in moved if w == of_width or of_width == WIDE)

    @property
    def spills(self) -> int:
        return self.count("LDL", "STL")

    @property
    def min_max(self) -> int:
        return self.count("FMNMX") + 2 * self.count("FMNMX3")  # of three values

    @property
    def comparisons(self) -> int:
        return self.count(*(f"DSETP.{order}{nan}" for order in ("LT", "LE", "GT", "GE") for nan in ("", "U")))

    @property
    def fma64(self) -> int:
        return self.count("DFMA")


LOADS, STORES = ("LD", "LDG"), ("ST", "STG")


# ---- reading a module ------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Return the path of one of CUDA's binary utilities, from its package or from PATH."""
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        for path in Path(folder).glob(f"cu*/bin/{name}"):
            return str(path)
    path_of = shutil.which(name)
    if not path_of:
        raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-{name}, or put that of CUDA 13 on PATH")
    return path_of


def installed_module() -> Path:
    """Return the compiled module of the installed package."""
    spec = importlib.util.find_spec("robustkern._cuda")
    if not spec or not spec.origin:
        from robustkern import _cpu

        raise FileNotFoundError(f"robustkern._cuda is {_cpu.cuda}")
    return Path(spec.origin)


def read_resources(lines: Iterable[str]) -> Iterator[Kernel]:
    """Read what `cuobjdump --dump-resource-usage` prints."""
    architecture = mangled = ""
    for line in lines:
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            mangled = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            yield Kernel(architecture, mangled, registers, stack, local, shared)


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)")


def read_code(lines: Iterable[str]) -> dict[tuple[str, str], Counter[str]]:
    """Count the instructions that `cuobjdump --dump-sass` prints, by architecture and mangled name."""
    architecture, code = "", Counter[str]()
    found_code: dict[tuple[str, str], Counter[str]] = {}
    for line in lines:
        if "*/ " in line[:24]:
            if found := _INSTRUCTION.match(line):
                code[found[1]] += 1
        elif "Function : " in line:
            code = found_code[architecture, line.split(":")[1].strip()] = Counter()
        elif line.startswith("arch = "):
            architecture = line[len("arch = ") :].strip()
    return found_code


def _dumped(module: Path, *options: str) -> Iterator[str]:
    command = [tool("cuobjdump"), *options, str(module)]
    environment = os.environ | {"NVDISASM_PATH": str(Path(tool("nvdisasm")).parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {process.returncode}")


def read_module(module: Path) -> list[Kernel]:
    """Return all kernels of a compiled module, all architectures: half a minute of a processor's time, two at work."""
    kernels = list(read_resources(_dumped(module, "--dump-resource-usage")))
    # The largest first, so that the last ones end together.
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: -int(re.sub(r"\D", "", a)))
    with ThreadPoolExecutor(2) as pool:
        for codes in pool.map(
            lambda a: read_code(_dumped(module, "--dump-sass", "--gpu-architecture", a)), architectures
        ):
            for kernel in kernels:
                kernel.code = codes.get((kernel.architecture, kernel.mangled), kernel.code)
    if not kernels or not all(kernel.code for kernel in kernels):
        raise RuntimeError(f"{module}: some kernels have no code, or there are none; was it built for PTX alone?")
    return kernels


# ---- sorting networks: csrc/common/networks.h ------------------------------------------------------------------

Pairs = list[tuple[int, int]]


def network(n: int) -> Pairs:
    """Return the comparators of Batcher's odd-even merge sort over n wires, in order."""
    pairs: Pairs = []

    def merge(first: int, size: int, stride: int) -> None:
        step = 2 * stride
        if step < size:
            merge(first, size, step)
            merge(first + stride, size, step)
            inner = range(first + stride, first + size - stride, step)
            pairs.extend((i, i + stride) for i in inner if i + stride < n)
        elif first + stride < n:
            pairs.append((first, first + stride))

    def sort(first: int, size: int) -> None:
        if size >= 2 and first < n:
            sort(first, size // 2)
            sort(first + size // 2, size // 2)
            merge(first, size, 1)

    sort(0, 1 << (n - 1).bit_length())
    return pairs


def without_repeats(pairs: Pairs) -> Pairs:
    """Leave out comparators of two wires that were last compared with each other."""
    last: dict[int, tuple[int, int]] = {}
    kept: Pairs = []
    for pair in pairs:
        if not last.get(pair[0]) == last.get(pair[1]) == pair:
            kept.append(pair)
        last[pair[0]] = last[pair[1]] = pair
    return kept


class Cost(NamedTuple):
    """Comparators that the wanted ranks need, and those of their outputs that anything reads."""

    comparators: int
    outputs: int


def cost(pairs: Pairs, ranks: Iterable[int]) -> Cost:
    """Return what a network costs of which only some ranks are wanted."""
    needed, comparators, outputs = set(ranks), 0, 0
    for pair in reversed(pairs):
        read = needed.intersection(pair)
        if read:
            comparators += 1
            outputs += len(read)
            needed.update(pair)
    return Cost(comparators, outputs)


# ---- the check -------------------------------------------------------------------------------------------------


class Demand(NamedTuple):
    """A figure that must lie in a range, or be one of two."""

    what: str
    found: int
    allowed: range | tuple[int, ...]

    def __str__(self) -> str:
        if isinstance(self.allowed, tuple):
            wanted = " or ".join(map(str, dict.fromkeys(self.allowed)))
        else:
            low, high = self.allowed.start, self.allowed.stop - 1
            wanted = f"at least {low}" if self.allowed.stop == _NO_END else f"at most {high}"
        return f"{self.what}: found {self.found}, allowed {wanted}"


_NO_END = 1 << 62


def at_most(what: str, found: int, most: int) -> Demand:
    return Demand(what, found, range(most + 1))


def at_least(what: str, found: int, least: int) -> Demand:
    return Demand(what, found, range(least, _NO_END))


def columns_of(kernel: Kernel, budget: dict[str, Any]) -> int:
    """Return how many columns a thread has by the budget, 0 where it does not say."""
    for pattern, by_rows in budget["columns"].items():
        if fnmatchcase(kernel.name, pattern):
            rows = int(kernel.arguments[1]) if kernel.function == "select_by_network" else 0
            return next(int(columns) for up_to, columns in by_rows.items() if rows <= int(up_to))
    return 0


def networks(kernel: Kernel, columns: int) -> Iterator[Demand]:
    """What is to be seen of the network that a kernel unrolls, if it has one."""
    if kernel.function == "select_by_network":
        n, kind = int(kernel.arguments[1]), kernel.arguments[2]
        ranks = {"median": range(n // 2 - 1, n // 2 + 1), "sort": range(n)}[kind]
    elif kernel.function == "gram_products":
        n, kind = int(kernel.arguments[2]), "lower median"
        ranks = range(n // 2 - 1, n // 2)
        columns = 1
    else:
        return
    if n == 0 or (kernel.arguments[0] == "double" and kind != "median"):
        return  # no network; or comparisons of other kinds are among its own
    # Compilers differ in whether they see that a comparator repeats another.
    whole, short = cost(network(n), ranks), cost(without_repeats(network(n)), ranks)
    if kernel.arguments[0] == "double":
        allowed = (columns * whole.comparators, columns * short.comparators)
        yield Demand("comparisons of the network", kernel.comparisons, allowed)
    else:
        # Some choose the infinity of a wire that may be a pad by a minimum: 3 wires, or 7 in steps of 8.
        pads = range(0 if kind != "median" else 4 if n <= 32 else 8)
        counts = [columns * (outputs + pad) for pad in pads or [0] for outputs in (whole.outputs, short.outputs)]
        yield Demand("min/max of the network", kernel.min_max, tuple(counts))


def accesses(kernel: Kernel, columns: int, split_stores: bool) -> Iterator[Demand]:
    """What is to be seen of the reads and writes of a kernel whose threads have several columns."""
    size = SIZES[kernel.arguments[0]]
    rows, results, stored = UNROLLED, int(kernel.arguments[-1]) if kernel.function == "weighted_sums" else 1, size
    if kernel.function == "weighted_sums":
        stored = SIZES[kernel.arguments[1]]
    else:
        rows = int(kernel.arguments[1])
        if columns * size == WIDE // 2:
            # Those of pointers are as wide; but narrow ones are only for the tile's end, and for columns with a NaN.
            yield at_most(f"{size}-byte loads", kernel.accesses(LOADS, size), (rows + 24) * columns)
    if columns * size == WIDE:
        yield at_least("16-byte loads", kernel.accesses(LOADS, WIDE), rows)
    if columns * stored % WIDE == 0 and not split_stores:
        yield at_least("16-byte stores", kernel.accesses(STORES, WIDE), results * columns * stored // WIDE)


def limits_of(kernel: Kernel, budget: dict[str, Any]) -> dict[str, Any] | None:
    return next((line for line in budget["limits"] if fnmatchcase(kernel.name, line["kernels"])), None)


def demands(kernel: Kernel, budget: dict[str, Any]) -> Iterator[Demand]:
    """All that the budget says of a kernel."""
    yield at_most("spill instructions", kernel.spills, 0)
    yield at_most("bytes of stack", kernel.stack + kernel.local, 0)
    if line := limits_of(kernel, budget):
        allowed = line["registers"][budget["architectures"].index(kernel.architecture)]
        yield at_most("registers", kernel.registers, min(255, allowed + budget["slack"]))
        yield at_most("bytes of shared memory", kernel.shared, line["shared"])
    columns = columns_of(kernel, budget)
    yield from networks(kernel, columns or 1)
    if columns > 1:
        yield from accesses(kernel, columns, kernel.architecture in budget["split_stores"])


def problems(kernels: list[Kernel], budget: dict[str, Any], every: bool = True) -> list[str]:
    """Return a line for each figure that is not in the budget; of `every` architecture, or of those in the module."""
    found = []
    for kernel in kernels:
        if kernel.architecture in budget["architectures"]:
            label = f"{kernel.architecture} {kernel.name}"
            found += [f"{label}: {d}" for d in demands(kernel, budget) if d.found not in d.allowed]
            if not limits_of(kernel, budget):
                found.append(f"{label}: no limits (python bench/budget.py --update gives it some)")
    for line in budget["limits"]:
        if not any(limits_of(kernel, budget) is line for kernel in kernels):
            found.append(f"{line['kernels']}: limits, but no such kernel (python bench/budget.py --update)")
    whole = budget | {"split_stores": []}
    for architecture in budget["architectures"]:
        present = [kernel for kernel in kernels if kernel.architecture == architecture]
        if every and not present:
            found.append(f"{architecture}: the module has no code for it")
        mended = all(d.found in d.allowed for k in present for d in demands(k, whole) if d.what == "16-byte stores")
        if present and mended and architecture in budget["split_stores"]:
            found.append(f"{architecture}: stores are 16 bytes wide again: take it out of split_stores")
    return found


# ---- writing a budget ------------------------------------------------------------------------------------------


def updated(kernels: list[Kernel], budget: dict[str, Any]) -> dict[str, Any]:
    """Return the budget with the limits that these kernels need."""
    missing = set(budget["architectures"]) - {kernel.architecture for kernel in kernels}
    if missing:
        raise ValueError(f"the module has no code for {', '.join(sorted(missing))}: build it for all architectures")
    lines: list[dict[str, Any]] = []
    unlimited = dict.fromkeys(kernel.name for kernel in kernels if not limits_of(kernel, budget))
    for line in [*budget["limits"], *({"kernels": name} for name in unlimited)]:
        fitting = [k for k in kernels if (limits_of(k, budget) or {"kernels": k.name})["kernels"] == line["kernels"]]
        if fitting:
            registers = [
                max(k.registers for k in fitting if k.architecture == architecture)
                for architecture in budget["architectures"]
            ]
            shared = max(k.shared for k in fitting)
            lines.append({"kernels": line["kernels"], "shared": shared, "registers": registers})
    return budget | {"limits": lines}


def written(budget: dict[str, Any]) -> str:
    """Return the budget as text, one line a limit."""
    parts = []
    for key, value in budget.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(line)}" for line in value) + "\n  ]"
        elif isinstance(value, dict):
            text = "{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
        else:
            text = json.dumps(value)
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def table(kernels: list[Kernel]) -> Iterator[str]:
    """Yield a line for each kernel with all its figures."""
    heads = "regs stack shared spills loads wide stores wide minmax compare fma64"
    yield " ".join([f"{'':62}", *(f"{head:>7}" for head in heads.split())])
    for k in sorted(kernels, key=lambda k: (k.number, [(len(a), a) for a in (k.function, *k.arguments)])):
        figures = [k.registers, k.stack + k.local, k.shared, k.spills, k.count(*LOADS), k.accesses(LOADS, WIDE)]
        figures += [k.count(*STORES), k.accesses(STORES, WIDE), k.min_max, k.comparisons, k.fma64]
        yield " ".join([f"{k.architecture + ' ' + k.name:62}", *(f"{figure:7}" for figure in figures)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Holds the compiled CUDA kernels to a budget.")
    parser.add_argument("--module", type=Path, help="compiled module (default: robustkern._cuda)")
    parser.add_argument("--check", type=Path, metavar="BUDGET", nargs="?", const=BUDGET, help="the default")
    parser.add_argument("--update", type=Path, metavar="BUDGET", nargs="?", const=BUDGET, help="write the limits anew")
    parser.add_argument("--list", metavar="KERNEL", help="all figures of kernels with this in their names")
    options = parser.parse_args(arguments)
    path = options.update or options.check or BUDGET
    budget = json.loads(path.read_text())
    kernels = read_module(options.module or installed_module())
    if options.list is not None:
        print(*table([kernel for kernel in kernels if options.list in kernel.name]), sep="\n")
        return 0
    if options.update:
        budget = updated(kernels, budget)
        path.write_text(written(budget))
    seen = [a for a in budget["architectures"] if any(kernel.architecture == a for kernel in kernels)]
    found = problems(kernels, budget, every=False)
    print(
        f"{len(kernels)} kernels of {', '.join(seen) or 'no architecture that the budget has'}; {len(found)} problems"
    )
    print(*found, sep="\n")
    return 1 if found or not seen else 0


if __name__ == "__main__":
    sys.exit(main())

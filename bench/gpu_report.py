"""What a person with an NVIDIA GPU runs once: ``python bench/gpu_report.py`` (or ``make gpu-report``), in a clone.

Builds robustkern with its CUDA backend, runs the tests on the GPU, the four tools of compute-sanitizer, and the scaling
study (time against the device's copy bandwidth, CPU against GPU). Everything said is kept in a folder; report.md there
is what docs/gpu.md asks for. Steps that fail are reported, and the others run all the same.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZED = "primitives or trees or weights_agree or out_receives"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LINES = 40  # of a step's output in the report


@dataclass
class Step:
    """One command, and how it went."""

    name: str
    command: list[str]
    environment: dict[str, str]
    minutes: float
    outcome: str = ""
    seconds: float = 0.0
    output: str = ""

    def run(self, folder: Path) -> None:
        """Run the command and keep what it says."""
        begin = time.perf_counter()
        if shutil.which(self.command[0]) is None:
            self.outcome = f"not run: {self.command[0]} was not found"
            return
        print(f"{self.name}: {' '.join(self.command)}", flush=True)
        log = folder / f"{self.name.replace(' ', '-')}.log"
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    self.command,
                    cwd=ROOT,
                    env=os.environ | self.environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=self.minutes * 60,
                    check=False,
                ).returncode
                self.outcome = "passed" if code == 0 else f"FAILED with exit code {code}"
            except subprocess.TimeoutExpired:
                self.outcome = f"FAILED: stopped after {self.minutes:g} minutes"
        self.seconds = time.perf_counter() - begin
        self.output = log.read_text(errors="replace")
        print(f"  {self.outcome} in {self.seconds:.0f} s", flush=True)


def steps(folder: Path, build: bool) -> list[Step]:
    """Return what is run, in order."""
    python = sys.executable
    install = [python, "-m", "pip", "install", "--editable", ".[dev]"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    required = {"ROBUSTKERN_REQUIRE": "cpp,cuda"}
    watched = required | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor with bounds of its own
    files = ["tests/test_cuda.py", "tests/test_kernels.py"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool"]
    sanitized = [*tests, files[0], "-m", "gpu", "-k", SANITIZED]
    scaling = ["scaling", "--devices", "cpu,cuda", "--n", "8,16,32,64", "--d", "1e4..1e9"]
    study = str(folder / "study")
    return [
        Step("driver", ["nvidia-smi"], {}, 1),
        Step("compiler", ["nvcc", "--version"], {}, 1),
        *([Step("build", install, {"RK_CUDA": "ON", "RK_REQUIRE_EXTENSION": "1"}, 30)] if build else []),
        Step("info", [python, "-m", "robustkern", "info"], {}, 2),
        Step("tests", [*tests, *files, "-k", "torch or cupy or cuda"], required, 60),
        *(Step(f"sanitizer {tool}", [*sanitizer, tool, *sanitized], watched, 60) for tool in TOOLS),
        Step("scaling", [python, "-m", "robustkern", *scaling, "--out", study], {}, 60),
    ]


def write_report(folder: Path, done: list[Step]) -> Path:
    """Write report.md: a table of the steps, then what each said last."""
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    text = [f"# robustkern on a GPU, {today}", "", "| step | outcome | seconds |", "|---|---|---|"]
    text += [f"| {step.name} | {step.outcome} | {step.seconds:.0f} |" for step in done]
    for step in done:
        last = step.output.splitlines()[-LINES:]
        text += ["", f"## {step.name}", "", f"`{' '.join(step.command)}`", "", "```", *last, "```"]
    text += ["", "The study's tables and pictures are in `study/`."]
    report = folder / "report.md"
    report.write_text("\n".join(text) + "\n")
    return report


def main() -> int:
    """Run all steps; the exit code is 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="where the report goes")
    parser.add_argument("--no-build", action="store_true", help="take robustkern as it is installed")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    done = steps(folder, not options.no_build)
    for step in done:
        step.run(folder)
    print(f"report: {write_report(folder, done)}")
    return 0 if all(step.outcome == "passed" for step in done) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The pictures of a study of scaling: time and reads against d, reads against n, threads, and CPU against GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustkern.measure import style
from robustkern.measure.reads import machine
from robustkern.measure.roofline import LABEL, MODELS
from robustkern.measure.scaling import Point, ratios

__all__ = ["draw"]

#: How each device is drawn; those beyond are models.
LINES: dict[str, Any] = {"cpu": "-", "cuda": "--"}
MODEL_LINES = (":", (0, (1, 3)), (0, (4, 2, 1, 2)))
TRANSFERS = {"none": "rows on the device", "pinned": "from pinned memory", "pageable": "from pageable memory"}


Names = Mapping[str, str]
Value = Callable[[Point], float | None]


class _Sheet:
    """A grid of panels with shared axes; rules by colour, marker and names where they end, devices by line."""

    def __init__(self, points: Sequence[Point], panels: int, title: str, names: Names, columns: int = 2) -> None:
        columns = min(columns, panels)
        self.names = names
        lines = -(-panels // columns)
        self.figure = style.figure(1.9 + 5.4 * columns, 0.8 + 3.4 * lines)
        grid = self.figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        self.panels = list(grid.flat)[:panels]
        for unused in list(grid.flat)[panels:]:
            unused.set_visible(False)
        for panel in self.panels[-columns:]:
            panel.xaxis.set_tick_params(labelbottom=True)
        self.columns = columns
        self.looks = style.looks(p.rule for p in points)
        self.ends: dict[int, dict[str, tuple[float, float]]] = {}
        self.devices = list(dict.fromkeys(p.device for p in points))
        self.models = list(dict.fromkeys(p.device for p in points if p.kind == "model"))
        facts = machine()
        where = f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}, {facts['date']}"
        self.figure.suptitle(f"{title}\n{where}", fontsize="medium")

    def name(self, device: str) -> str:
        """Return what a reader should call a device."""
        if device in self.models:
            return f"{MODELS[device].name}:\n{LABEL}"
        return f"{self.names[device]}:\nmeasured" if device in self.names else f"{device}, measured"

    def _device(self, device: str) -> dict[str, Any]:
        """Return what the line of a device has of its own."""
        if device in self.models:
            return {"linestyle": MODEL_LINES[self.models.index(device) % len(MODEL_LINES)], "marker": ""}
        return {"linestyle": LINES.get(device, "--"), "fillstyle": "full" if device == "cpu" else "none"}

    def line(self, panel: Any, device: str, rule: str, line: Sequence[tuple[float, float]]) -> None:
        """Draw one rule on one device; its name stands where the first of its lines ends."""
        if line:
            points = sorted(line)
            panel.plot(*zip(*points, strict=True), **self.looks[rule] | self._device(device))
            self.ends.setdefault(self.panels.index(panel), {}).setdefault(rule, points[-1])

    def finish(
        self, path: Path, xlabel: str, ylabel: str, ticks: Sequence[int] = (), extra: Sequence[Any] = ()
    ) -> Path:
        """Label the axes, name the lines, add a legend of the devices (with extra lines) and write the file."""
        from matplotlib.lines import Line2D

        for k, panel in enumerate(self.panels):
            panel.set(xscale="log", yscale="log")
            if k % self.columns == 0:
                panel.set_ylabel(ylabel)
            if k >= len(self.panels) - self.columns:
                panel.set_xlabel(xlabel)
            if ticks:
                panel.set_xticks(ticks, [str(tick) for tick in ticks])
            style.plain_ticks(panel)
        handles = [
            Line2D([], [], color="0.2", label=self.name(device), **{"linewidth": 1.5} | self._device(device))
            for device in self.devices
        ]
        if len(handles) + len(extra) > 1:
            self.figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=4, frameon=False)
        for k, panel in enumerate(self.panels):
            named = self.ends.get(k, {})
            style.name_ends(panel, [(at, rule, self.looks[rule]["color"]) for rule, at in named.items()])
        style.save(self.figure, path)
        return path


def _against_d(points: Sequence[Point], path: Path, title: str, names: Names, ylabel: str, value: Value) -> Path:
    """One panel for each n, d across."""
    sizes = sorted({p.n for p in points})
    sheet = _Sheet(points, len(sizes), title, names)
    for panel, n in zip(sheet.panels, sizes, strict=True):
        panel.set_title(f"n = {n}", fontsize="medium")
        for device, rule in dict.fromkeys((p.device, p.rule) for p in points):
            here = [(p.d, value(p)) for p in points if (p.device, p.rule, p.n) == (device, rule, n)]
            sheet.line(panel, device, rule, [(d, y) for d, y in here if y])
    return sheet.finish(path, "d columns", ylabel)


def _against_n(points: Sequence[Point], path: Path, title: str, names: Names) -> Path:
    """One panel for each device, n across, at the largest d that all n have there."""
    devices = list(dict.fromkeys(p.device for p in points))
    sizes = sorted({p.n for p in points})
    sheet = _Sheet(points, len(devices), title, names, columns=2 if len(devices) == 4 else 3)
    for panel, device in zip(sheet.panels, devices, strict=True):
        here = [p for p in points if p.device == device]
        of = {n: {p.d for p in here if p.n == n} for n in sorted({p.n for p in here})}
        common = set.intersection(*of.values())
        at = {n: max(common or columns) for n, columns in of.items()}
        what = f"d = {max(common):,}" if common else "largest d of each n"
        panel.set_title(f"{sheet.name(device)}, {what}", fontsize="small")
        for rule in dict.fromkeys(p.rule for p in here):
            sheet.line(panel, device, rule, [(p.n, p.reads or 0) for p in here if p.rule == rule and p.d == at[p.n]])
    return sheet.finish(path, "n rows", "reads of the rows", sizes)


def _speed_up(points: Sequence[Point], path: Path) -> Path:
    """Speed-up against threads, of rules and of the read pass."""
    first = points[0]
    sheet = _Sheet(points, 1, f"speed-up by threads, {first.dtype}, n = {first.n}, d = {first.d:,}", {})
    (panel,) = sheet.panels
    for rule in sheet.looks:
        here = {p.threads or 1: p.seconds for p in points if p.rule == rule and p.seconds}
        if 1 in here:
            sheet.line(panel, "cpu", rule, [(threads, here[1] / seconds) for threads, seconds in here.items()])
    reads: dict[int, list[float]] = {}
    for p in points:
        reads.setdefault(p.threads or 1, []).append(p.read_seconds or 0)
    middle = {threads: sorted(times)[len(times) // 2] for threads, times in sorted(reads.items())}
    ratio = [middle[min(middle)] / each for each in middle.values()]
    extra = panel.plot(list(middle), ratio, color="0.2", linestyle="--", linewidth=1.5, label="read pass")
    extra += panel.plot(list(middle), list(middle), color="0.7", linewidth=1, label="as many threads")
    return sheet.finish(path, "threads", "times as fast as on one thread", list(middle), extra)


def _crossover(points: Sequence[Point], path: Path, device: str, dtype: str, names: Names) -> Path | None:
    """Draw the CPU's time over the device's against d, one panel for each n and each way the rows take."""
    sizes = sorted({p.n for p in points})
    lines = {
        (n, transfer, rule): ratios(points, device, transfer, rule, dtype, n)
        for n in sizes
        for transfer in TRANSFERS
        for rule in dict.fromkeys(p.rule for p in points)
    }
    if not any(lines.values()):
        return None
    shown = [p for p in points if p.device == device]
    title = f"time on the CPU / on {device}, {dtype}: above 1, {device} is faster"
    sheet = _Sheet(shown, len(sizes) * len(TRANSFERS), title, names, columns=3)
    panels = {
        (n, transfer): sheet.panels[3 * k + j] for k, n in enumerate(sizes) for j, transfer in enumerate(TRANSFERS)
    }
    for (n, transfer), panel in panels.items():
        panel.set_title(f"n = {n}, {TRANSFERS[transfer]}", fontsize="medium")
        panel.axhline(1, color="0.3", linewidth=1)
    for (n, transfer, rule), line in lines.items():
        sheet.line(panels[n, transfer], device, rule, line)
    return sheet.finish(path, "d columns", "times as fast as the CPU")


def draw(points: Sequence[Point], out: Path, names: Names) -> list[Path]:
    """Draw what was measured, for each dtype; return the files.

    Parameters
    ----------
    points : sequence of Point
        Those without a time are left out.
    out : Path
        A folder.
    names : mapping
        What GPUs are called, by device.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    import matplotlib  # noqa: F401  (said before anything is written)

    points = [p for p in points if p.seconds]
    drawn: list[Path | None] = []
    for dtype in dict.fromkeys(p.dtype for p in points):
        here = [p for p in points if p.dtype == dtype and p.part == "sizes"]
        if here:
            name = f"{dtype}.png"
            drawn += [
                _against_d(
                    here, out / f"time-{name}", f"time of a call, {dtype}", names, "seconds", lambda p: p.seconds
                ),
                _against_d(
                    here, out / f"reads-{name}", f"reads of the rows, {dtype}", names, "reads", lambda p: p.reads
                ),
                _against_n(here, out / f"rows-{name}", f"reads of the rows, {dtype}", names),
            ]
            for device in dict.fromkeys(p.device for p in here if p.kind == "measured" and p.device != "cpu"):
                measured = [p for p in here if p.kind == "measured"]
                drawn.append(_crossover(measured, out / f"{device}-over-cpu-{name}", device, dtype, names))
    threads = [p for p in points if p.part == "threads"]
    if len({p.threads for p in threads}) > 1:
        drawn.append(_speed_up(threads, out / "threads.png"))
    return [path for path in drawn if path is not None]

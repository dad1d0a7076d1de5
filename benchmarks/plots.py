"""Draws results. Each function returns one figure, or None if there is no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .results import Group, Result
from .rivals import RIVALS
from .shapes import BOTH, CELLS, FORWARD, TRAINING
from .tables import CELL_TITLES, shapes_of

COLORS = {FORWARD: "#1f6fb4", TRAINING: "#d9730d"}
CELL_COLORS = {"lstm": "#1f6fb4", "gru": "#d9730d", "rnn": "#3a923a"}
SIDES = {"ours": ("fusedrnn", "-", "o"), "torch": ("torch.nn", "--", "s")}
RIVAL_COLORS = ["#1f6fb4", "#d9730d", "#3a923a", "#8a4fb0"]
_GRID: dict[str, Any] = {"color": "#d8d8d8", "linewidth": 0.6}


def ratio(group: Group, name: str) -> Figure | None:
    """Draws torch.nn's time over ours for each shape: a panel per cell, a dot per median."""
    rows = [row for row in group.of_set(name) if row["status"] == "ok"]
    figure = _by_shape(rows, lambda row: row["ratio"], _mode_style(rows), group)
    if figure:
        for axes in figure.axes:
            _log_ratio_axis(axes)
        title = f"{name}: torch.nn's time over ours (right of 1: ours is faster)"
        _finish(figure, title, group)
    return figure


def part_of_floor(group: Group, name: str) -> Figure | None:
    """Draws the floor over our time for each shape of a set."""
    rows = [row for row in group.of_set(name) if row["status"] == "ok"]
    figure = _by_shape(rows, lambda row: row["part_of_floor"], _mode_style(rows), group)
    if figure:
        for axes in figure.axes:
            axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
            axes.axvline(1, color="black", linewidth=0.8)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
        _finish(figure, f"{name}: the floor over our time (100 %: no faster way)", group)
    return figure


def rivals(group: Group, name: str) -> Figure | None:
    """Draws every rival's time over ours in inference, with the largest number of threads."""
    threads = max(group.threads(), default=1)
    rows = []
    for row in group.of_set(name):
        if (row["mode"], row["threads"], row["status"]) != (FORWARD, threads, "ok"):
            continue
        for rival in RIVALS:
            found = group.rivals.get((rival, row["name"], FORWARD, threads))
            if found and found["status"] == "ok":
                relative = found["time"]["median"] / row["ours"]["median"]
                rows.append(row | {"rival": rival, "relative": relative})
    there = [rival for rival in RIVALS if any(row["rival"] == rival for row in rows)]
    colors = dict(zip(RIVALS, RIVAL_COLORS, strict=True))

    def style(row: Result) -> dict[str, Any]:
        return {"color": colors[row["rival"]], "marker": "o", "label": RIVALS[row["rival"]][1]}

    figure = _by_shape(rows, lambda row: row["relative"], style, group)
    if figure and there:
        for axes in figure.axes:
            _log_ratio_axis(axes)
        title = f"{name}: other libraries' time over ours, inference, {threads} threads"
        _finish(figure, title, group)
    return figure


def scaling(group: Group) -> Figure | None:
    """Draws the time of the scaling set against T, N and H, with the other sizes fixed."""
    rows = [row for row in group.of_set("scaling") if row["status"] == "ok"]
    if not rows:
        return None
    threads = min(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    sweeps: list[tuple[str, str, Callable[[Result], bool]]] = [
        ("T", "N = 1, I = H = 64", lambda row: row["N"] == 1 and row["H"] == 64),
        ("N", "T = 100, I = H = 256", lambda row: row["T"] == 100 and row["H"] == 256),
        ("H", "T = 50, N = 16, I = H", lambda row: row["T"] == 50 and row["N"] == 16),
    ]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(2, 3)
    for column, (size, others, belongs) in enumerate(sweeps):
        for line, mode in enumerate(BOTH):
            axes = grid[line][column]
            chosen = [row for row in rows if belongs(row) and row["mode"] == mode]
            _curves(axes, chosen, size, lambda row, side: 1e3 * row[side]["median"])
            axes.set_xlabel(size)
            axes.set_ylabel(f"{mode}, ms")
            if line == 0:
                axes.set_title(others, fontsize=9)
    _finish(figure, f"Scaling, {threads} thread{'s' * (threads > 1)}", group, grid[0][0])
    return figure


def memory(group: Group) -> Figure | None:
    """Draws the memory kept for backward, and that of inference beyond its outputs."""
    rows = list(group.memory.values())
    training = [row for row in rows if row["mode"] == TRAINING and row["status"] == "ok"]
    along_T = [
        row
        for row in rows
        if (row["mode"], row["status"], row["N"], row["H"]) == (FORWARD, "ok", 1, 64)
    ]
    if not training:
        return None
    shapes = shapes_of(training)
    figure = Figure(figsize=(11, 1.2 + 0.42 * len(shapes)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    found = {(row["cell"], row["shape"]): row for row in training}
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in training)]
    for k, cell in enumerate(cells):
        offset = 0.25 * (k - (len(cells) - 1) / 2)
        known = [(y, found[cell, s]) for y, s in enumerate(shapes) if (cell, s) in found]
        values = [row["ours"]["kept"] / max(1, row["torch"]["kept"]) for _, row in known]
        places = [y + offset for y, _ in known]
        left.barh(places, values, 0.22, color=CELL_COLORS[cell])
    _shape_axis(left, shapes)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_title("kept for backward: ours over torch.nn's", fontsize=9)
    _curves(right, along_T, "T", lambda row, side: max(row[side]["beyond_outputs"], 1) / 1024)
    right.set_xlabel("T (N = 1, I = H = 64)")
    right.set_ylabel("KiB")
    right.set_title("inference: allocated beyond the outputs", fontsize=9)
    _finish(figure, "Memory", group, right)
    return figure


def _by_shape(
    rows: Sequence[Result],
    value: Callable[[Result], float],
    style: Callable[[Result], dict[str, Any]],
    group: Group,
) -> Figure | None:
    """Draws a panel per cell with its shapes below each other and a dot per row."""
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in rows)]
    if not cells:
        return None
    shapes = {cell: shapes_of(row for row in rows if row["cell"] == cell) for cell in cells}
    most = max(map(len, shapes.values()))
    figure = Figure(figsize=(2.2 + 3.2 * len(cells), 1.5 + 0.3 * most), layout="constrained")
    panels = figure.subplots(1, len(cells), squeeze=False)[0]
    same = len({tuple(names) for names in shapes.values()}) == 1
    for k, (axes, cell) in enumerate(zip(panels, cells, strict=True)):
        for row in rows:
            if row["cell"] == cell:
                options = {"markersize": 6, "linestyle": "none"} | style(row)
                axes.plot(value(row), shapes[cell].index(row["shape"]), **options)
        _shape_axis(axes, shapes[cell], labels=k == 0 or not same)
        axes.set_title(CELL_TITLES[cell], fontsize=10)
    return figure


def _mode_style(rows: Sequence[Result]) -> Callable[[Result], dict[str, Any]]:
    """Colours by mode, with filled markers for the most threads and hollow ones for fewer."""
    most = max((row["threads"] for row in rows), default=1)

    def style(row: Result) -> dict[str, Any]:
        mode, threads = row["mode"], row["threads"]
        color = COLORS[mode]
        return {
            "marker": "o" if mode == FORWARD else "D",
            "color": color,
            "markerfacecolor": color if threads == most else "white",
            "label": f"{mode}, {threads} thread{'s' * (threads > 1)}",
        }

    return style


def _curves(
    axes: Any, rows: Iterable[Result], size: str, value: Callable[[Result, str], float]
) -> None:
    """Draws our values and torch.nn's against a size, on logarithmic axes, a colour per cell."""
    rows = sorted(rows, key=lambda row: row[size])
    for cell in CELLS:
        chosen = [row for row in rows if row["cell"] == cell]
        for side, (name, line, marker) in SIDES.items():
            axes.plot(
                [row[size] for row in chosen],
                [value(row, side) for row in chosen],
                color=CELL_COLORS[cell],
                linestyle=line,
                marker=marker,
                markersize=3.5,
                linewidth=1.3,
                label=f"{CELL_TITLES[cell]}, {name}" if chosen else None,
            )
    if rows:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.grid(**_GRID)
    axes.set_axisbelow(True)


def _shape_axis(axes: Any, shapes: Sequence[str], labels: bool = True) -> None:
    axes.set_yticks(range(len(shapes)), shapes if labels else [""] * len(shapes), fontsize=8)
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)


def _log_ratio_axis(axes: Any) -> None:
    """Makes a logarithmic axis with a line at 1 and plain numbers."""
    values = [float(line.get_xdata()[0]) for line in axes.lines]
    low, high = min(0.7, 0.9 * min(values)), max(1.5, 1.1 * max(values))
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks: tuple[float, ...] = (0.1, 0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    if high / low > 20:
        ticks = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.8)


def _finish(figure: Figure, title: str, group: Group, source: Any = None) -> None:
    """Adds the title, the machine and date of the measurement, and one legend for all panels."""
    machine = group.machine
    when = f"{machine['date'][:10]}, {machine['cpu']}, {machine['isa']}, torch {machine['torch']}"
    figure.suptitle(f"{title}\n{when}", fontsize=10)
    entries: dict[str, Any] = {}
    for axes in [source] if source else figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    ordered = sorted(entries)
    figure.legend(
        [entries[name] for name in ordered],
        ordered,
        loc="outside lower center",
        ncols=min(6, len(ordered)),
        fontsize=8,
        frameon=False,
    )

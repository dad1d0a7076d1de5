"""Makes Markdown tables of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .results import LOSS, Group, Result, geometric_mean
from .rivals import RIVALS
from .shapes import BOTH, CELLS, FORWARD, TRAINING

CELL_TITLES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
NOTHING = "–"


def table(header: Sequence[str], lines: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Makes a table whose first `left` columns are text and the others numbers."""
    rule = [":--"] * left + ["--:"] * (len(header) - left)
    rows = [header, rule, *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def number(value: float | None, digits: int = 3) -> str:
    """Writes a number with `digits` significant digits and without an exponent."""
    if value is None:
        return NOTHING
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def ms(seconds: float | None) -> str:
    """Writes seconds as milliseconds."""
    return NOTHING if seconds is None else number(1e3 * seconds)


def ratio_text(value: float | None) -> str:
    """Writes a ratio, in bold if it is a loss."""
    if value is None:
        return NOTHING
    return f"**{value:.2f}**" if value < LOSS else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def status_text(row: Result | None) -> str | None:
    """The text in place of a number for a row that was not timed, or None."""
    if row is None:
        return NOTHING
    return {"ok": None, "red": "🔴 wrong", "failed": "🔴 failed"}.get(row["status"], row["status"])


def shapes_of(rows: Iterable[Result]) -> list[str]:
    """Returns the shapes of some rows, each once."""
    return list(dict.fromkeys(row["shape"] for row in rows))


def ratios(group: Group, name: str) -> str:
    """Makes the table of a set's ratios: a line per shape, a column per cell and mode.

    A field has the ratios for each number of threads.
    """
    rows = group.of_set(name)
    threads = sorted({row["threads"] for row in rows})
    found = {(r["shape"], r["cell"], r["mode"], r["threads"]): r for r in rows}
    columns = [
        (cell, mode)
        for cell in CELLS
        for mode in BOTH
        if any(r["cell"] == cell and r["mode"] == mode for r in rows)
    ]

    def text(row: Result | None) -> str:
        return status_text(row) or ratio_text(row["ratio"] if row else None)

    lines = []
    for shape in shapes_of(rows):
        cells = [[text(found.get((shape, *column, n))) for n in threads] for column in columns]
        if {t for c in cells for t in c} <= {NOTHING, "not run"}:
            continue  # the list of rows that were not run has it
        lines.append([shape, *(" / ".join(c) if len(set(c)) > 1 else c[0] for c in cells)])
    means = []
    for cell, mode in columns:
        every = (timed_ratios(r for r in rows if _is(r, cell, mode, n)) for n in threads)
        means.append(" / ".join(ratio_text(geometric_mean(values)) for values in every))
    lines.append(["geometric mean", *means])
    header = "T,N,I,H (" + " / ".join(_threads(n) for n in threads) + ")"
    titles = [f"{CELL_TITLES[cell]} {mode}" for cell, mode in columns]
    return table([header, *titles], lines)


def timed_ratios(rows: Iterable[Result]) -> list[float]:
    """The ratios of the rows that were timed."""
    return [row["ratio"] for row in rows if row["status"] == "ok"]


def verdict(rows: Sequence[Result]) -> str:
    """Says in a sentence the geometric mean and the numbers of losses and of red rows."""
    values = timed_ratios(rows)
    losses = sum(value < LOSS for value in values)
    red = sum(row["status"] in ("red", "failed") for row in rows)
    idle = sum(row["status"] == "not run" for row in rows)
    words = [f"{len(values)} medians, geometric mean {ratio_text(geometric_mean(values))}"]
    words.append(f"{losses} below {LOSS}" if losses else f"none below {LOSS}")
    words += [f"{red} wrong or failed"] if red else []
    words += [f"{idle} not run"] if idle else []
    return "; ".join(words) + "."


def figures(group: Group, name: str, threads: int) -> str:
    """Makes the table of all figures of a set's rows with `threads` threads."""
    lines = []
    for row in group.of_set(name):
        if row["threads"] != threads or row["status"] == "not run":
            continue
        start = [CELL_TITLES[row["cell"]], row["shape"], row["mode"]]
        if row["status"] != "ok":
            lines.append([*start, status_text(row), *[NOTHING] * 6])
            continue
        ours, floor = row["ours"], row["floor"]
        peak = floor["peak"] / ours["median"] if floor["peak"] else None
        lines.append(
            [
                *start,
                _spread(ours),
                _spread(row["torch"]),
                ratio_text(row["ratio"]),
                number(row["flops"] / ours["median"] / 1e9),
                ms(floor["seconds"]),
                _percent(row["part_of_floor"]),
                _percent(peak),
            ]
        )
    header = ["cell", "T,N,I,H", "mode", "ours, ms", "torch.nn, ms", "ratio", "GFLOP/s"]
    return table([*header, "floor, ms", "of floor", "of peak"], lines, left=3)


def rivals(group: Group, name: str, mode: str, threads: int) -> str | None:
    """Makes the table of our times and every library's, or None if no rival has a result."""
    there = [rival for rival in RIVALS if any(key[0] == rival for key in group.rivals)]
    lines, best = [], []
    for row in group.of_set(name):
        if row["threads"] != threads or row["mode"] != mode or row["status"] != "ok":
            continue
        ours = row["ours"]["median"]
        found = [group.rivals.get((rival, row["name"], mode, threads)) for rival in there]
        times = [r["time"]["median"] for r in found if r and r["status"] == "ok"]
        if times:
            best.append(min(times) / ours)
        texts = [ms(r["time"]["median"]) if r and r["status"] == "ok" else _short(r) for r in found]
        nearest = ratio_text(best[-1]) if times else NOTHING
        start = [CELL_TITLES[row["cell"]], row["shape"], ms(ours), ms(row["torch"]["median"])]
        lines.append([*start, *texts, nearest])
    if not best:
        return None
    blank = [NOTHING] * (len(there) + 2)
    lines.append(["geometric mean", "", *blank, ratio_text(geometric_mean(best))])
    header = ["cell", "T,N,I,H", "ours", "torch.nn", *(RIVALS[rival][1] for rival in there)]
    return table([*header, "best of them over ours"], lines, left=2)


def rates(group: Group) -> str:
    """Makes the table of the floors' rates: products, multiply-add units, reading U."""
    lines = []
    for threads, found in sorted(group.rates.items()):
        if found.get("peak"):
            lines.append(
                [_threads(threads), "peak of the multiply-add units, float32",
                 f"{number(found['peak'] / 1e9)} GFLOP/s"]
            )  # fmt: skip
        squares: dict[tuple[str, str], float] = {}
        for product in found["products"]:
            if len(set(product["sizes"])) == 1:
                for library, rate in product["rates"].items():
                    key = product["dtype"], library
                    squares[key] = max(rate, squares.get(key, 0))
        for (dtype, library), rate in squares.items():
            what = f"large square products, {dtype}, {library}"
            lines.append([_threads(threads), what, f"{number(rate / 1e9)} GFLOP/s"])
        for read in sorted(found["bandwidth"], key=lambda read: read["bytes"]):
            if read["rate"]:
                what = f"reading {read['bytes'] / 1024:,.0f} KiB again and again"
                lines.append([_threads(threads), what, f"{number(read['rate'] / 1e9)} GB/s"])
    return table(["threads", "what", "rate"], lines, left=2)


def memory(group: Group) -> str:
    """Makes the table of memory kept for backward, and of peaks, in MB: ours / torch.nn's."""

    def pair(row: Result | None, key: str) -> list[str]:
        if row is None or row["status"] != "ok":
            return [NOTHING, NOTHING]
        sides = (row[side].get(key) for side in ("ours", "torch"))
        return [number(v / 1e6) if v is not None else NOTHING for v in sides]

    found = {(row["cell"], row["shape"], row["mode"]): row for row in group.memory.values()}
    lines = []
    for cell, shape in dict.fromkeys(key[:2] for key in found):
        training, forward = (found.get((cell, shape, mode)) for mode in (TRAINING, FORWARD))
        columns = [pair(training, key) for key in ("kept", "allocated", "resident")]
        columns.append(pair(forward, "beyond_outputs"))
        lines.append([CELL_TITLES[cell], shape, *(" / ".join(column) for column in columns)])
    header = ["cell", "T,N,I,H", "kept for backward", "peak of a training step"]
    header += ["the same, resident", "inference, beyond outputs"]
    return table(header, lines, left=2)


def contention(group: Group) -> str:
    """Makes the table of times beside other processes, with the worst over the idle median."""
    lines = []
    for row in group.contention.values():
        start = [CELL_TITLES[row["cell"]], row["shape"], row["mode"]]
        if row["status"] != "ok":
            lines.append([*start, status_text(row), *[NOTHING] * 6])
            continue
        idle = row["beside"]["nothing"]
        for company, sides in row["beside"].items():
            columns: list[str] = []
            for side in ("ours", "torch"):
                slower = sides[side]["worst"] / idle[side]["median"]
                columns += [ms(sides[side]["median"]), ms(sides[side]["worst"]), f"{slower:.1f}"]
            lines.append([*start, company, *columns])
    header = ["cell", "T,N,I,H", "mode", "beside", "ours, ms", "worst", "worst over idle"]
    return table([*header, "torch.nn, ms", "worst", "worst over idle"], lines, left=4)


def _spread(time: Result) -> str:
    return f"{ms(time['median'])} ({ms(time['p10'])} to {ms(time['p90'])})"


def _percent(part: float | None) -> str:
    return NOTHING if part is None else f"{part:.0%}".replace("%", " %")


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def _short(row: Result | None) -> str:
    return NOTHING if row is None or row["status"] == "unsupported" else str(status_text(row))


def _is(row: Result, cell: str, mode: str, threads: int) -> bool:
    return (row["cell"], row["mode"], row["threads"]) == (cell, mode, threads)

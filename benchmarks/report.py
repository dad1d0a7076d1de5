"""Writes docs/benchmarks.md with its pictures, and the measured part of the README."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from . import plots, tables
from .results import Group, Result, group, load
from .shapes import BOTH, SETS

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
TITLES = {
    "core": "Core",
    "deepbench": "DeepBench",
    "packed": "Packed sequences, projection, float64",
    "bf16": "bfloat16",
    "scaling": "Scaling",
    "overhead": "One call",
}
_HOW = """\
A ratio is torch.nn's median time over ours. Above 1 our layer is faster; **bold** is a loss (below
0.97). torch.nn and our layer take turns in one process. Every other library runs alone in its own
process, with the same weights and input. Forward is inference; training is forward, and backward to
all parameters and the input. Before a row is timed, its outputs and gradients are compared with
torch.nn in the next wider dtype; 🔴 marks a row that failed, which has no time. The numbers in
parentheses are the 10th and the 90th percentile.

The floor is the larger of two times. One is the time of the row's FLOPs at the best rate of any
matrix product in the same process (torch.mm and oneDNN, at the row's own shapes and on large
squares). The other is the time of reading the bytes of U at each step, at the bandwidth measured
for an array of that size."""


def write(paths: Sequence[Path], docs: Path | None, readme: Path | None) -> None:
    """Renders result files.

    Args:
        paths: the result files; if two have results for a row, the later one counts.
        docs: the Markdown file to write; pictures go to images/ beside it.
        readme: the file in which the part between two comments is replaced.

    Raises:
        SystemExit: a result file or the README is not what it should be.
    """
    try:
        groups = group(load(path) for path in paths)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    if docs:
        docs.parent.mkdir(parents=True, exist_ok=True)
        parts = ["# Benchmarks", "", _made_by(paths, docs), "", _HOW]
        for number, one in enumerate(groups):
            prefix = f"benchmarks-{one.machine['isa']}-{number}" if number else "benchmarks"
            parts += ["", _group(one, _Pictures(docs.parent, docs.parent / "images", prefix))]
        docs.write_text("\n".join(parts) + "\n")
    if readme:
        _replace(readme, groups[0])


class _Pictures:
    """Saves figures and gives the Markdown that shows them."""

    def __init__(self, base: Path, folder: Path, prefix: str) -> None:
        self.base, self.folder, self.prefix = base, folder, prefix

    def show(self, name: str, text: str, figure: Figure | None) -> list[str]:
        if figure is None:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.prefix}-{name}.png"
        figure.savefig(path, dpi=130, metadata={"Software": None})
        return ["", f"![{text}]({os.path.relpath(path, self.base)})"]


def _group(one: Group, pictures: _Pictures) -> str:
    """Makes all sections of one machine."""
    parts = [f"## {one.title}", "", machine_table(one)]
    for name in [name for name in SETS if name in one.sets()]:
        rows = one.of_set(name)
        parts += ["", f"### {TITLES[name]}", "", tables.verdict(rows), ""]
        parts.append(tables.ratios(one, name))
        parts += pictures.show(f"{name}-ratio", f"ratios of {name}", plots.ratio(one, name))
        if name == "scaling":
            parts += pictures.show("scaling", "time against T, N and H", plots.scaling(one))
        figure = plots.part_of_floor(one, name)
        parts += pictures.show(f"{name}-floor", f"part of the floor, {name}", figure)
        parts += _rivals(one, name, pictures)
        for threads in one.threads():
            title = f"All figures, {threads} thread{'s' * (threads > 1)}"
            parts += _folded(title, tables.figures(one, name, threads))
        parts += _list("Not run", [row for row in rows if row["status"] == "not run"])
        bad = [row for row in rows if row["status"] in ("red", "failed")]
        parts += _list("🔴 Wrong or failed, not timed", bad)
    if one.memory:
        parts += ["", "### Memory", "", _MEMORY, "", tables.memory(one)]
        parts += pictures.show("memory", "memory", plots.memory(one))
    if one.contention:
        parts += ["", "### Beside other processes", "", _contention(one), ""]
        parts.append(tables.contention(one))
    if one.rates:
        parts += _folded("Rates behind the floors", tables.rates(one))
    return "\n".join(parts)


_MEMORY = """\
The table has our memory / torch.nn's, in MB. Kept for backward is the memory that autograd holds
after forward, beside the input and the parameters. A peak is counted from the start of the step; it
is that of torch's allocator, and of the whole process's resident memory."""


def _contention(one: Group) -> str:
    threads = {row["threads"] for row in one.contention.values()}
    return (
        f"The layers ran with {max(threads)} threads beside other processes, which were not pinned "
        "to a core. Each figure is the median or the worst of five trials, and each trial had new "
        "processes. The last column is the worst time over the median time on the idle machine."
    )


def _rivals(one: Group, name: str, pictures: _Pictures) -> list[str]:
    """Makes the tables and the picture of the other libraries."""
    parts: list[str] = []
    for mode in BOTH:
        for threads in one.threads():
            text = tables.rivals(one, name, mode, threads)
            if text:
                title = f"{mode.capitalize()}, {threads} thread{'s' * (threads > 1)}, ms:"
                parts += ["", title, "", text]
    if parts:
        found = {rival: version for rival, version in one.rival_versions.items() if version}
        absent = [rival for rival, version in one.rival_versions.items() if not version]
        line = "Other libraries: " + "; ".join(found.values())
        line += f". Not installed: {', '.join(absent)}" if absent else ""
        parts = ["", f"{line}.", *parts]
        parts += pictures.show(f"{name}-rivals", f"rivals, {name}", plots.rivals(one, name))
    elif one.rival_versions and not any(one.rival_versions.values()):
        parts = ["", f"Other libraries, not installed: {', '.join(one.rival_versions)}."]
    return parts


def _list(title: str, rows: Sequence[Result]) -> list[str]:
    if not rows:
        return []
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        groups.setdefault((row["name"], row["mode"], row["why"]), []).append(threads)
    lines = [
        f"- {name}, {mode}, {' and '.join(n)}: {why}" for (name, mode, why), n in groups.items()
    ]
    return _folded(f"{title} ({len(rows)})", "\n".join(lines))


def _folded(title: str, text: str) -> list[str]:
    """Makes a part that is folded until the reader opens it."""
    return ["", f"<details><summary>{title}</summary>", "", text, "", "</details>"]


def machine_table(one: Group) -> str:
    """Makes the table of machines, dates and versions, with a column per run."""
    facts: dict[str, Callable[[Result], str]] = {
        "date": lambda m: m["date"][:16].replace("T", " "),
        "commit": lambda m: (m["commit"] or "?")[:12] + " and changes" * bool(m["changed_files"]),
        "fusedrnn": lambda m: f"{m['fusedrnn']}, {m['isa']}",
        "torch": lambda m: f"{m['torch']}, {m['torch_capability']}",
        "MKL, oneDNN": lambda m: f"{m['mkl']}, {m['onednn']}",
        "Python, libc, kernel": lambda m: f"{m['python']}, {m['libc']}, {m['kernel']}",
        "caches": lambda m: ", ".join(f"{k} {v / 1024:,.0f} KiB" for k, v in m["caches"].items()),
        "CPU flags": lambda m: " ".join(m["cpu_flags"]),
        "environment": lambda m: " ".join(f"{k}={v}" for k, v in m["environment"].items()) or "–",
        "load before": lambda m: ", ".join(f"{x:.1f}" for x in m["load_before"]),
        "load after": lambda m: ", ".join(f"{x:.1f}" for x in m["load_after"]),
    }
    machines = [run["machine"] for run in one.runs]
    sets = [", ".join(run["settings"]["sets"]) for run in one.runs]
    seconds = [f"{run['settings']['seconds']:g}" for run in one.runs]
    lines = [["sets", *sets], ["seconds a row and mode", *seconds]]
    lines += [[name, *(fact(machine) for machine in machines)] for name, fact in facts.items()]
    # A value that is the same as in run 1 is not repeated.
    lines = [
        [line[0], line[1], *("as run 1" if text == line[1] else text for text in line[2:])]
        for line in lines
    ]
    header = ["", *(f"run {n}" if len(machines) > 1 else "" for n in range(1, len(machines) + 1))]
    return tables.table(header, lines, left=len(header))


def _made_by(paths: Sequence[Path], docs: Path) -> str:
    """Says which command made the file, with links to the raw numbers."""
    links = ", ".join(f"[{path.name}]({os.path.relpath(path, docs.parent)})" for path in paths)
    return f"`python -m benchmarks report` made this page from {links}; do not edit it."


def _replace(readme: Path, one: Group) -> None:
    """Puts the table and the picture of the core set between the comments."""
    text = readme.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise SystemExit(f"error: {readme} must have {START} and after it {END}, once each")
    rows = one.of_set("core")
    if not rows:
        raise SystemExit("error: the README's table is of the core set, which was not run")
    machine = one.machine
    pictures = _Pictures(readme.parent, readme.parent / "docs" / "images", "benchmarks")
    shown = pictures.show("core-ratio", "torch.nn's time over ours", plots.ratio(one, "core"))
    rivals = [version for version in one.rival_versions.values() if version]
    where = (
        "The table has torch.nn's median time over ours in float32. It was measured on "
        f"{machine['date'][:10]} on {machine['cpu']} ({machine['isa']}, {machine['cores']} cores), "
        f"with fusedrnn {machine['fusedrnn']}, torch {machine['torch']}"
        f"{''.join(', ' + version for version in rivals)}. Forward is inference, and training is "
        "forward and backward; **bold** is a loss."
    )
    parts = ["", where, "", tables.ratios(one, "core"), "", tables.verdict(rows), *shown, ""]
    replacement = "\n".join([START, *parts, END])
    pattern = re.escape(START) + r".*?" + re.escape(END)
    readme.write_text(re.sub(pattern, lambda _: replacement, text, flags=re.DOTALL))

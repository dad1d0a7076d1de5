"""Keeps results: a folder of benchmarks/results for each run, and "Measured" in docs/cuda.md."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from .facts import ROOT
from .report import timing_table
from .results import Results, load

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
FILES = ("run.json", "summary.txt", "log.txt", "checks.jsonl", "bench.jsonl")
OPTIONAL_FILES = ("profile.txt", "sanitizer.txt", "report.md")
NOTHING = "**Nothing here has run on a GPU yet.**"


def keep(folder: Path) -> Path:
    """Copies the results of a run, raw as they are, and rewrites the docs.

    Returns:
        Their new folder; a second run of a card on one day gets a number behind its name.
    """
    name = load(folder).folder_name
    target, number = RESULTS / name, 2
    while target.exists():
        target, number = RESULTS / f"{name}-{number}", number + 1
    target.mkdir(parents=True)
    for file in (*FILES, *OPTIONAL_FILES):
        if (folder / file).exists():
            # Not copy: what was fetched from another machine may be read-only.
            shutil.copyfile(folder / file, target / file)
    write_docs()
    return target


def write_docs(check: bool = False) -> int:
    """Makes the section of docs/cuda.md anew; with `check` 1 if it is not what is there."""
    before = DOCS.read_text()
    head, rest = before.split(BEGIN)
    tail = rest.split(END)[1]
    runs = [load(path) for path in sorted(RESULTS.glob("gpu-*")) if path.is_dir()]
    after = head + BEGIN + "\n" + "\n".join(measured(runs)) + "\n" + END + tail
    if check:
        if before != after:
            print(f"{DOCS.name} is not what `python -m tools.gpu keep` makes of the results")
        return int(before != after)
    DOCS.write_text(after)
    return 0


def measured(runs: list[Results]) -> Iterator[str]:
    """The lines of the section."""
    yield ""
    if not runs:
        yield NOTHING
        yield ""
        return
    for found in sorted(runs, key=lambda run: str(run.run["started"]), reverse=True):
        yield f"### {found.card}, {found.date}"
        yield ""
        yield f"{found.software()}. {found.verdict()}."
        yield ""
        if found.rows():
            yield from timing_table(found.rows())
        else:
            yield "No row was timed."
        yield ""

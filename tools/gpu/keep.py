"""Keeps results: copies each run to benchmarks/results, and writes "Measured" in docs/cuda.md."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from .facts import ROOT
from .report import missed_list, sweep_table, timing_table
from .results import Results, load
from .swept import groups

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
FILES = ("run.json", "summary.txt", "log.txt", "checks.jsonl", "bench.jsonl")
OPTIONAL_FILES = ("profile.txt", "sanitizer.txt", "report.md")
NOTHING = "**Nothing here has run on a GPU yet.**"


def keep(folder: Path) -> Path:
    """Copies the raw results of a run and rewrites the docs.

    Returns:
        The new folder; if a card has several runs on a day, a number is added to the name.

    Raises:
        ValueError: there are no results of a GPU in the folder, or they are kept already.
    """
    new = load(folder)
    if not new.on_gpu:
        raise ValueError(f"{folder} holds results without a GPU: {new.verdict()}")
    kept = kept_runs()
    if same := [run for run in kept if run.run["started"] == new.run["started"]]:
        raise ValueError(f"{folder}: the run of {same[0].run['started']} is kept already")
    page = with_section([*kept, new])  # before anything is copied: it may fail
    target, number = RESULTS / new.folder_name, 2
    while target.exists():
        target, number = RESULTS / f"{new.folder_name}-{number}", number + 1
    target.mkdir(parents=True)
    for file in (*FILES, *OPTIONAL_FILES):
        if (folder / file).exists():
            # Unlike copy, this makes a file that can be written even if the source is read-only.
            shutil.copyfile(folder / file, target / file)
    DOCS.write_text(page)
    return target


def kept_runs() -> list[Results]:
    """The results in the repository."""
    return [load(path) for path in sorted(RESULTS.glob("gpu-*")) if path.is_dir()]


def with_section(runs: list[Results]) -> str:
    """Returns docs/cuda.md with a section about these runs."""
    head, rest = DOCS.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    return head + BEGIN + "\n" + "\n".join(measured(runs)) + "\n" + END + tail


def write_docs(check: bool = False) -> int:
    """Writes the section of docs/cuda.md; with `check` only returns 1 if it would change."""
    page = with_section(kept_runs())
    if not check:
        DOCS.write_text(page)
        return 0
    if page == DOCS.read_text():
        return 0
    print(f"{DOCS.name} is not what `python -m tools.gpu keep` makes of the results")
    return 1


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
            yield from missed_list(found.rows())
            if others := groups(found.bench):
                yield from ("", *sweep_table(others))
        else:
            yield "No row was timed."
        yield ""

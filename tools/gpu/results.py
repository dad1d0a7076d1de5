"""Reads a folder of results."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
# Sections of checks that fail where numbers are wrong.
NUMBERS = (
    *("parity", "where", "products", "determinism", "modules", "offsets", "graphs"),
    *("cold capture", "allocator", "two devices", "stress", "two streams"),
)

Fields = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What a run left."""

    run: Fields  # run.json
    checks: list[Fields]
    bench: list[Fields]

    @property
    def card(self) -> str:
        """The GPU's name, or the processor where there was none."""
        return str(self.run["facts"].get("gpu", {}).get("name") or "no GPU")

    @property
    def on_gpu(self) -> bool:
        """Whether something ran on a GPU."""
        return "name" in self.run["facts"].get("gpu", {}) and bool(self.checks or self.rows())

    @property
    def date(self) -> str:
        """The day of the run."""
        return str(self.run["started"])[:10]

    @property
    def folder_name(self) -> str:
        """What its folder among the results is called: gpu-h200-2026-11-29."""
        plain = re.sub(r"^(nvidia|tesla)\s+", "", self.card.lower())
        return f"gpu-{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}-{self.date}"

    def software(self) -> str:
        """Driver, torch and cuDNN."""
        facts = self.run["facts"]
        torch, smi = facts.get("torch", {}), facts.get("nvidia_smi", {})
        return (
            f"driver {smi.get('driver_version', 'unknown')}, torch {torch.get('version', '?')}, "
            f"cuDNN {torch.get('cudnn', '?')}, sources {facts.get('sources', '?')}"
        )

    def with_result(self, result: str) -> list[Fields]:
        """The checks that ended so."""
        return [check for check in self.checks if check.get("result") == result]

    def lost(self) -> list[Fields]:
        """The tasks that did not come to their end."""
        return [task for task in self.checks if task.get("ended", "ok") != "ok"]

    def rows(self) -> list[Fields]:
        """The rows of the benchmark."""
        return [row for row in self.bench if row["kind"] == "row"]

    def rates(self) -> Fields | None:
        """The rates measured beside the rows; of several the last."""
        found = [line for line in self.bench if line["kind"] == "rates"]
        return found[-1] if found else None

    def verdict(self) -> str:
        """In a line: whether all that was looked at is right."""
        failed = [step for step in self.run["steps"] if step["result"] == "failed"]
        parts = [
            f"{len(self.with_result('passed'))} checks passed",
            f"{len(self.with_result('failed'))} failed",
            f"{len(self.with_result('not run'))} not run",
        ]
        bad = [row for row in self.rows() if row["status"] in ("red", "failed")]
        parts += [f"{len(bad)} rows wrong"] if bad else []
        parts += [f"steps that failed: {', '.join(s['name'] for s in failed)}"] if failed else []
        cut = [s["name"] for s in self.run["steps"] if s["result"] == "unfinished"]
        parts += [f"out of time in: {', '.join(cut)}"] if cut else []
        return ", ".join(parts)


def one_line(text: object) -> str:
    """A text without ends of lines, as of torch's errors, for a line of a table."""
    return " ".join(str(text).split())


def three_times(times: Fields) -> str:
    """Microseconds of a variant: call/graph/alone, a dash for what was not measured."""
    return "/".join(f"{times[k]:.0f}" if k in times else "-" for k in ("call", "graph", "alone"))


def load(folder: Path) -> Results:
    """Reads a folder.

    Raises:
        ValueError: it holds no results of this format.
    """
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no results of a run: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{folder / 'run.json'} is not of format {FORMAT}")
    for key, kind in (("started", str), ("facts", dict), ("steps", list)):
        if not isinstance(run.get(key), kind):
            raise ValueError(f"{folder / 'run.json'} has no {key}")
    bench = lines(folder / "bench.jsonl")
    for number, line in enumerate(bench, 1):
        if "kind" not in line or (line.get("status") == "ok" and "times" not in line):
            raise ValueError(f"{folder / 'bench.jsonl'}, line {number} is no row of a benchmark")
    return Results(run, lines(folder / "checks.jsonl"), bench)


def lines(path: Path) -> list[Fields]:
    """The lines of a file of JSON; a last one that was cut off counts for nothing."""
    if not path.exists():
        return []
    text = path.read_text()
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        value = json.loads(line) if line.startswith("{") else None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} is no object of JSON")
        found.append(value)
    return found


def numbers_are_wrong(checks: list[Fields]) -> bool:
    """Whether a check of numbers failed, or a task hung or died."""
    return any(
        (check.get("result") == "failed" and check.get("section") in NUMBERS)
        or check.get("ended", "").startswith(("lost", "the context"))
        for check in checks
    )

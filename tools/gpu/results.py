"""Reads a folder of results."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
# The sections of checks that fail if numbers are wrong.
NUMBERS = (
    *("parity", "where", "products", "determinism", "modules", "offsets", "graphs"),
    *("cold capture", "allocator", "two devices", "stress", "two streams", "from L2"),
)

Fields = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The results of a run."""

    run: Fields  # run.json
    checks: list[Fields]
    bench: list[Fields]

    @property
    def card(self) -> str:
        """The GPU's name, or "no GPU"."""
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
        """The name of the run's folder among the results: gpu-h200-2026-11-29."""
        plain = re.sub(r"^(nvidia|tesla)\s+", "", self.card.lower())
        return f"gpu-{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}-{self.date}"

    def software(self) -> str:
        """The versions of the driver, torch and cuDNN, and the checksum of the sources."""
        facts = self.run["facts"]
        torch, smi = facts.get("torch", {}), facts.get("nvidia_smi", {})
        return (
            f"driver {smi.get('driver_version', 'unknown')}, torch {torch.get('version', '?')}, "
            f"cuDNN {torch.get('cudnn', '?')}, sources {facts.get('sources', '?')}"
        )

    def with_result(self, result: str) -> list[Fields]:
        """The checks with a result: "passed", "failed" or "not run"."""
        return [check for check in self.checks if check.get("result") == result]

    def lost(self) -> list[Fields]:
        """The tasks that did not finish."""
        return [task for task in self.checks if task.get("ended", "ok") != "ok"]

    def rows(self) -> list[Fields]:
        """The rows of the benchmark."""
        return [row for row in self.bench if row["kind"] == "row"]

    def rates(self) -> Fields | None:
        """The rates measured with the rows, or the last ones if there are several."""
        found = [line for line in self.bench if line["kind"] == "rates"]
        return found[-1] if found else None

    def verdict(self) -> str:
        """Says in a line whether everything that was checked is right."""
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
    """Joins the lines of a text, such as an error of torch, for a line of a table."""
    return " ".join(str(text).split())


def three_times(times: Fields) -> str:
    """Microseconds of a variant as call/graph/alone, with a dash for a missing time."""
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
    """Reads a file with a JSON object per line; an incomplete last line is ignored."""
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

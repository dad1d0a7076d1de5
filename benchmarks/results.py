"""Writes result files so that git can show a change, and reads and combines them for reports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
Result = dict[str, Any]
Key = tuple[str, str, int]  # row name, mode, threads
# Below this ratio our layer counts as slower: two equal layers may differ by as much.
LOSS = 0.97


def save(found: Result, path: Path) -> None:
    """Writes a run with one line per row and six digits per number."""
    parts = []
    for key, value in found.items():
        if isinstance(value, list) and value:
            lines = ",\n  ".join(json.dumps(_rounded(item)) for item in value)
            text = f"[\n  {lines}\n ]"
        else:
            text = json.dumps(_rounded(value))
        parts.append(f' "{key}": {text}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def load(path: Path) -> Result:
    """Reads a run.

    Raises:
        ValueError: the file does not have this format.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result file of format {FORMAT}")
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


@dataclass
class Group:
    """All runs on one processor with one instruction set.

    If two runs have results for a row, the later one counts.
    """

    runs: list[Result] = field(default_factory=list)
    rows: dict[Key, Result] = field(default_factory=dict)
    # The keys are rival, row name, mode and threads.
    rivals: dict[tuple[str, str, str, int], Result] = field(default_factory=dict)
    memory: dict[Key, Result] = field(default_factory=dict)
    contention: dict[Key, Result] = field(default_factory=dict)
    rates: dict[int, Result] = field(default_factory=dict)
    rival_versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def machine(self) -> Result:
        """The header of the latest run."""
        described: Result = self.runs[-1]["machine"]
        return described

    @property
    def title(self) -> str:
        """The heading of the group."""
        machine = self.machine
        return f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}"

    def threads(self) -> list[int]:
        """The numbers of threads that rows were timed with."""
        return sorted({threads for _, _, threads in self.rows})

    def of_set(self, name: str) -> list[Result]:
        """The timed rows of a set, forward before training."""
        rows = [row for row in self.rows.values() if name in row["sets"]]
        place = {row["name"]: i for i, row in enumerate(reversed(rows))}
        return sorted(rows, key=lambda row: (-place[row["name"]], row["mode"], row["threads"]))

    def sets(self) -> list[str]:
        """The sets that have timed rows."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row["sets"]))

    def add(self, run: Result) -> None:
        """Puts another run into the group."""
        self.runs.append(run)
        for row in run["rows"]:
            old = self.rows.get(_key(row), {"sets": []})
            self.rows[_key(row)] = row | {"sets": list(dict.fromkeys(old["sets"] + row["sets"]))}
        for row in run["rivals"]:
            self.rivals[row["rival"], row["row"], row["mode"], row["threads"]] = row
        self.memory |= {_key(row): row for row in run["memory"]}
        self.contention |= {_key(row): row for row in run["contention"]}
        self.rates |= {int(threads): rates for threads, rates in run["rates"].items()}
        self.rival_versions |= run["rival_versions"]


def group(runs: Iterable[Result]) -> list[Group]:
    """Groups runs by processor and instruction set, each group in the order of its dates."""
    together: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        machine = run["machine"]
        together.setdefault((machine["cpu"], machine["isa"]), []).append(run)
    groups = []
    for found in together.values():
        groups.append(Group())
        for run in sorted(found, key=lambda run: str(run["machine"]["date"])):
            groups[-1].add(run)
    return groups


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean, or None if there are no values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _key(row: Result) -> Key:
    return row["name"], row["mode"], row["threads"]

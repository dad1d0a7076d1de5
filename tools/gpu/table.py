"""Turns timed rows into csrc/cuda/measured.h, the table of measurements that the plan follows.

python -m tools.gpu choices benchmarks/results/gpu-*/bench.jsonl --table csrc/cuda/measured.h
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .fastest import NOISE, calls_of
from .results import Fields, lines
from .swept import Group, groups
from .tasks import REGIMES

# A row with fewer steps says more about the begin of a call than about a step.
LEAST_STEPS = 10
WIDEST = 100

HEAD = """\
// What was fastest in runs on GPUs, which the plan follows for layers of about these sizes.
// `python -m tools.gpu choices FILE... --table csrc/cuda/measured.h` makes this file from the files
// bench.jsonl of all such runs (docs/gpu-run.md).
#pragma once

#include <array>

#include "measurement.h"

namespace fusedrnn::cuda {

// card, date, cell, dtype, tf32, backward, D, N, H, P, regime, choice
"""
TAIL = """
}  // namespace fusedrnn::cuda
"""


@dataclass(frozen=True, order=True)
class Layer:
    """What a measurement is about, as the plan looks for it."""

    card: str  # the driver's name
    cell: str
    dtype: str
    tf32: bool
    backward: bool
    D: int
    N: int
    H: int
    P: int


@dataclass(frozen=True)
class Entry:
    """The regime and the choice that were fastest for a layer in the run of a day."""

    layer: Layer
    date: str
    T: int
    regime: str
    choice: str

    def as_text(self) -> Iterator[str]:
        """The lines of the header. Strings of JSON are strings of C++."""
        of = self.layer
        words = [json.dumps(text) for text in (of.card, self.date, of.cell, of.dtype)]
        words += [str(flag).lower() for flag in (of.tf32, of.backward)]
        words += map(str, (of.D, of.N, of.H, of.P))
        words += map(json.dumps, (self.regime, self.choice))
        line = "    {" + words[0]
        for word in words[1:]:
            if len(f"{line}, {word}}},") > WIDEST:
                yield f"{line},"
                line = f"     {word}"
            else:
                line += f", {word}"
        yield f"{line}}},"


def header(entries: Sequence[Entry]) -> str:
    """The text of measured.h."""
    begin = f"inline constexpr std::array<Measurement, {len(entries)}> kMeasured = {{"
    if not entries:
        return f"{HEAD}{begin}}};\n{TAIL}"
    body = "\n".join(line for entry in entries for line in entry.as_text())
    return f"{HEAD}// clang-format off\n{begin}{{\n{body}\n}}}};\n// clang-format on\n{TAIL}"


def entries(paths: Iterable[Path]) -> list[Entry]:
    """What was fastest for each layer. Of several runs of a layer, the last day's counts.

    Raises:
        ValueError: no file has a timed row, or one has rows of several GPUs or of none.
    """
    found: dict[Layer, Entry] = {}
    paths = list(paths)
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is no file")
        for entry in _entries(lines(path), path):
            other = found.get(entry.layer)
            if other is None or (entry.date, entry.T) > (other.date, other.T):
                found[entry.layer] = entry
    if paths and not found:
        names = ", ".join(map(str, paths))
        raise ValueError(f"{names} has no row of {LEAST_STEPS} steps or more that was timed")
    return [found[layer] for layer in sorted(found)]


def _entries(bench: list[Fields], path: Path) -> Iterator[Entry]:
    rates = [line for line in bench if line.get("kind") == "rates"]
    if not rates:
        return
    cards = {line.get("gpu", "no GPU") for line in rates}
    if len(cards) != 1 or "no GPU" in cards:
        names = ", ".join(sorted(cards))
        raise ValueError(f"{path} must have rows of one GPU with its name, got those of {names}")
    rows = {(r["name"], r["mode"]): r for r in bench if r.get("kind") == "row" and calls_of(r)}
    swept = {(group.name, group.mode): group for group in groups(bench) if group.chosen}
    for name in dict.fromkeys(name for name, _ in (*rows, *swept)):
        forward = _Timed(rows.get((name, "forward")), swept.get((name, "forward")))
        training = _Timed(rows.get((name, "training")), swept.get((name, "training")))
        for which, chosen in (
            ("forward", forward.fastest()),
            ("backward", training.fastest_backward(forward)),
        ):
            line = (forward if which == "forward" else training).line
            if line is None or chosen is None or "packed" in name:
                continue
            T, N, _, H, P, D = line["sizes"]
            tf32 = line["precision"] == "tf32"
            dtype = "f32" if tf32 else line["precision"]
            if T >= LEAST_STEPS:
                backward = which == "backward"
                layer = Layer(*cards, line["cell"], dtype, tf32, backward, D, N, H, P)
                yield Entry(layer, rates[-1]["date"], T, *chosen)


@dataclass(frozen=True)
class _Timed:
    """What was timed of a row in a mode: in the regimes, and with other plans."""

    row: Fields | None
    group: Group | None

    @property
    def line(self) -> Fields | None:
        return self.row or (self.group.lines[0] if self.group else None)

    def swept(self) -> dict[tuple[str, str], float]:
        """Microseconds of a step of the whole call, the plan's choice first."""
        timed = self.group.timed if self.group else []
        timed = sorted(timed, key=lambda line: not line["chosen"])
        return {(line["regime"], line["choice"]): line["step"] for line in timed}

    def chosen(self, which: str) -> tuple[tuple[str, str], float] | None:
        """The plan's choice and its microseconds of a step, as the row has them.

        None if the choice followed a measurement: then the row does not say which blocks it had.
        """
        if not self.row or self.row.get("measured"):
            return None
        regime = self.row["by_pass"][which]
        return (regime, ""), self.row["times"]["ours"]["call"] / self.row["steps"]

    def regimes(self) -> dict[tuple[str, str], float]:
        """Microseconds of a step of the whole call, in the regimes that are not joined."""
        row = self.row
        if row is None:
            return {}
        unknown = row["chosen"] if row.get("measured") else ""
        steps = {regime: us / row["steps"] for regime, us in calls_of(row).items()}
        return {(key, ""): us for key, us in steps.items() if key in REGIMES and key != unknown}

    def fastest(self) -> tuple[str, str] | None:
        """What forward should run."""
        by_regime = self.regimes()
        if chosen := self.chosen("forward"):
            by_regime = {chosen[0]: chosen[1]} | by_regime
        return _pick(self.swept() | {k: v for k, v in by_regime.items() if k not in self.swept()})

    def fastest_backward(self, forward: _Timed) -> tuple[str, str] | None:
        """What backward should run: a training step less a forward call."""
        found: dict[tuple[str, str], float] = {}
        swept = self.swept()
        ours, theirs = self.chosen("backward"), forward.chosen("forward")
        # In a sweep over backward, forward is the plan's choice, which is the first.
        before = next(iter(forward.swept().values()), theirs[1] if theirs else None)
        if before is not None:
            found = {key: us - before for key, us in swept.items()}
        if ours and theirs:
            found.setdefault(ours[0], ours[1] - theirs[1])
        of_forward = forward.regimes()
        for key, us in self.regimes().items():
            if key in of_forward:
                found.setdefault(key, us - of_forward[key])
        whole = min([*swept.values(), *self.regimes().values()], default=0.0)
        return _pick({key: us for key, us in found.items() if us > 0}, whole)


def _pick(steps: dict[tuple[str, str], float], whole: float = 0.0) -> tuple[str, str] | None:
    """The fastest, or the first, which is the plan's choice, if that is hardly slower.

    `whole` is the time of the call whose part the times are; its noise counts.
    """
    steps = {key: us for key, us in steps.items() if key[0] in REGIMES}
    if not steps:
        return None
    first, best = next(iter(steps)), min(steps, key=steps.__getitem__)
    noise = (NOISE - 1) * max(whole, steps[best])
    return first if steps[first] <= steps[best] + noise else best

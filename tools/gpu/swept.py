"""Reads the results of a sweep over other plans (sweep.py): what was chosen, what was fastest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .fastest import NOISE, in_words
from .results import Fields


@dataclass(frozen=True)
class Group:
    """The lines about a row in a mode, of the last process that swept over it."""

    lines: list[Fields]

    @property
    def name(self) -> str:
        """The name of the row."""
        return str(self.lines[0]["name"])

    @property
    def mode(self) -> str:
        """Forward or training."""
        return str(self.lines[0]["mode"])

    @property
    def timed(self) -> list[Fields]:
        """The plans that were timed, the fastest first."""
        return sorted(
            (line for line in self.lines if line["status"] == "ok"), key=lambda line: line["step"]
        )

    @property
    def wrong(self) -> list[Fields]:
        """The plans that computed wrong results, or failed."""
        return [line for line in self.lines if line["status"] in ("red", "failed")]

    @property
    def chosen(self) -> Fields | None:
        """The plan's choice; None if it was not timed."""
        return next((line for line in self.timed if line["chosen"]), None)

    @property
    def fastest(self) -> Fields | None:
        """The fastest of the other plans; None if none was timed."""
        return next((line for line in self.timed if not line["chosen"]), None)

    @property
    def gain(self) -> float | None:
        """The time of the choice over that of the fastest other plan."""
        chosen, fastest = self.chosen, self.fastest
        return chosen["step"] / fastest["step"] if chosen and fastest else None

    @property
    def torch(self) -> float | None:
        """The microseconds of a step of torch.nn, which took turns with the plans."""
        for line in self.timed:
            if "torch" in line["times"]:
                return float(line["times"]["torch"]["call"] / line["steps"])
        return None


def groups(bench: Iterable[Fields]) -> list[Group]:
    """The rows and modes of a file of results that a sweep has lines about."""
    found: dict[tuple[str, str], list[Fields]] = {}
    for line in bench:
        key = (line.get("name", ""), line.get("mode", ""))
        if line["kind"] == "sweep begin":
            found[key] = []
        elif line["kind"] == "sweep":
            found.setdefault(key, []).append(line)
    return [Group(lines) for lines in found.values() if lines]


def words_of(line: Fields) -> str:
    """The regime and the choice of a plan."""
    return f"{in_words(line['regime'])} {line['choice']}".rstrip()


def missed(group: Group) -> str:
    """A line about a row for which another plan was clearly faster than the choice, else ""."""
    chosen, fastest, gain = group.chosen, group.fastest, group.gain
    if chosen is None or fastest is None or gain is None or gain <= NOISE:
        return ""
    return (
        f"{group.name} {group.mode}: {chosen['step']:.2f} us a step, "
        f"{words_of(fastest)} {fastest['step']:.2f}, x{gain:.2f}"
    )

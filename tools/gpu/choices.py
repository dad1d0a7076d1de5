"""Says which regime was fastest for which layer: a starting point for rules of the plan.

python -m tools.gpu choices build/gpu/bench.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .fastest import calls_of, in_words
from .results import Fields, lines


def choices(path: Path) -> Iterator[str]:
    """Yields the lines about a file of timed rows.

    Raises:
        ValueError: the file has no timed row with regimes, or is none of this kind.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    found = list(_choices(lines(path)))
    if not found:
        raise ValueError(f"{path} has no row that was timed in a regime")
    yield "us a step of a layer, the fastest regime first; * is what the plan chose."
    yield "backward is a training step less a forward call, which writes less than in training."
    yield from found


def _choices(bench: list[Fields]) -> Iterator[str]:
    card = ""
    forward: dict[str, Fields] = {}
    for line in bench:
        if line.get("kind") == "rates":
            new = f"{line.get('gpu') or line.get('card')}, {line.get('date', 'no date')}"
        elif line.get("kind") == "row" and calls_of(line):
            if new != card:
                card = new
                yield f"# {card}"
            yield from _of_row(line, forward.get(line["name"]))
            if line["mode"] == "forward":
                forward[line["name"]] = line


def _of_row(row: Fields, forward: Fields | None) -> Iterator[str]:
    """The lines of a row: of forward, or of backward if forward was timed before."""
    calls = calls_of(row)
    if row["mode"] == "forward":
        yield _line(row, "forward", calls)
    elif forward is not None:
        before = calls_of(forward)
        # Times of several regimes in one call cannot be told apart.
        both = {regime: calls[regime] - before[regime] for regime in calls if regime in before}
        if both:
            yield _line(row, "backward", both)


def _line(row: Fields, which: str, calls: Mapping[str, float]) -> str:
    T, N, _, H, P, D = row["sizes"]
    plain = f"{row['cell']} {row['precision']} N={N} H={H}"
    plain += f" P={P}" if P != H else ""
    plain += " D=2" if D == 2 else ""
    plain += " packed" if "packed" in row["name"] else ""
    plain += f" T={T} {which}: "
    return plain + _times(row, which, calls)


def _times(row: Fields, which: str, calls: Mapping[str, float]) -> str:
    chosen = row["by_pass"][which]
    words: list[Any] = [
        f"{in_words(regime)}{'*' if regime == chosen else ''} {us / row['steps']:.2f}"
        for regime, us in sorted(calls.items(), key=lambda item: item[1])
    ]
    words += [
        f"{in_words(regime)} not timed: {of['left_out']}"
        for regime, of in row["regimes"].items()
        if "left_out" in of
    ]
    return ", ".join(words)

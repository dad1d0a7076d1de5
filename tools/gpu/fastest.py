"""Which regime was fastest, by the results of the timed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The plan's regime counts as fastest if no other one is faster by more than this.
NOISE = 1.03


def summary(
    times: Mapping[str, Mapping[str, float]], left_out: Mapping[str, str], steps: int, floor: float
) -> dict[str, dict[str, Any]]:
    """What the results say about each regime.

    Args:
        times: the times of calls, by regime.
        left_out: the reasons why other regimes have no times.
        steps: the number of steps and layers in a call.
        floor: the least microseconds of a call.
    """
    found: dict[str, dict[str, Any]] = {
        regime: {
            "call": of["call"],
            "step": of["call"] / steps,
            "of_floor": floor / of["call"],
            "spread": of["spread"],
        }
        for regime, of in times.items()
    }
    return found | {regime: {"left_out": why} for regime, why in left_out.items()}


def calls_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The microseconds of a call in each regime that was timed."""
    return {name: of["call"] for name, of in row.get("regimes", {}).items() if "call" in of}


def fastest_of(row: Mapping[str, Any]) -> str:
    """The regime whose call takes the least time; "" if none was timed."""
    calls = calls_of(row)
    return min(calls, key=calls.__getitem__) if calls else ""


def missed(row: Mapping[str, Any]) -> str:
    """A line about a row for which another regime than the plan's was clearly faster, else ""."""
    calls, chosen, fastest = calls_of(row), row.get("chosen", ""), fastest_of(row)
    if chosen not in calls:
        return ""
    ours, best = calls[chosen], calls[fastest]
    if ours <= NOISE * best:
        return ""
    return (
        f"{row['name']} {row['mode']}: {in_words(chosen)} {ours:.0f} us, "
        f"{in_words(fastest)} {best:.0f} us, x{ours / best:.2f}"
    )


def in_words(regime: str) -> str:
    """A regime, or several of them, as a text for people."""
    return regime.replace("per_step", "per step")

"""Times calls by turns, so that all of them see the same machine, and says how they spread."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Call = Callable[[], Any]

# A turn runs one call for this long (or once), so that most calls find their weights in cache, as
# a loop of a user's does.
TURN = 0.01  # seconds
LEAST_TURNS = 3
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over many of them."""

    median: float
    p10: float
    p90: float
    fastest: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """What a list of times amounts to."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            p10=ordered[round(0.1 * last)],
            p90=ordered[round(0.9 * last)],
            fastest=ordered[0],
            calls=len(ordered),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def elapsed(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(calls: Mapping[str, Call], seconds: float) -> dict[str, Timing]:
    """Times every call in turn, A B A B, for `seconds` in all, warm-up not counted.

    Each call alone is timed. There are at least three turns, however long they take.
    """
    length: dict[str, int] = {}
    for name, call in calls.items():
        once = min(elapsed(call) for _ in range(WARM_UP))
        length[name] = min(1000, max(1, math.ceil(TURN / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        turns = 0
        while turns < LEAST_TURNS or time.perf_counter() < end:
            for name, call in calls.items():
                times[name] += [elapsed(call) for _ in range(length[name])]
            turns += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in times.items()}

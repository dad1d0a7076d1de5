"""Times several functions alternately, so that all run in the same state of the machine."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

TimedCall = Callable[[], Any]  # a function whose calls are timed

# In a turn one function is called for this long (or once), so that most calls find their weights in
# the cache, as in a user's loop.
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
        """Summarizes a list of times."""
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


def elapsed(call: TimedCall) -> float:
    """Returns the seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(calls: Mapping[str, TimedCall], seconds: float) -> dict[str, Timing]:
    """Times the functions in turn, A B A B, for `seconds` in all, not counting the warm-up.

    Each call is timed by itself. There are at least three turns, however long they take.
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

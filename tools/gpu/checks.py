"""The functions of a run's tasks, by name.

Most of them run one section or one case of fusedrnn.selftest, so that if a GPU hangs in one, the
others are not lost.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.selftest import Selftest

from . import limits, load, numbers, planted, surroundings
from .numbers import Options

TASKS: dict[str, Callable[[Selftest, Options], None]] = {
    "limits": limits.check,
    "products": numbers.products,
    "smoke": numbers.smoke,
    "kernels": numbers.kernels,
    "parity": numbers.parity,
    "from_l2": numbers.from_l2,
    "choice": numbers.choice,
    "offsets": surroundings.offsets,
    "deterministic_mode": surroundings.deterministic_mode,
    "two_devices": surroundings.two_devices,
    "cold_capture": surroundings.cold_capture,
    "allocator": surroundings.allocator,
    "watchdog": surroundings.watchdog,
    "stress": load.stress,
    "two_streams": load.two_streams,
    "hang": planted.hang,
    "crash": planted.crash,
    "wrong": planted.wrong,
    "raise": planted.raising,
}


# The tasks that are sections of the selftest.
SECTIONS: dict[str, Callable[[Selftest], None]] = {
    "tf32": Selftest.tf32_is_used,
    "determinism": Selftest.determinism,
    "modules": Selftest.modules,
    "errors": Selftest.errors,
    "memory": Selftest.memory,
    "streams": Selftest.streams,
    "graphs": Selftest.graphs,
}


def do(kind: str, test: Selftest, options: Options) -> None:
    """Runs one task; its results go into the test's report."""
    if kind in SECTIONS:
        SECTIONS[kind](test)
    else:
        TASKS[kind](test, options)

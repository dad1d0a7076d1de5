"""Tasks that fail on purpose in a dry run, which checks that their failures are reported."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch import Tensor

from fusedrnn import _selftest_cases as cases
from fusedrnn._selftest_cases import FLOAT32, Call
from fusedrnn.selftest import Selftest

from .numbers import SMOKE, Options, compare


def hang(test: Selftest, options: Options) -> None:
    """Never ends."""
    while True:
        time.sleep(1)


def crash(test: Selftest, options: Options) -> None:
    """Dies of a signal."""
    os.kill(os.getpid(), signal.SIGKILL)


def wrong(test: Selftest, options: Options) -> None:
    """Finds a wrong number."""
    right = cases.Call.results

    def spoiled(self: Call, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        results = right(self, *arguments, **named)
        if not named:  # these are the results of our layer, not of the reference
            results["output 0"].view(-1)[-1] += 1
        return results

    cases.Call.results = spoiled  # type: ignore[method-assign]
    try:
        compare(test, Call("lstm", SMOKE[1]), FLOAT32, "")
    finally:
        cases.Call.results = right  # type: ignore[method-assign]


def raising(test: Selftest, options: Options) -> None:
    """Raises outside of a check."""
    raise RuntimeError("a task that raises")

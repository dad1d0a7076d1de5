"""Times a step while other processes use the cores.

If the scheduler stops a thread, the call should lose only that thread's time. torch's threads meet
at every step of a sequence and wait for each other, so one stopped thread stops all of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import cases
from .machine import ROOT
from .measure import TimedCall, elapsed
from .shapes import Row

TRIALS = 5
# The other processes that run at the same time: a name, their number and their kind.
COMPANY = {
    "nothing": (0, "busy"),
    "1 busy process": (1, "busy"),
    "2 busy processes": (2, "busy"),
    "another training": (1, "training"),
}
_BUSY = """
import time
end = time.monotonic() + {limit}
print("ready", flush=True)
while time.monotonic() < end:
    for _ in range(100000): pass
"""
_TRAINING = """
import time, torch
torch.set_num_threads({threads})
end = time.monotonic() + {limit}
layer, x = torch.nn.LSTM(256, 256), torch.randn(100, 32, 256)
layer(x)[0].sum().backward()
print("ready", flush=True)
while time.monotonic() < end:
    layer(x)[0].sum().backward()
"""
_LEAST_CALLS, _MOST_CALLS = 3, 200


def events(rows: list[Row], job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Makes five trials of each row for each entry of COMPANY, each with new processes."""
    for row in rows:
        for mode in row.modes:
            yield {"event": "start", "row": row.name, "mode": mode}
            case = cases.build(row)
            parity = cases.check(case, mode)
            result: dict[str, Any] = {"status": "ok", "why": "", "parity": parity.as_dict()}
            if parity.right:
                result["beside"] = _beside_all(case, mode, job["seconds"], job["threads"])
            else:
                result |= {"status": "red", "why": f"{parity.worst} is off by {parity.ours:.1e}"}
            yield {"event": "result", "row": row.name, "mode": mode, **result}


def _beside_all(
    case: cases.Case, mode: str, seconds: float, threads: int
) -> dict[str, dict[str, Any]]:
    """Returns for every entry of COMPANY and layer the trials, their median and worst, in seconds.

    The slowdown is the worst trial over the median beside no other process.
    """
    layers = {"ours": case.ours, "torch": case.torch}
    steps = {name: cases.step(layer, case.x, case.d_y, mode) for name, layer in layers.items()}
    found: dict[str, dict[str, Any]] = {}
    with cases.mode_of(case.ours, mode), cases.mode_of(case.torch, mode):
        for step in steps.values():
            step()
        for company, (count, kind) in COMPANY.items():
            trials: dict[str, list[float]] = {name: [] for name in steps}
            for trial in range(TRIALS):
                with processes(count, kind, limit=60 + 60 * seconds, threads=threads):
                    for name, step in list(steps.items())[:: 1 if trial % 2 else -1]:
                        trials[name].append(_trial(step, seconds / (2 * TRIALS)))
            found[company] = {
                name: {
                    "median": statistics.median(times),
                    "worst": max(times),
                    "trials": times,
                }
                for name, times in trials.items()
            }
    idle = found["nothing"]
    for sides in found.values():
        for name, side in sides.items():
            side["slowdown"] = side["worst"] / idle[name]["median"]
    return found


def _trial(step: TimedCall, seconds: float) -> float:
    """Returns the median time of the calls made in `seconds`, of at least three calls."""
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < _LEAST_CALLS or (time.monotonic() < end and len(times) < _MOST_CALLS):
        times.append(elapsed(step))
    return statistics.median(times)


@contextmanager
def processes(count: int, kind: str, limit: float, threads: int) -> Iterator[list[int]]:
    """Runs other processes. They are killed at the end, or end by themselves after `limit` s."""
    code = {"busy": _BUSY, "training": _TRAINING}[kind].format(limit=limit, threads=threads)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-c", code]
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.communicate()

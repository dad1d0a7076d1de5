"""The process that times rows. It reads a job and writes a line of JSON for each event.

It writes {"event": "start", "row": ..., "mode": ...} before each row and mode, which may take long
or end the process, and {"event": "result", ...} after it. The output of libraries goes to standard
error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import cases, contention, memory, rivals
from .floors import Rates, floor
from .measure import alternate
from .shapes import Row, row_from

Event = dict[str, Any]
# The possible results of a row.
OK = "ok"
RED = "red"  # its numbers are wrong, so it is not timed
NOT_RUN = "not run"
UNSUPPORTED = "unsupported"  # the rival has no such layer
FAILED = "failed"
# A row is listed and not timed if a step takes longer than this in our layer and in torch.nn's. If
# the row has training, its training step decides.
LONGEST_STEP = 2.0  # seconds
# The largest allowed error of a rival, compared with torch.nn in the next wider dtype. Rivals may
# approximate.
RIVAL_LIMITS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}


def main() -> None:
    """Reads the job from standard input and runs it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    rows = [row_from(fields) for fields in job["rows"]]
    kinds: dict[str, Callable[..., Iterator[Event]]] = {
        "pair": pair,
        "rival": rival,
        "memory": memory.events,
        "contention": contention.events,
    }
    if job["kind"] == "rival":
        if job["rival"] == "jax":
            _bind(job["threads"])
        # torch computes only the expected values; more threads would spin while they wait for work.
        torch.set_num_threads(job["threads"] if job["rival"] == "compile" else 1)
    else:
        torch.set_num_threads(job["threads"])
    for event in kinds[job["kind"]](rows, job):
        print(json.dumps(event), file=out, flush=True)


def pair(rows: list[Row], job: dict[str, Any]) -> Iterator[Event]:
    """Times torch.nn's layer and ours alternately, and measures the floors in between."""
    rates = Rates(job["threads"], min(0.1, job["seconds"] / 10))
    for row in rows:
        needs = row.flops(row.modes[-1]) / rates.square(row.torch_dtype)
        why = f"a step needs at least {needs:.1f} s here" if needs > LONGEST_STEP else ""
        # Training comes first, because it decides whether the row is run at all.
        for mode in reversed(row.modes):
            yield {"event": "start", "row": row.name, "mode": mode}
            result: Event = {"status": NOT_RUN, "why": why}
            if not why:
                result = measure(cases.build(row), mode, job["seconds"], rates)
                why = result["why"] if result["status"] == NOT_RUN else ""
            yield {"event": "result", "row": row.name, "mode": mode, **result}
    yield {"event": "rates", **rates.as_dict()}


def measure(case: cases.Case, mode: str, seconds: float, rates: Rates) -> Event:
    """Checks parity, times our layer and torch.nn's, and adds the floor."""
    parity = cases.check(case, mode)
    result: Event = {"status": OK, "why": "", "parity": parity.as_dict()}
    if not parity.right:
        why = f"{parity.worst} is off by {parity.ours:.1e}, the limit is {parity.limit:.1e}"
        return result | {"status": RED, "why": why}
    if parity.seconds > LONGEST_STEP:
        return result | {"status": NOT_RUN, "why": f"a step takes {parity.seconds:.1f} s here"}
    layers = {"ours": case.ours, "torch": case.torch}
    steps = {name: cases.step(layer, case.x, case.d_y, mode) for name, layer in layers.items()}
    with cases.mode_of(case.ours, mode), cases.mode_of(case.torch, mode):
        timings = alternate(steps, seconds)
    ours = timings["ours"].median
    bound = floor(case.row, mode, rates)
    return result | {
        "ours": timings["ours"].as_dict(),
        "torch": timings["torch"].as_dict(),
        "ratio": timings["torch"].median / ours,
        "flops": case.row.flops(mode),
        "floor": bound,
        "part_of_floor": bound["seconds"] / ours,
    }


def rival(rows: list[Row], job: dict[str, Any]) -> Iterator[Event]:
    """Times the rows with one other library."""
    try:
        library = rivals.load(job["rival"])
    except ModuleNotFoundError as error:
        yield {"event": "absent", "why": f"{error.name} is not installed"}
        return
    yield {"event": "version", "version": rivals.versions(library)}
    for row in rows:
        for mode in row.modes:
            yield {"event": "start", "row": row.name, "mode": mode}
            result = _measure_rival(library, cases.build(row), mode, job)
            yield {"event": "result", "row": row.name, "mode": mode, **result}


def _measure_rival(
    library: rivals.Rival, case: cases.Case, mode: str, job: dict[str, Any]
) -> Event:
    try:
        ready = library.prepare(case, job["threads"], mode)
        found = ready.read(ready.step())
    except rivals.Unsupported as reason:
        return {"status": UNSUPPORTED, "why": str(reason)}
    except Exception as error:  # any error of another library is the row's result
        return {"status": FAILED, "why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    exact = cases.expected(case, mode)
    worst, name = max((cases.error(tensor, exact[name]), name) for name, tensor in found.items())
    limit = RIVAL_LIMITS[case.row.dtype]
    result: Event = {"status": OK, "why": "", "error": worst}
    if worst > limit:
        why = f"{name} is off by {worst:.1e}, the limit is {limit:.1e}"
        return result | {"status": RED, "why": why}
    return result | {
        "time": alternate({"rival": ready.step}, job["seconds"] / 2)["rival"].as_dict()
    }


def _bind(threads: int) -> None:
    """Binds the process to `threads` cores, because JAX has no option for its threads."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])

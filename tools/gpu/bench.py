"""Times our layers and torch.nn's (cuDNN on a GPU), and writes each row as soon as it is measured.

    python -m tools.gpu.bench --device cuda --out bench.jsonl --seconds 110

Parity is checked before a row is timed, and a row with wrong results is not timed. Each variant has
three times in microseconds. "call" is the time of calls back to back by the device's events, which
includes the host if it is slower than the device. "graph" is the same with a CUDA graph, which
leaves the host out. "alone" is the time of single calls by the host's clock. The variants take
turns. A row also has the plan, its estimate, and the floor: the time of the operations at the rate
of torch's products, or of the bytes that must move at the rate of a copy, whichever is longer. Both
rates are measured in the same process.

On a GPU every regime that can run a row is a variant. "ours" is the plan's choice. The others have
only the time of calls back to back, and share a limited time in each row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import cases
from benchmarks.measure import TimedCall
from benchmarks.shapes import FORWARD, TRAINING
from fusedrnn._errors import refuses_regime
from fusedrnn._selftest_cases import TF32, asking_for, capturing, float32_products

from . import limits
from .fastest import fastest_of, in_words, summary
from .process import end_with_parent
from .regimes import choice_of, others
from .results import one_line, three_times
from .rows import PRECISIONS, Timed, timed_rows
from .worker import why_lost

Result = TypeVar("Result")
Write = Callable[[dict[str, Any]], None]
# Measures rows and modes on a device until a time, writes lines, and returns the exit status.
MeasureAll = Callable[[Sequence[tuple[Timed, str]], torch.device, float, Write], int]

ROUND_US = 12_000.0  # the length of a variant's turn
ROUNDS = 5
ALONE = 7
WARM_UP = 3
# If a call takes longer than this, the row is listed and not timed.
LONGEST_US = 200_000.0
# The time of a row for the regimes that the plan did not choose.
OTHERS_US = 1_500_000.0
AS_PLANNED = ""
# The selftest's limit, for the case that torch.nn computed without TF32 and so has a small error.
TF32_LIMIT = TF32.limit * TF32.eps
SQUARE = 4096
COPIED_BYTES = 1 << 30


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def alone(self, call: TimedCall) -> float:
        """The median microseconds of a call and the wait for it, by the host's clock."""
        times = []
        for _ in range(ALONE):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)

    def round(self, call: TimedCall, count: int) -> float:
        """The microseconds per call in `count` calls back to back."""
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - begin) * 1e6 / count
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e3 / count

    def graph(self, call: TimedCall) -> TimedCall:
        """Captures a call in a CUDA graph and returns the function that replays it."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self.device):
            call()
        return graph.replay


def calls_in_a_turn(once: float) -> int:
    """How many calls of `once` microseconds a variant's turn has."""
    return max(1, min(200, int(ROUND_US / max(once, 1e-3))))


def alternate(clock: Clock, calls: dict[str, TimedCall]) -> dict[str, dict[str, float]]:
    """Times calls alternately: their medians, and the slowest round over the fastest."""
    counts = {name: calls_in_a_turn(clock.round(call, 1)) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(clock.round(call, counts[name]))
    return {
        name: {"call": statistics.median(found), "spread": max(found) / min(found)}
        for name, found in times.items()
    }


def in_regime(call: Callable[[], Result], regime: str) -> Callable[[], Result]:
    """Makes the call ask for a regime each time it runs, because the engine reads it then."""
    if regime == AS_PLANNED:
        return call

    def asking() -> Result:
        with asking_for(regime):
            return call()

    return asking


def step_of(layer: torch.nn.Module, case: cases.Case, mode: str) -> TimedCall:
    """Returns the function that is timed."""
    if mode == FORWARD:
        return lambda: layer(case.x)
    x, leaf = cases.with_grad(case.x)
    leaves = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(cases.run(layer, x)[0], leaves, case.d_y)


def floor_of(timed: Timed, mode: str, rates: dict[str, float]) -> float:
    """The least microseconds that the row can take at the measured rates.

    The bytes are those of the input, the output and the weights, each moved once per pass. The
    floor does not consider that steps must run one after another.
    """
    row = timed.row
    passes = 3 if mode == TRAINING else 1
    weights = sum(row.D * row.G * row.H * (I + row.out) for I in row.inputs())
    steps = sum(row.lengths())
    values = sum(steps * (I + row.D * row.out) for I in row.inputs()) + weights
    size = row.torch_dtype.itemsize
    operations = row.flops(mode) / rates[timed.precision]
    return max(operations, passes * values * size / rates["copy"]) * 1e6


def measure_rates(device: torch.device) -> dict[str, float]:
    """Operations per second of torch's products, bytes per second of a copy, time of a launch."""
    clock = Clock(device)
    n, copied = (SQUARE, COPIED_BYTES) if clock.cuda else (256, 1 << 22)
    rates = {}
    warm = torch.randn(n, n, device=device)
    end = time.monotonic() + (0.5 if clock.cuda else 0.0)
    while time.monotonic() < end:  # a GPU that was idle runs slowly at first
        clock.round(lambda: torch.mm(warm, warm), 5)
    for precision, dtype in PRECISIONS.items():
        m = n // 2 if dtype == "float64" else n  # some cards are very slow in float64
        with float32_products(precision == "tf32"):
            a, b = (torch.randn(m, m, device=device).to(getattr(torch, dtype)) for _ in range(2))
            torch.mm(a, b)
            best = min(clock.round(lambda a=a, b=b: torch.mm(a, b), 5) for _ in range(3))
            rates[precision] = 2 * m**3 / best * 1e6
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(clock.round(lambda: target.copy_(source), 3) for _ in range(3))
    rates["copy"] = 2 * copied / best * 1e6
    small = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(100):
            small.add_(1)

    call = clock.graph(launches) if clock.cuda else launches
    rates["launch"] = min(clock.round(call, 3) for _ in range(3)) / 100 / 1e6
    return rates


def measure(
    timed: Timed, mode: str, device: torch.device, card: str, rates: dict[str, float]
) -> dict[str, Any]:
    """Measures a row in a mode: its parity, plan, and the times of all variants."""
    clock = Clock(device)
    choice = choice_of(timed, mode, card)
    floor, steps = floor_of(timed, mode, rates), timed.row.T * timed.row.L
    found: dict[str, Any] = {
        "plan": choice.words,
        "chosen": choice.regime,
        "by_pass": choice.by_pass,
        "measured": choice.measured,
        "estimate": choice.estimate,
        "floor": floor,
        "steps": steps,
    }
    built = cases.build(timed.row)
    case = cases.there(built, device)
    regimes = others(timed, mode, card, choice.regime) if clock.cuda else []
    left_out: dict[str, str] = {}
    with float32_products(timed.precision == "tf32"):
        against = cases.reference(case, mode)
        for regime in (AS_PLANNED, *regimes):
            try:
                parity = in_regime(lambda: cases.check(case, mode, against), regime)()
            except RuntimeError as error:
                if regime == AS_PLANNED or not refuses_regime(error):
                    raise
                left_out[regime] = one_line(error)[:150]
                continue
            if regime == AS_PLANNED:
                found["parity"] = parity.as_dict()
            if off := wrong(timed, parity):
                why = f"{in_words(regime)}: {off}" if regime else off
                return found | {"status": "red", "why": why}
        regimes = [regime for regime in regimes if regime not in left_out]
        with cases.mode_of(case.ours, mode), cases.mode_of(case.torch, mode):
            found |= _times(clock, case, mode, regimes, left_out)
    times = found.get("times")
    if times and clock.cuda:
        of_regimes = {choice.regime: times["ours"]}
        of_regimes |= {regime: times.pop(regime) for regime in regimes if regime in times}
        found["regimes"] = summary(of_regimes, left_out, steps, floor)
        found["fastest"] = fastest_of(found)
    return found


def wrong(timed: Timed, parity: cases.Parity) -> str:
    """What is wrong with the results of a row; "" if they may be timed."""
    if parity.right or (timed.precision == "tf32" and parity.ours <= TF32_LIMIT):
        return ""
    return f"{parity.worst} is off by {parity.ours:.1e}, the limit is {parity.limit:.1e}"


def _times(
    clock: Clock, case: cases.Case, mode: str, regimes: Sequence[str], left_out: dict[str, str]
) -> dict[str, Any]:
    """Times all variants; a regime for which there is no time is added to `left_out`."""
    calls = {
        "ours": step_of(case.ours, case, mode),
        "torch": step_of(case.torch, case, mode),
    }
    alone = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        alone[name] = clock.alone(call)
    if min(alone.values()) > LONGEST_US:
        return {"status": "not run", "why": f"a call takes {min(alone.values()) / 1e6:.2f} s"}
    in_regimes = {regime: in_regime(calls["ours"], regime) for regime in regimes}
    calls |= affordable(clock, in_regimes, left_out, OTHERS_US)
    found = alternate(clock, calls)
    for name, microseconds in alone.items():
        found[name]["alone"] = microseconds
    graphs: dict[str, TimedCall] = {}
    if clock.cuda:
        for name in ("ours", "torch"):
            graph, why = _captured(clock, calls[name])
            if graph:
                graphs[name] = graph
            else:
                found[name]["no_graph"] = why
    for name, times in alternate(clock, graphs).items():
        found[name] |= {"graph": times["call"], "graph_spread": times["spread"]}
    return {"status": "ok", "why": "", "times": found}


def affordable(
    clock: Clock, calls: dict[str, TimedCall], left_out: dict[str, str], left: float
) -> dict[str, TimedCall]:
    """The calls for which `left` microseconds suffice, the cheapest first; others are left out."""
    found = {}
    once = {regime: clock.round(call, 1) for regime, call in calls.items()}
    for regime in sorted(once, key=once.__getitem__):
        left -= once[regime] * (1 + ROUNDS * calls_in_a_turn(once[regime]))
        if left >= 0:
            found[regime] = calls[regime]
        else:
            left_out[regime] = f"a call takes {once[regime] / 1e3:.0f} ms"
    return found


def _captured(clock: Clock, call: TimedCall) -> tuple[TimedCall | None, str]:
    """Captures a call and replays it once; returns None and the reason if that fails."""
    try:
        graph = clock.graph(call)
        graph()
        clock.wait()
    except Exception as error:  # some of torch's own calls cannot be captured
        clock.wait()
        return None, str(error).splitlines()[0][:150]
    return graph, ""


def as_text(found: dict[str, Any]) -> str:
    """Describes a row in a line."""
    head = f"{found['name']} {found['mode']}"
    if found["status"] != "ok":
        return f"{head}: {found['status']}: {one_line(found['why'])[:150]}"
    times = found["times"]
    ours, theirs = times["ours"], times["torch"]
    words = [f"{head}: {three_times(ours)} beside {three_times(theirs)}"]
    words.append(f"x{theirs['call'] / ours['call']:.2f}")
    if "graph" in ours and "graph" in theirs:
        words.append(f"graph x{theirs['graph'] / ours['graph']:.2f}")
    regimes = [
        f"{in_words(regime)} {of['call']:.0f}"
        for regime, of in found.get("regimes", {}).items()
        if "call" in of and regime != found["chosen"]
    ]
    words += [", ".join(regimes)] if regimes else []
    words.append(f"est {found['estimate']:.0f}, floor {found['floor']:.0f}")
    words.append("+".join(dict.fromkeys(found["plan"])))
    if found.get("fastest", found["chosen"]) != found["chosen"]:
        words.append(f"fastest {in_words(found['fastest'])}")
    return " | ".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    It is 0 if all rows were right, 1 if one was wrong, 3 if time ran out, and 4 if a row destroyed
    the GPU's context. In the last case another process can continue with the next row.
    """
    return run_command("bench", __doc__, _measure_all, arguments)


def run_command(
    name: str, about: str | None, measure_all: MeasureAll, arguments: Sequence[str] | None
) -> int:
    """Reads a command line about rows and modes, and measures them."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.gpu.{name}", description=about)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the file to which rows are added")
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name has TEXT")
    parser.add_argument(
        "--skip", type=int, default=0, help="the number of rows and modes to leave out at first"
    )
    parser.add_argument(
        "--most", type=int, default=1000, help="the largest number of rows and modes"
    )
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    work = [(timed, mode) for timed in timed_rows(options.rows) for mode in timed.row.modes]
    if not work:
        parser.error(f"--rows: no row has {options.rows!r} in its name")
    end_with_parent()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    with options.out.open("a") as out:

        def write(fields: dict[str, Any]) -> None:
            out.write(json.dumps(fields) + "\n")
            out.flush()

        return measure_all(work[options.skip : options.most], device, end, write)


def head_of(timed: Timed, mode: str) -> dict[str, Any]:
    """What every line about a row begins with."""
    head = {"name": timed.name, "mode": mode, "source": timed.source, "cell": timed.cell}
    return head | {"precision": timed.precision, "sizes": timed.layers()[0]}


def rates_of(device: torch.device) -> dict[str, Any]:
    """Measures the line that comes before the rows of a process."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    found = {"kind": "rates", "card": limits.card(device), "gpu": gpu}
    return found | {"date": time.strftime("%Y-%m-%d"), "rates": measure_rates(device)}


def _measure_all(
    work: Sequence[tuple[Timed, str]],
    device: torch.device,
    end: float,
    write: Write,
) -> int:
    first = rates_of(device)
    card, rates = first["card"], first["rates"]
    write(first)
    products = ", ".join(f"{name} {rates[name] / 1e12:.3g}" for name in PRECISIONS)
    print(f"products {products} TFLOP/s, copy {rates['copy'] / 1e9:.0f} GB/s")
    print(f"launches {rates['launch'] * 1e6:.2f} us apart")
    print("us of call/graph/alone, ours beside torch.nn; x: torch.nn over ours", flush=True)
    status = 0
    for timed, mode in work:
        if time.monotonic() > end:
            print(f"out of time before {timed.name} {mode}")
            return status or 3
        head = head_of(timed, mode)
        write({"kind": "begin"} | head)
        try:
            found = measure(timed, mode, device, card, rates)
        except Exception as error:
            traceback.print_exc()
            found = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
        write({"kind": "row"} | head | found)
        print(as_text(head | found), flush=True)
        if found["status"] in ("red", "failed"):
            status = 1
        if found["status"] == "failed" and why_lost(device):
            print("the context is lost")
            return 4
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Times other plans of the timed rows: other cuts, other cores, other exchanges.

    python -m tools.gpu.sweep --device cuda --out bench.jsonl --seconds 60

A row has a short list of alternatives that the plan accepts for the card, and every alternative has
other blocks than the rest. In forward they concern the call. In training only backward's plan is
another one, forward's is always the plan's choice. The alternatives, the plan's choice and torch.nn
take turns, as the regimes of a row do (bench.py), and each of them gets a line. Parity is checked
before an alternative is timed.

To sweep over something new, add a function to NEAR that yields texts for FUSEDRNN_CUDA_PLAN.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import cases
from benchmarks.measure import TimedCall
from benchmarks.shapes import FORWARD, TRAINING
from fusedrnn._errors import refuses_regime
from fusedrnn._selftest_cases import asking_for, float32_products
from tools.plans import Block, Plan, plan_of

from . import bench
from .results import one_line
from .rows import Timed
from .tasks import REGIME, REGIMES
from .worker import why_lost

CHOICE = "FUSEDRNN_CUDA_PLAN"
# Backward is what training varies.
PASS_OF = {FORWARD: "forward", TRAINING: "backward"}
# How many alternatives of a pass are timed, those with the least estimates, and how many times the
# least estimate they may have. The estimates are not measured, but hardly that wrong.
MOST = 10
HOPELESS = 3.0
# The time of a row's calls. With turns of bench.ROUND_US, ten alternatives take 0.7 seconds.
ROW_US = 1_500_000.0
# Up to this many sequences an exchange of words may be faster than a barrier by the estimates.
FEW = 8


@dataclass(frozen=True)
class Alternative:
    """A plan of a pass, and what to ask the engine for to get it.

    Args:
        regime: what FUSEDRNN_CUDA_REGIME is; "" leaves it to the plan.
        choice: what FUSEDRNN_CUDA_PLAN is.
        plan: the plan.
    """

    regime: str
    choice: str
    plan: Plan

    @property
    def chosen(self) -> bool:
        """Whether it is what the plan chooses."""
        return not (self.regime or self.choice)

    @property
    def full_choice(self) -> str:
        """What FUSEDRNN_CUDA_PLAN has to be for these blocks in the plan's regime.

        That is more than `choice` if the plan's own choice follows a measurement.
        """
        if not (self.chosen and self.plan.measured and self.plan.block):
            return self.choice
        return self.plan.block.choice + self.plan.more_choice

    @property
    def name(self) -> str:
        """The regime and the choice in a text."""
        return " ".join(filter(None, (self.plan.regime, self.full_choice)))


# --- What to try ---------------------------------------------------------------------------------


def _rows(block: Block, N: int) -> Iterator[str]:
    """Cuts the sequences into two and four times as many blocks, and half as many."""
    blocks = -(-N // block.rows)
    for other in (2 * blocks, 4 * blocks, max(1, blocks // 2)):
        yield f"rows={-(-N // other)}"


def _units(block: Block, N: int) -> Iterator[str]:
    """Takes twice and half as many units, of the same sequences."""
    for units in (2 * block.units, block.units // 2):
        if units:
            yield f"units={units},rows={block.rows}"


def _cores(block: Block, N: int) -> Iterator[str]:
    yield f"cores={'fma' if block.cores == 'mma' else 'mma'}"


def _words(block: Block, N: int) -> Iterator[str]:
    if N <= FEW:
        yield "cores=fma,exchange=words"
        yield "cores=fma,rows=1,exchange=words"


def _clusters(block: Block, N: int) -> Iterator[str]:
    for blocks in (2, 4, 8):
        yield f"cluster={blocks}"
    yield "cluster=4,arrive=clusters"


# What is near a block, as texts for FUSEDRNN_CUDA_PLAN. The plan says which of them can run.
NEAR: tuple[Callable[[Block, int], Iterator[str]], ...] = (
    _rows,
    _units,
    _cores,
    _words,
    _clusters,
)


def alternatives(timed: Timed, mode: str, card: str) -> list[Alternative]:
    """The plan's choice for a pass, then others with different blocks, the best estimate first."""

    def plan(regime: str, choice: str = "") -> Plan:
        sizes, backward = timed.layers()[0], PASS_OF[mode] == "backward"
        tf32 = timed.precision == "tf32"
        return plan_of(timed.cell, timed.dtype, sizes, card, backward, tf32, regime, choice)

    def key(plan: Plan) -> str:
        # The words of a plan per step say only why it is that.
        return plan.layout if plan.block else plan.regime

    chosen = Alternative("", "", plan(""))
    found: dict[str, Alternative] = {}
    for regime in REGIMES:
        default = plan(regime)
        near = NEAR if default.block else ()
        for choice in ("", *(c for of in near for c in of(default.block, timed.row.N))):
            other = plan(regime, choice) if choice else default
            if other.regime and key(other) != key(chosen.plan):
                found.setdefault(key(other), Alternative(regime, choice, other))
    best = sorted(found.values(), key=lambda each: each.plan.step)[:MOST]
    least = min(each.plan.step for each in (chosen, *best))
    return [chosen, *(each for each in best if each.plan.step <= HOPELESS * least)]


# --- How it is timed -----------------------------------------------------------------------------


@contextlib.contextmanager
def asking(alternative: Alternative) -> Iterator[None]:
    """Makes the engine use an alternative within the block."""
    with asking_for(alternative.regime, alternative.choice):
        yield


def call_of(layer: torch.nn.Module, case: cases.Case, mode: str, of: Alternative) -> TimedCall:
    """Returns the function that is timed. Only the pass that is varied runs by the alternative."""
    if mode == FORWARD:

        def forward() -> Any:
            with asking(of):
                return layer(case.x)

        return forward
    x, leaf = cases.with_grad(case.x)
    leaves = [leaf, *layer.parameters()]

    def training() -> Any:
        y = cases.run(layer, x)[0]
        with asking(of):
            return torch.autograd.grad(y, leaves, case.d_y)

    return training


def _parity(case: cases.Case, mode: str, against: cases.Reference, of: Alternative) -> cases.Parity:
    if mode == TRAINING:
        return cases.check(case, mode, against, asking(of))
    with asking(of):
        return cases.check(case, mode, against)


def measure(
    timed: Timed, mode: str, device: torch.device, card: str, rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Measures the alternatives of a row in a mode and yields a result for each."""
    clock = bench.Clock(device)
    floor, steps = bench.floor_of(timed, mode, rates), timed.row.T * timed.row.L
    tried = {each.name: each for each in alternatives(timed, mode, card)}
    case = cases.there(cases.build(timed.row), device)
    good: list[Alternative] = []

    def result(of: Alternative, status: str, why: str) -> dict[str, Any]:
        found = {"pass": PASS_OF[mode], "regime": of.plan.regime, "choice": of.full_choice}
        found |= {"chosen": of.chosen, "plan": of.plan.short, "estimate_step": of.plan.step}
        return found | {"floor": floor, "steps": steps, "status": status, "why": why}

    with float32_products(timed.precision == "tf32"):
        against = cases.reference(case, mode)
        for each in tried.values():
            try:
                off = bench.wrong(timed, _parity(case, mode, against, each))
            except RuntimeError as error:
                if refuses_regime(error) and not each.chosen:
                    yield result(each, "not run", one_line(error)[:150])
                    continue
                yield result(each, "failed", f"{type(error).__name__}: {one_line(error)[:300]}")
                # A launch that did not start leaves the device as it was.
                if each.chosen or why_lost(device):
                    return
                continue
            if off:
                yield result(each, "red", off)
            else:
                good.append(each)
        left_out: dict[str, str] = {}
        with cases.mode_of(case.ours, mode), cases.mode_of(case.torch, mode):
            calls = {each.name: call_of(case.ours, case, mode, each) for each in good}
            calls["torch"] = bench.step_of(case.torch, case, mode)
            for call in calls.values():
                for _ in range(bench.WARM_UP):
                    call()
            times = bench.alternate(clock, bench.affordable(clock, calls, left_out, ROW_US))
    for name, why in left_out.items():
        if name in tried:
            yield result(tried[name], "not run", why)
    for each in good:
        if each.name in times:
            ours = times[each.name]
            found = {"times": {"ours": ours} | {k: times[k] for k in ("torch",) if k in times}}
            found |= {"step": ours["call"] / steps, "of_floor": floor / ours["call"]}
            yield result(each, "ok", "") | found


def _measure_all(
    work: Sequence[tuple[Timed, str]], device: torch.device, end: float, write: bench.Write
) -> int:
    if os.environ.get(REGIME) or os.environ.get(CHOICE):
        print(f"{REGIME} or {CHOICE} is set, so nothing else may be tried")
        return 0
    first = bench.rates_of(device)
    write(first)
    status = 0
    for timed, mode in work:
        if time.monotonic() > end:
            print(f"out of time before {timed.name} {mode}")
            return status or 3
        head = bench.head_of(timed, mode)
        write({"kind": "sweep begin"} | head)
        found = []
        try:
            for result in measure(timed, mode, device, first["card"], first["rates"]):
                write({"kind": "sweep"} | head | result)
                found.append(result)
        except Exception as error:  # the other rows must still run
            traceback.print_exc()
            print(f"{timed.name} {mode}: {type(error).__name__}: {one_line(error)[:300]}")
            status = 1
        print(as_text(timed.name, mode, found), flush=True)
        if any(each["status"] in ("red", "failed") for each in found):
            status = 1
        if status and why_lost(device):
            print("the context is lost")
            return 4
    return status


def as_text(name: str, mode: str, found: Sequence[dict[str, Any]]) -> str:
    """Describes the alternatives of a row in a line, the fastest first; * is the plan's choice."""
    ok = sorted((each for each in found if each["status"] == "ok"), key=lambda each: each["step"])
    words = [
        f"{each['regime']} {each['choice']}".rstrip()
        + f"{'*' if each['chosen'] else ''} {each['step']:.2f}"
        for each in ok
    ]
    bad = [each for each in found if each["status"] in ("red", "failed")]
    words += [f"{each['regime']} {each['choice']} {each['status']}: {each['why']}" for each in bad]
    return f"{name} {mode}, us a step: {', '.join(words) or 'nothing was timed'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status, which means what bench.py's does."""
    return bench.run_command("sweep", __doc__, _measure_all, arguments)


if __name__ == "__main__":
    sys.exit(main())

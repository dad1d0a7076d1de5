"""The PTX interpreter: synchronisation between blocks, with correct and with missing fences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptxvm import Fault, Memory, Program
from tests.ptxvm.kit import Array, each_seed, faulty, load, needs_nvcc

pytestmark = needs_nvcc

BLOCKS, THREADS, STEPS = 3, 64, 4


def ring(steps: int) -> tuple[Array, Array]:
    """A ring of numbers, and the same ring after `steps` steps of the probe `exchange`."""
    x = (np.arange(BLOCKS * THREADS) * 37 % 11).astype(np.int32)
    y = x
    for _ in range(steps):
        y = np.roll(y, 1) + np.roll(y, -1)
    return x, y


def run_ring(program: Program, name: str, **kwargs: Any) -> tuple[Array, Array]:
    """Runs a probe on the ring; returns its result and the right one."""
    x, wanted = ring(STEPS)
    memory = Memory()
    x, y = memory.copy(x, "x"), memory.empty(x.shape, np.int32, "y")
    count = memory.copy(np.zeros(BLOCKS, np.uint32), "count")
    args = [x, y, count, len(x), STEPS]
    program.launch(name, BLOCKS, THREADS, args, memory=memory, **kwargs)
    return x, wanted


def exchange(program: Program, barrier: str) -> str:
    """The name of the probe `exchange` that uses this barrier."""
    return program.name_of("exchange", f"{len(barrier)}{barrier}E")


RIGHT = [
    "ReleaseAcquire", "FenceVolatile", "FenceRelaxed", "AtomicPoll", "EveryThreadWaits",
    "OtherThreadWaits", "CooperativeGroups",
]  # fmt: skip
WRONG = {
    "NoRelease": "weak memory",
    "NoAcquire": "weak memory",
    "NoFenceAfterVolatile": "weak memory",
    "NoFenceBeforeAtomic": "weak memory",
    "FenceOfBlockScope": "weak memory",
    "FenceTooEarly": "weak memory",
    "AtomicOfBlockScope": "race",
    "PlainSpin": "race",
    "NoBarrierBefore": "race",
    "NoBarrierBehind": "race",
    "OneTooFew": "race",
    "Nothing": "race",
}


@each_seed
@pytest.mark.parametrize("barrier", RIGHT)
def test_barriers_of_the_grid(barrier: str, seed: int) -> None:
    program = load("order")
    np.testing.assert_array_equal(*run_ring(program, exchange(program, barrier), seed=seed))


@each_seed
@pytest.mark.parametrize("name", ["split_barrier", "flags", "generations"])
def test_other_ways_to_wait(name: str, seed: int) -> None:
    np.testing.assert_array_equal(*run_ring(load("order"), name, seed=seed))


@each_seed
@pytest.mark.parametrize("barrier", WRONG)
def test_wrong_barriers_of_the_grid(barrier: str, seed: int) -> None:
    program = load("order")
    with pytest.raises(Fault) as raised:
        run_ring(program, exchange(program, barrier), seed=seed, checks=("races",))
    assert raised.value.kind == WRONG[barrier], str(raised.value)


@each_seed
def test_one_buffer_where_two_are_needed(seed: int) -> None:
    x, _ = ring(STEPS)
    program, count = load("order"), np.zeros(1, np.uint32)
    args = [x, count, len(x), STEPS]
    faulty("race", program, program.name_of("one_buffer"), BLOCKS, THREADS, args, seed=seed)


@each_seed
def test_flags_in_shared_memory(seed: int) -> None:
    program, x, out = load("order"), np.arange(32).astype(np.int32), np.zeros(32, np.int32)
    args = [1, 64, [x, out]]
    program.launch(program.name_of("shared_flagILb1ELb1E"), *args, seed=seed)
    np.testing.assert_array_equal(out, x[::-1])
    for wrong in ("shared_flagILb0ELb1E", "shared_flagILb1ELb0E"):
        faulty("weak memory", program, program.name_of(wrong), *args, seed=seed)


@pytest.mark.parametrize("fences", [True, False])
def test_stale_values_of_volatile_loads(fences: bool) -> None:
    """Volatile accesses do not race with each other, but without fences a load may be stale."""
    program, right, stale = load("order"), 0, 0
    for seed in range(20):
        x, flag, out = np.zeros(64, np.int32), np.zeros(1, np.uint32), np.zeros(64, np.int32)
        name = program.name_of(f"pass_onILb{int(fences)}E")
        run = program.launch(name, 2, 32, [x, flag, out, 64], seed=seed)
        right += bool((out == np.arange(64) + 1).all())
        stale += run.stale_loads
    assert right == 20 if fences else right < 10
    assert stale > 0

"""The PTX interpreter: the checks of memory accesses and barriers of one block.

Each check is tried on a faulty kernel and on the correct kernel beside it.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxvm import Memory
from tests.ptxvm.kit import each_seed, faulty, load, needs_nvcc, numbers, racy

pytestmark = needs_nvcc

# --- Bounds and uninitialised reads --------------------------------------------------------------


def test_bounds_of_arrays() -> None:
    program, memory = load("memory"), Memory()
    x, out = memory.copy(numbers(100), "x"), memory.copy(np.zeros(100, np.float32), "out")
    program.launch("shifted", 2, 64, [x, out, 100, 0], memory=memory)
    np.testing.assert_array_equal(out, x)
    for by in (1, -1, 5000, -5000):
        fault = faulty("out of bounds", program, "shifted", 2, 64, [x, out, 100, by], memory=memory)
        assert "read of 4 bytes" in str(fault)
        assert fault.source.startswith("memory.cu:")
        assert 0 <= fault.block < 2 and 0 <= fault.thread < 64 and fault.ptx_line > 0
    fault = faulty(
        "out of bounds", program, "shifted", 2, 64, [x, out[:99].copy(), 100, 0], memory=memory
    )
    assert "write of 4 bytes" in str(fault)


def test_bounds_of_shared_memory() -> None:
    x, out = numbers(64), np.zeros(64, np.float32)
    program = load("memory")
    program.launch("shared_index", 1, 64, [x, out, 3], shared=67 * 4)
    np.testing.assert_array_equal(out, x)
    faulty("out of bounds", program, "shared_index", 1, 64, [x, out, 4], shared=67 * 4)
    faulty("out of bounds", program, "shared_index", 1, 64, [x, out, -1], shared=67 * 4)


def test_alignment() -> None:
    memory = Memory()
    x, out = memory.copy(numbers(132)), memory.copy(np.zeros(128, np.float32))
    load("memory").launch("wide_load", 1, 32, [x, out, 4], memory=memory)
    np.testing.assert_array_equal(out, x[4:])
    faulty("misaligned access", load("memory"), "wide_load", 1, 32, [x, out, 1], memory=memory)


@each_seed
def test_uninitialised_shared_memory(seed: int) -> None:
    x, out = numbers(64), np.zeros(64, np.float32)
    load("memory").launch("partly_filled", 1, 64, [x, out, 64], seed=seed)
    faulty("uninitialised read", load("memory"), "partly_filled", 1, 64, [x, out, 63], seed=seed)


def test_uninitialised_local_memory() -> None:
    x, out = np.arange(16).astype(np.int32), np.zeros(8, np.int32)
    load("memory").launch("partly_local", 1, 8, [x, out, 8])
    np.testing.assert_array_equal(out, 2 * np.arange(8))
    faulty("uninitialised read", load("memory"), "partly_local", 1, 8, [x, out, 7])


@each_seed
def test_uninitialised_arrays(seed: int) -> None:
    memory, x = Memory(), numbers(64)
    work, out = memory.empty(64, np.float32, "work"), memory.empty(1, np.float32, "out")
    assert not memory.written(work).any()
    args = [x, work, out]
    fault = faulty(
        "uninitialised read", load("memory"), "sum_of", 1, 32, [*args, 63], memory=memory, seed=seed
    )
    assert "work at byte 252" in str(fault)
    np.testing.assert_array_equal(memory.written(work), np.arange(64) < 63)
    assert not memory.written(out).any()
    load("memory").launch("sum_of", 1, 32, [*args, 64], memory=memory, seed=seed)
    assert memory.written(work).all() and memory.written(out).all()
    # A launch may read values that an earlier launch or the host wrote.
    load("memory").launch("sum_of", 1, 32, [*args, 10], memory=memory, seed=seed)
    fresh = memory.empty(64, np.float32)
    fresh[...] = 1
    memory.mark_written(fresh[:64])
    load("memory").launch("sum_of", 1, 32, [x, fresh, out, 0], memory=memory, seed=seed)
    assert out[0] == 64


def test_inputs_are_not_written() -> None:
    memory = Memory()
    x = memory.copy(numbers(64), "x", writable=False)
    fault = faulty("read-only memory", load("memory"), "writes_input", 1, 64, [x], memory=memory)
    assert "a write to x" in str(fault)


@pytest.mark.parametrize("arch", ["compute_75", "compute_80", "compute_120"])
def test_cache_hints(arch: str) -> None:
    x, out = numbers(64), np.zeros((6, 64), np.float32)
    load("memory", arch).launch("hints", 1, 64, [x, out])
    np.testing.assert_array_equal(out, np.tile(x, (6, 1)))


@each_seed
def test_atomics(seed: int) -> None:
    counts, wide, total = np.zeros(8, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.float32)
    counts[2] = 1000
    load("memory").launch("atomics", 2, 48, [counts, wide, total], seed=seed)
    rounds = 96 % 10
    wanted = [2 * sum(range(48)), 47, 0, 2**32 - 1, 0, rounds, 48, 2 * 96]
    np.testing.assert_array_equal(counts, wanted)
    assert wide[0] == 96 << 33 and total[0] == 48


# --- Races ---------------------------------------------------------------------------------------


@each_seed
def test_barrier_between_threads_of_a_block(seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(64, np.float32)
    program.launch("rotated", 1, 64, [x, out, 5], seed=seed)
    np.testing.assert_array_equal(out, np.roll(x, -5))
    racy(program, "rotated_early_read", 1, 64, [x, out, 5], seed=seed)
    fault = faulty("race", program, "rotated_early_write", 1, 64, [x, out, 5], seed=seed)
    assert "shared memory" in str(fault) and str(fault).count("PTX line") == 2


@each_seed
def test_16_bit_neighbours(seed: int) -> None:
    x, out = np.arange(64).astype(np.uint16), np.zeros(64, np.uint16)
    load("memory").launch("neighbours", 1, 64, [x, out, 1], seed=seed)
    load("memory").launch("neighbours", 1, 64, [x, out, 5], seed=seed)
    faulty("race", load("memory"), "neighbours", 1, 64, [x, out, 2], seed=seed)


@each_seed
def test_races_in_global_memory(seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(128, np.float32)
    work = np.zeros(64, np.float32)
    program.launch("reversed", 1, 64, [x, work, out], seed=seed)
    np.testing.assert_array_equal(out[:64], x[::-1])
    faulty("race", program, "reversed_early", 1, 64, [x, work, out], seed=seed)
    program.launch("both_blocks", 2, 64, [out, 64], seed=seed)
    fault = faulty("race", program, "both_blocks", 2, 64, [out, 63], seed=seed)
    assert "block 0 thread" in str(fault) and "block 1 thread" in str(fault)


@each_seed
def test_non_coherent_loads(seed: int) -> None:
    x, y, out = np.zeros((3, 64), np.float32)
    load("memory").launch("non_coherent", 1, 64, [x, y, out], seed=seed)
    faulty("non-coherent read", load("memory"), "non_coherent", 1, 64, [y, y, out], seed=seed)


@each_seed
def test_atomics_do_not_race(seed: int) -> None:
    at = np.random.default_rng(seed).integers(0, 8, 500).astype(np.int32)
    counts = np.zeros(8, np.int32)
    load("memory").launch("hits", 3, 64, [counts, at, len(at)], seed=seed)
    np.testing.assert_array_equal(counts, 3 * np.bincount(at, minlength=8))


# --- Barriers ------------------------------------------------------------------------------------


@each_seed
def test_barrier_divergence(seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(64, np.float32)
    faulty("barrier divergence", program, "two_barriers", 1, 64, [x, out], seed=seed)
    program.launch("exits_before_barrier", 1, 64, [x, out, 64], seed=seed)
    faulty("barrier divergence", program, "exits_before_barrier", 1, 64, [x, out, 40], seed=seed)


@each_seed
def test_deadlock(seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(64, np.float32)
    fault = faulty("deadlock", program, "half_at_barrier", 1, 64, [x, out], seed=seed)
    assert "waits at a barrier" in str(fault) and fault.block is None
    args = [np.zeros(1, np.int32), np.zeros(1, np.int32)]
    faulty("deadlock", program, "waits_for_ever", 1, 2, args, seed=seed, checks=())
    faulty("deadlock", program, "waits_for_ever", 1, 2, args, seed=seed, max_steps=10000)


@each_seed
def test_named_barriers(seed: int) -> None:
    program, x, out = load("memory"), numbers(2, 32), np.zeros((2, 32), np.float32)
    program.launch("produced", 1, 64, [x, out], seed=seed)
    np.testing.assert_array_equal(out, x[:, ::-1])
    racy(program, "produced_unseen", 1, 64, [x, out], seed=seed)


@each_seed
@pytest.mark.parametrize("threads", [96, 80])
def test_barriers_that_count(seed: int, threads: int) -> None:
    x = np.random.default_rng(seed).integers(0, 100, threads).astype(np.int32)
    out = np.zeros(threads, np.int32)
    load("memory").launch("counts", 1, threads, [x, out], seed=seed)
    assert (out == (x & 1).sum() * 4 + (x > 98).any() * 2 + 1).all()

"""The pure functions that plan a call and order its rows, with thousands of random sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.kit.build import native

SEEDS = range(20)


def random_batch(rng: np.random.Generator) -> tuple[list[int], int]:
    """Random batch_sizes [T], non-increasing and at most N, and N."""
    T, N = int(rng.integers(1, 40)), int(rng.integers(1, 60))
    kind = rng.integers(4)
    if kind == 0:  # plain
        sizes = np.full(T, N)
    elif kind == 1:  # one long sequence among short ones
        sizes = np.ones(T, int)
        sizes[: T // 8 + 1] = N
    else:
        sizes = np.sort(rng.integers(1, N + 1, size=T))[::-1]
    return sizes.tolist(), N


def lengths_of(batch_sizes: list[int], N: int) -> np.ndarray:
    return (np.arange(N) < np.array(batch_sizes)[:, None]).sum(0)


# --- Cuts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_cuts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(200):
        batch_sizes, N = random_batch(rng)
        tasks = int(rng.integers(1, 20))
        cut = native().cut_sequences(batch_sizes, N, tasks)
        live = batch_sizes[0]
        # Each live sequence is in exactly one run; no run is empty.
        assert cut[0] == 0
        assert cut[-1] == live
        assert (np.diff(cut) > 0).all(), (cut, batch_sizes)
        assert len(cut) - 1 <= max(1, min(tasks, live // 2))
        # No run has more work than its share and one sequence.
        lengths = lengths_of(batch_sizes, N)
        runs = max(1, min(tasks, live // 2))
        for begin, end in itertools.pairwise(cut):
            work = lengths[begin:end].sum()
            assert work <= lengths.sum() / runs + lengths[begin:end].max()


@pytest.mark.parametrize("T", [1, 7])
def test_cuts_of_a_plain_batch_differ_by_one_sequence(T: int) -> None:
    for N in range(1, 80):
        for tasks in range(1, 20):
            cut = native().cut_sequences([N] * T, N, tasks)
            assert len(cut) - 1 == max(1, min(tasks, N // 2))
            assert np.ptp(np.diff(cut)) <= 1, cut


def test_cuts_balance_work_not_sequences() -> None:
    # The lengths are 8 8 1 1 1 1 1 1 1 1: the first two sequences are two thirds of the work.
    assert native().cut_sequences([10, 2, 2, 2, 2, 2, 2, 2], 10, 2) == [0, 2, 10]
    assert native().cut_sequences([12] + [1] * 11, 12, 2) == [0, 1, 12]


def test_cuts_without_sequences() -> None:
    assert native().cut_sequences([], 3, 4) == [0, 0]
    assert native().cut_sequences([0, 0], 0, 4) == [0, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_plans(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        batch_sizes, N = random_batch(rng)
        columns, threads = int(rng.integers(1, 5000)), int(rng.integers(1, 100))
        inner = int(rng.integers(1, columns + 1))
        directions, values = int(rng.integers(1, 3)), int(2 ** rng.uniform(0, 24))
        input = int(rng.choice([0, rng.integers(1, 5000)]))
        sizes = (batch_sizes, N, columns, inner, input, directions)
        chunk_steps, cut, slices, text = native().make_plan(*sizes, threads, values)
        T, widest = len(batch_sizes), batch_sizes[0]
        assert 1 <= chunk_steps <= T
        # A chunk fits into the buffer, unless it has one step.
        assert chunk_steps == 1 or chunk_steps * widest * columns <= values
        assert chunk_steps == T or (chunk_steps + 1) * widest * columns > values
        assert cut == native().cut_sequences(batch_sizes, N, -(-threads // directions))
        few = widest <= 3 and sum(batch_sizes) <= inner // 16
        wanted = "input weights as stored, " if sum(batch_sizes) <= input // 16 else ""
        wanted += "recurrent weights as stored, " if few else ""
        wanted += f"chunks of {chunk_steps} steps, "
        if slices:
            assert threads > 1
            assert slices * directions >= threads
            wanted += f"by units in {slices} slices"
        else:
            wanted += "by rows, sequences cut at " + " ".join(map(str, cut))
            tasks = len(cut) - 1
            busy = threads > 1 and tasks * directions >= threads and widest >= 4 * tasks
            if busy and sum(batch_sizes) > input // 16 and input > 0:
                wanted += ", each with its x W"
        assert text == wanted
        # Results may depend on the chunks in their last bits, so chunks must not depend on threads.
        alone = native().make_plan(*sizes, 1, values)
        assert alone[0] == chunk_steps
        assert alone[2] == 0


def test_when_threads_share_a_step() -> None:
    def by_units(N: int, H: int, threads: int, directions: int = 1) -> bool:
        return native().make_plan([N] * 5, N, 4 * H, H, H, directions, threads, 1 << 17)[2] > 0

    assert by_units(1, 1024, 2)
    assert by_units(2, 1024, 4, directions=2)
    # Two threads can take one direction each. With many sequences any number of threads is busy.
    assert not by_units(1, 128, 2, directions=2)
    assert not by_units(64, 256, 4)
    assert not by_units(256, 1024, 4)
    # Threads share the units of a matrix that is too large for one L2 cache.
    assert by_units(64, 1024, 4)
    # For a small matrix waiting at each step would take longer than the work.
    assert not by_units(1, 16, 8)


def test_plans_without_rows() -> None:
    for batch_sizes in ([], [0, 0, 0]):
        chunk_steps, cut, _, _ = native().make_plan(batch_sizes, 0, 40, 10, 10, 2, 8, 1 << 20)
        assert 1 <= chunk_steps <= max(1, len(batch_sizes))
        assert cut == [0, 0]


def test_huge_steps_overflow_nothing() -> None:
    plan = native().make_plan([1 << 30] * 3, 1 << 30, 1 << 20, 1 << 18, 1 << 18, 1, 1, 1 << 22)
    assert plan[0] == 1

"""The PTX interpreter: words of 64 bits that carry data and a number between blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptxvm import Fault, Memory
from tests.ptxvm.kit import each_seed, load, needs_nvcc

pytestmark = needs_nvcc

BLOCKS, THREADS, STEPS = 3, 8, 6


def passes(name: str, **kwargs: Any) -> tuple[bool, int]:
    """Runs a probe on the ring: whether its numbers are right, and how many loads were stale."""
    n = BLOCKS * THREADS
    x = (np.arange(n) * 37 % 11).astype(np.int32)
    wanted = x
    for _ in range(STEPS):
        wanted = np.roll(wanted, 1) + np.roll(wanted, -1)
    memory = Memory()
    x, words = memory.copy(x, "x"), memory.copy(np.zeros((2, n), np.uint64), "words")
    run = load("words").launch(
        f"words_{name}", BLOCKS, THREADS, [x, words, n, STEPS], memory=memory, **kwargs
    )
    return bool((x == wanted).all()), run.stale_loads


def outcome(name: str, seed: int) -> str:
    """What a probe does under a seed: "right", "wrong" or the kind of its fault."""
    try:
        return "right" if passes(name, seed=seed, max_steps=200_000)[0] else "wrong"
    except Fault as fault:
        return fault.kind


def outcomes(name: str) -> set[str]:
    return {outcome(name, seed) for seed in range(20)}


@pytest.mark.parametrize("name", ["right", "right_at_least"])
def test_words_without_a_barrier(name: str) -> None:
    runs = [passes(name, seed=seed) for seed in range(20)]
    assert all(right for right, _ in runs)
    assert any(stale for _, stale in runs)


@each_seed
@pytest.mark.parametrize("name", ["plain_store", "plain_load", "block_scope"])
def test_words_that_are_no_strong_accesses(name: str, seed: int) -> None:
    with pytest.raises(Fault) as raised:
        passes(name, seed=seed)
    assert raised.value.kind == "race", str(raised.value)


@each_seed
@pytest.mark.parametrize("name", ["two_stores", "pair_and_word"])
def test_words_that_are_stored_in_halves(name: str, seed: int) -> None:
    with pytest.raises(Fault, match=r"of [48] and of [48] bytes") as raised:
        passes(name, seed=seed)
    assert raised.value.kind == "race"


def test_a_vector_is_two_accesses() -> None:
    """PTX orders the elements of a vector in no way, so a number may come before its data."""
    assert "wrong" in outcomes("pairs")


def test_numbers_that_do_not_change() -> None:
    assert outcomes("same_number") - {"right"} == {"wrong"}


def test_one_buffer_of_words() -> None:
    assert "deadlock" in outcomes("one_buffer")
    assert "wrong" in outcomes("one_buffer_at_least")


@each_seed
def test_both_halves_come_from_one_store(seed: int) -> None:
    word, out = np.zeros(1, np.uint64), np.zeros(200, np.int32)
    run = load("words").launch("halves_agree", 2, 1, [word, out, 200], seed=seed, quantum=4)
    assert out.all()
    assert run.stale_loads > 0

"""The PTX interpreter: mbarrier objects."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.ptxvm import Fault, Program
from tests.ptxvm.kit import each_seed, faulty, load, needs_nvcc

pytestmark = needs_nvcc


@functools.cache
def probes() -> Program:
    return load("mbarrier", "compute_90")


@each_seed
@pytest.mark.parametrize("name", ["right", "trying", "fenced"])
def test_producer_and_consumer(name: str, seed: int) -> None:
    x, out = np.arange(7 * 32).astype(np.int32).reshape(7, 32), np.zeros((7, 32), np.int32)
    probes().launch(f"produce_{name}", 1, 64, [x, out, 7, 32], seed=seed)
    np.testing.assert_array_equal(out, x[:, ::-1])


WRONG = {
    "arrive_relaxed": "weak memory",
    "wait_relaxed": "weak memory",
    "wrong_parity": "race",
    "not_empty": "race",
}


@each_seed
@pytest.mark.parametrize("name", WRONG)
def test_wrong_producer_and_consumer(name: str, seed: int) -> None:
    x, out = np.arange(7 * 32).astype(np.int32), np.zeros(7 * 32, np.int32)
    args = [f"produce_{name}", 1, 64, [x, out, 7, 32]]
    faulty(WRONG[name], probes(), *args, seed=seed, checks=("races",))


@each_seed
def test_counts_of_arrivals(seed: int) -> None:
    x, out = np.arange(7 * 32).astype(np.int32), np.zeros(7 * 32, np.int32)
    args = ["produce_right", 1, 64]
    faulty("race", probes(), *args, [x, out, 7, 31], seed=seed, checks=("races",))
    fault = faulty("deadlock", probes(), *args, [x, out, 7, 33], seed=seed, max_steps=100_000)
    assert "in phase 0: 1 arrivals and 0 bytes are missing" in str(fault)


@each_seed
@pytest.mark.parametrize("name", ["right", "fenced"])
def test_arrivals_from_another_block(name: str, seed: int) -> None:
    x = np.arange(4 * 32).astype(np.int32)
    wanted = x.reshape(2, 2, 32)
    for _ in range(5):
        wanted = np.roll(np.roll(wanted, 1, 1), -1, 2) + 1
    probes().launch(f"ring_{name}", 4, 32, [x, 5], cluster=2, seed=seed)
    np.testing.assert_array_equal(x, wanted.reshape(-1))


@each_seed
@pytest.mark.parametrize("name", ["arrive_relaxed", "arrive_in_block", "wait_in_block"])
def test_wrong_arrivals_from_another_block(name: str, seed: int) -> None:
    x = np.arange(4 * 32).astype(np.int32)
    args = [f"ring_{name}", 4, 32, [x, 5]]
    faulty("weak memory", probes(), *args, cluster=2, seed=seed, checks=("races",))


@each_seed
def test_objects_that_others_know(seed: int) -> None:
    out = np.zeros(1, np.int32)
    probes().launch("shown", 2, 32, [out], cluster=2, seed=seed)
    assert out[0] == 1
    fault = faulty("weak memory", probes(), "shown_relaxed", 2, 32, [out], cluster=2, seed=seed)
    assert "not ordered behind its initialisation" in str(fault)
    faulty("absent block", probes(), "shown_at_once", 2, 32, [out], cluster=2, seed=seed)


@each_seed
def test_an_object_that_others_do_not_know(seed: int) -> None:
    """Another thread's arrival comes before the initialisation, or is not ordered behind it."""
    with pytest.raises(Fault) as raised:
        probes().launch("shown_in_block", 1, 32, [np.zeros(1, np.int32)], seed=seed)
    assert raised.value.kind in ("mbarrier", "race"), str(raised.value)


def test_states_counts_and_bytes() -> None:
    out = np.zeros(11, np.int32)
    probes().launch("counts", 1, 1, [out])
    assert out.tolist() == [5, 4, 0, 2, 1, 1, 4, 0, 0, 1, 7]


MISUSES = {
    0: (1, "mbarrier", "no object was initialised at byte 0 of the shared memory of block 0"),
    1: (1, "mbarrier", "initialised before, and not invalidated since"),
    2: (1, "mbarrier", "only mbarrier instructions may access"),
    3: (1, "mbarrier", "only mbarrier instructions may access"),
    4: (1, "mbarrier", "only mbarrier instructions may access"),
    6: (1, "mbarrier", "the parity of a phase is 0 or 1"),
    7: (1, "misaligned access", "mbarrier object"),
    8: (9, "race", "mbarrier.inval is not ordered behind a use"),
    10: (9, "mbarrier", "1048576 expected bytes are too many"),
    11: (1, "deadlock", "phase 0: 0 arrivals and 16 bytes are missing"),
    12: (1, "mbarrier", "not one that an arrival returned"),
    13: (1, "mbarrier", "the state is of phase 0, but the object is in phase 2"),
    14: (1, "mbarrier", "although it has .noComplete"),
    15: (2, "mbarrier", "3 arrivals at the object at byte 0"),
    16: (1, "mbarrier", "1 arrivals at the object at byte 0"),
}


@pytest.mark.parametrize("which", MISUSES)
def test_misuses(which: int) -> None:
    count, kind, text = MISUSES[which]
    threads = 2 if which == 8 else 1
    args = ["misuse", 1, threads, [np.zeros(2, np.int32), which, count]]
    assert text in str(faulty(kind, probes(), *args, max_steps=10_000))


def test_uses_that_are_right() -> None:
    out = np.zeros(4, np.int32)
    probes().launch("misuse", 1, 4, [out, 9, 9])
    probes().launch("misuse", 1, 4, [out, 5, 4])
    for count in (0, 1 << 20):
        fault = faulty("mbarrier", probes(), "misuse", 1, 4, [out, 5, count])
        assert "it takes 1 to 1048575" in str(fault)

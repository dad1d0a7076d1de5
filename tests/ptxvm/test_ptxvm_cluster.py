"""The PTX interpreter: clusters of blocks, their barrier and shared memory of other blocks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.ptxvm import Program
from tests.ptxvm.kit import Array, each_seed, faulty, load, needs_nvcc

pytestmark = needs_nvcc

BLOCKS, CLUSTER, THREADS = 6, 3, 32


@functools.cache
def probes() -> Program:
    return load("cluster", "compute_90")


# --- Sizes and ranks -----------------------------------------------------------------------------


def test_special_registers() -> None:
    out = np.zeros((2, 6, 12), np.uint32)
    probes().launch("registers", (6, 2), 32, [out], cluster=(3, 2))
    for y in range(2):
        for x in range(6):
            wanted = [x // 3, 0, 2, 1, x % 3, y, 3, 2, y * 3 + x % 3, 6, 1, 1]
            assert out[y, x].tolist() == wanted
    out = np.zeros((1, 2, 12), np.uint32)
    probes().launch("registers", 2, 32, [out])
    assert out[0].tolist() == [[x, 0, 2, 1, 0, 0, 1, 1, 0, 1, 0, 1] for x in range(2)]


def test_sizes_of_clusters() -> None:
    program, out = probes(), np.zeros(4, np.uint32)
    assert program.kernels["required"].cluster == (2, 1, 1)
    assert program.kernels["registers"].cluster == (0, 0, 0)
    program.launch("required", 4, 32, [out])
    assert out.tolist() == [20, 21, 20, 21]
    program.launch("required", 4, 32, [out], cluster=2)
    with pytest.raises(ValueError, match="requires clusters of 2 x 1 x 1 blocks, got 4"):
        program.launch("required", 4, 32, [out], cluster=4)
    with pytest.raises(ValueError, match="grid of 3 x 1 x 1 blocks is no multiple of clusters"):
        program.launch("required", 3, 32, [out])
    registers = np.zeros((34, 12), np.uint32)
    for size in (17, (4, 5), (6, 6, 6)):
        with pytest.raises(ValueError, match="it has 1 to 16"):
            program.launch("registers", 34, 32, [registers], cluster=size)
    with pytest.raises(ValueError, match="at least one block"):
        program.launch("registers", 34, 32, [registers], cluster=0)


def test_directives_of_clusters() -> None:
    text = (
        ".version 8.0\n.target sm_90\n"
        ".visible .entry k()\n.explicitcluster\n.maxclusterrank 4\n{\nret;\n}\n"
    )
    program = Program(text)
    program.launch("k", 4, 1, [], cluster=4)
    with pytest.raises(ValueError, match="must be launched with a size of its clusters"):
        program.launch("k", 4, 1, [])
    with pytest.raises(ValueError, match="it has 1 to 4"):
        program.launch("k", 8, 1, [], cluster=8)


def test_clocks_go_on() -> None:
    out = np.zeros(8, np.int32)
    probes().launch("clocks", 1, 8, [out])
    assert out.all()


# --- Barrier and shared memory -------------------------------------------------------------------


def passed(name: str, steps: int, **kwargs: Any) -> tuple[Array, Array]:
    """Runs a probe `pass_...`; returns its result and the right one."""
    x = np.arange(BLOCKS * THREADS).astype(np.int32)
    wanted = x.reshape(-1, CLUSTER, THREADS)
    for _ in range(steps):
        wanted = np.roll(np.roll(wanted, 1, 1), -1, 2) + 1
    probes().launch(f"pass_{name}", BLOCKS, THREADS, [x, steps], cluster=CLUSTER, **kwargs)
    return x, wanted.reshape(-1)


@each_seed
@pytest.mark.parametrize("name", ["right", "unaligned", "fenced", "groups"])
def test_barriers_of_a_cluster(name: str, seed: int) -> None:
    np.testing.assert_array_equal(*passed(name, 5, seed=seed))


WRONG = {
    "relaxed": "weak memory",
    "fenced_in_block": "weak memory",
    "one_buffer": "race",
    "block_barrier": "absent block",
    "arrive_only": "absent block",
    "wait_only": "barrier divergence",
    "no_last_barrier": "absent block",
    "last_arrival_only": "absent block",
}


@each_seed
@pytest.mark.parametrize("name", WRONG)
def test_wrong_barriers_of_a_cluster(name: str, seed: int) -> None:
    x = np.arange(BLOCKS * THREADS).astype(np.int32)
    args = [f"pass_{name}", BLOCKS, THREADS, [x, 4]]
    fault = faulty(WRONG[name], probes(), *args, cluster=CLUSTER, seed=seed, checks=("races",))
    if WRONG[name] in ("race", "weak memory"):
        assert "shared memory" in str(fault) and str(fault).count("PTX line") == 2


def test_a_block_that_exits_early() -> None:
    """The access may come before the block's end in one run, and behind it in another."""
    texts = set()
    for seed in range(20):
        x = np.arange(BLOCKS * THREADS).astype(np.int32)
        args = ["pass_no_last_barrier", BLOCKS, THREADS, [x, 4]]
        fault = faulty("absent block", probes(), *args, cluster=CLUSTER, seed=seed)
        texts |= {
            t for t in ("which has exited", "may access its shared memory later") if t in str(fault)
        }
    assert len(texts) == 2


@each_seed
def test_stores_to_another_block(seed: int) -> None:
    x, out = np.random.default_rng(seed).integers(0, 100, (2, BLOCKS * THREADS)).astype(np.int32)
    args, kwargs = [BLOCKS, THREADS, [x, out]], {"cluster": CLUSTER, "seed": seed}
    wanted = np.roll(x.reshape(-1, CLUSTER, THREADS), 1, 1)[:, :, ::-1].reshape(-1)
    for name in ("push_right", "push_relaxed"):
        probes().launch(name, *args, **kwargs)
        np.testing.assert_array_equal(out, wanted)
    fault = faulty("absent block", probes(), "push_at_once", *args, **kwargs)
    assert "may not have started" in str(fault)
    faulty("race", probes(), "push_unseen", *args, **kwargs, checks=("races",))


def test_addresses_in_another_block() -> None:
    program, out = probes(), np.zeros(4, np.int32)

    def reach(rank: int, at: int, how: int, kind: str = "") -> str:
        args = ["reaches", 4, 64, [out, rank, at, how]]
        if kind:
            return str(faulty(kind, program, *args, cluster=2))
        program.launch(*args, cluster=2)
        return ""

    reach(1, 12, 0)
    assert out.tolist() == [3, 3, 3, 3]
    fault = reach(1, 256, 0, "out of bounds")
    assert "of block 1 at 256, 4 bytes, of 256" in fault or "of block 3 at 256" in fault
    assert "rank 2 in a cluster of 2" in reach(2, 0, 0, "out of bounds")
    assert "takes one of .shared::cta" in reach(1, 12, 1, "out of bounds")
    reach(1, 2, 0, "misaligned access")
    # The value is 4; generic addresses know their block, and only in block 1 it is its own.
    reach(1, 16, 2)
    assert out.tolist() == [1104, 11104, 1104, 11104]
    reach(1, 16, 3)
    assert out.tolist() == [1, 1, 1, 1]


@each_seed
def test_atomics_in_a_cluster(seed: int) -> None:
    hits = np.zeros(2, np.uint32)
    probes().launch("counts_in_cluster", BLOCKS, 32, [hits], cluster=CLUSTER, seed=seed)
    assert hits.tolist() == [2 * CLUSTER * 32] * 2
    faulty("race", probes(), "counts_in_block", BLOCKS, 32, [hits], cluster=CLUSTER, seed=seed)


@each_seed
def test_the_scope_of_a_cluster(seed: int) -> None:
    x, out, flag = np.zeros(32, np.int32), np.zeros(32, np.int32), np.zeros(1, np.uint32)
    kwargs: dict[str, Any] = {"cluster": 2, "seed": seed}
    for name in ("hands_over_right", "hands_over_wide"):
        probes().launch(name, 2, 32, [x, out], **kwargs)
        np.testing.assert_array_equal(out, np.arange(32)[::-1])
    faulty("weak memory", probes(), "hands_over_fence_of_block", 2, 32, [x, out], **kwargs)
    faulty("race", probes(), "hands_over_flag_of_block", 2, 32, [x, out], **kwargs)
    probes().launch("across_device", 4, 32, [x, flag, out], **kwargs)
    np.testing.assert_array_equal(out, np.arange(32)[::-1])
    flag[...] = 0
    faulty("race", probes(), "across_cluster", 4, 32, [x, flag, out], **kwargs)


@each_seed
def test_arrivals_and_exits(seed: int) -> None:
    kwargs: dict[str, Any] = {"cluster": 2, "seed": seed}
    out = np.zeros(128, np.int32)
    fault = faulty("barrier divergence", probes(), "arrives_twice", 2, 64, [out], **kwargs)
    assert "again without a wait" in str(fault)
    faulty("warp divergence", probes(), "half_a_warp_arrives", 2, 64, [out], **kwargs)
    for name in ("some_exit", "some_arrive_and_exit"):
        out[...] = 0
        probes().launch(name, 2, 64, [out, 40], **kwargs)
        assert (out.reshape(2, 64) == (np.arange(64) < 40)).all()
    out[...] = 0
    fault = faulty(
        "deadlock", probes(), "one_block_waits", 2, 32, [out], **kwargs, checks=(), max_steps=99999
    )
    assert "waits at a barrier" in str(fault)

"""The PTX interpreter: bulk copies and the async proxy."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.ptxvm import Fault, Memory, Program
from tests.ptxvm.kit import each_seed, faulty, load, needs_nvcc

pytestmark = needs_nvcc


@functools.cache
def probes() -> Program:
    return load("bulk", "compute_90")


# --- From global to shared memory ----------------------------------------------------------------


@each_seed
@pytest.mark.parametrize("name", ["right", "proxy"])
def test_stages_that_are_filled_in_turn(name: str, seed: int) -> None:
    x, out = np.arange(6 * 64).astype(np.int32).reshape(6, 64), np.zeros((6, 64), np.int32)
    probes().launch(f"stages_{name}", 1, 64, [x, out, 6, 256], seed=seed)
    np.testing.assert_array_equal(out, x[:, ::-1])


WRONG_STAGES = {
    "unfenced": ("weak memory", "a fence.mbarrier_init or fence.proxy.async is missing"),
    "fenced_elsewhere": ("weak memory", "a fence.mbarrier_init or fence.proxy.async is missing"),
    "not_waited": ("race", "cp.async.bulk.shared::cluster.global"),
    "not_empty": ("race", "not ordered behind the read"),
}


@each_seed
@pytest.mark.parametrize("name", WRONG_STAGES)
def test_wrong_stages(name: str, seed: int) -> None:
    x, out = np.arange(6 * 64).astype(np.int32), np.zeros(6 * 64, np.int32)
    kind, text = WRONG_STAGES[name]
    args = [f"stages_{name}", 1, 64, [x, out, 6, 256]]
    assert text in str(faulty(kind, probes(), *args, seed=seed, checks=("races",)))


@each_seed
def test_numbers_of_bytes(seed: int) -> None:
    x, out = np.arange(6 * 64).astype(np.int32), np.zeros(6 * 64, np.int32)
    args = ["stages_right", 1, 64]
    fault = faulty("deadlock", probes(), *args, [x, out, 1, 272], seed=seed, max_steps=100_000)
    assert "0 arrivals and 16 bytes are missing" in str(fault)
    # If too few bytes are expected, the phase ends before the second copy does or even begins.
    with pytest.raises(Fault) as raised:
        probes().launch(*args, [x, out, 1, 128], seed=seed, checks=("races",))
    assert raised.value.kind in ("mbarrier", "race"), str(raised.value)


def test_addresses_and_sizes() -> None:
    memory = Memory()
    x, out = memory.copy(np.arange(64).astype(np.int32), "x"), np.zeros(1, np.int32)

    def copy(start: int, to: int, size: int, kind: str = "") -> str:
        args = ["copies", 1, 1, [x, out, start, to, size]]
        if kind:
            return str(faulty(kind, probes(), *args, memory=memory))
        probes().launch(*args, memory=memory)
        return ""

    copy(32, 16, 224)
    assert out[0] == 8
    for wrong in ((4, 0, 16), (0, 8, 16), (0, 0, 24)):
        assert "multiples of 16" in copy(*wrong, kind="misaligned access")
    assert "behind the start of x of 256 bytes" in copy(32, 0, 240, "out of bounds")
    # Behind the tile of 256 bytes there is the mbarrier object, and the end of shared memory.
    copy(0, 128, 256, "out of bounds")
    copy(0, 256, 16, "out of bounds")
    unwritten = memory.empty(64, np.int32, "unwritten")
    args = ["copies", 1, 1, [unwritten, out, 0, 0, 16]]
    fault = faulty("uninitialised read", probes(), *args, memory=memory)
    assert "unwritten at byte 0" in str(fault)


# --- The async proxy -----------------------------------------------------------------------------


@each_seed
def test_copies_over_what_threads_wrote(seed: int) -> None:
    x, out = 100 + np.arange(64).astype(np.int32), np.zeros(64, np.int32)
    for name in ("right", "fenced_later"):
        probes().launch(f"overwrite_{name}", 1, 64, [x, out], seed=seed)
        np.testing.assert_array_equal(out, np.where(np.arange(64) < 32, x, np.arange(64)))
    for name in ("unfenced", "fenced_elsewhere"):
        fault = faulty("weak memory", probes(), f"overwrite_{name}", 1, 64, [x, out], seed=seed)
        assert "a fence.proxy.async is missing between the copy and the write" in str(fault)
    faulty("race", probes(), "overwrite_no_barrier", 1, 64, [x, out], seed=seed)


@each_seed
def test_copies_of_what_another_block_wrote(seed: int) -> None:
    work, out, flag = np.zeros(64, np.int32), np.zeros(64, np.int32), np.zeros(1, np.uint32)
    probes().launch("global_right", 2, 64, [work, flag, out], seed=seed)
    np.testing.assert_array_equal(out, np.arange(64)[::-1])
    flag[...] = 0
    faulty("weak memory", probes(), "global_unfenced", 2, 64, [work, flag, out], seed=seed)


# --- From shared to global memory ----------------------------------------------------------------


@each_seed
def test_groups_of_copies(seed: int) -> None:
    for name in ("right", "reads"):
        memory = Memory()
        out, total = memory.empty((5, 64), np.int32, "out"), np.zeros(1, np.int32)
        probes().launch(f"drain_{name}", 1, 64, [out, total, 5], memory=memory, seed=seed)
        assert memory.written(out).all()
        np.testing.assert_array_equal(out.reshape(-1), np.arange(320))
        assert total[0] == (319 if name == "right" else 0)


WRONG_GROUPS = {
    "unfenced": "weak memory",
    "not_waited": "race",
    "waits_for_fewer": "race",
    "read_back_early": "race",
    "exits_early": "absent block",
}


@each_seed
@pytest.mark.parametrize("name", WRONG_GROUPS)
def test_wrong_groups_of_copies(name: str, seed: int) -> None:
    out, total = np.zeros((5, 64), np.int32), np.zeros(1, np.int32)
    args = [f"drain_{name}", 1, 64, [out, total, 5]]
    faulty(WRONG_GROUPS[name], probes(), *args, seed=seed)


# --- In a cluster --------------------------------------------------------------------------------


@each_seed
def test_copies_to_several_blocks(seed: int) -> None:
    x, out = np.arange(64).astype(np.int32), np.zeros((4, 64), np.int32)
    probes().launch("multicast", 4, 64, [x, out, 3], cluster=2, seed=seed)
    np.testing.assert_array_equal(out, np.tile(x[::-1], (4, 1)))
    fault = faulty("out of bounds", probes(), "multicast", 4, 64, [x, out, 7], cluster=2, seed=seed)
    assert "the cluster does not have" in str(fault)


@each_seed
def test_copies_between_blocks(seed: int) -> None:
    x, out = np.arange(4 * 64).astype(np.int32), np.zeros(4 * 64, np.int32)
    kwargs = {"cluster": 2, "seed": seed}
    probes().launch("give_right", 4, 64, [x, out], **kwargs)
    wanted = x.reshape(2, 2, 64)[:, ::-1, ::-1].reshape(-1)
    np.testing.assert_array_equal(out, wanted)
    fault = faulty("absent block", probes(), "give_and_exit", 4, 64, [x, out], **kwargs)
    assert "a copy may access its shared memory later" in str(fault)
    faulty("mbarrier", probes(), "give_other_object", 4, 64, [x, out], **kwargs)


@each_seed
def test_asynchronous_stores(seed: int) -> None:
    x, out = np.arange(4 * 64).astype(np.int32), np.zeros(4 * 64, np.int32)
    kwargs = {"cluster": 2, "seed": seed}
    probes().launch("send_right", 4, 64, [x, out], **kwargs)
    sent = x.reshape(2, 2, 64)[:, ::-1, ::-1].reshape(-1)
    np.testing.assert_array_equal(out, sent + 1000 * (sent + 1) + 1000000 * (sent + 2))
    args = ["send_not_waited", 4, 64, [x, out]]
    fault = faulty("race", probes(), *args, **kwargs, checks=("races",))
    assert "st.async.weak" in str(fault)

"""The PTX interpreter: instructions of whole warps, and asynchronous copies."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxvm.kit import (
    bfloat_bits,
    bfloats,
    each_seed,
    faulty,
    int32,
    load,
    needs_nvcc,
    numbers,
    racy,
)

pytestmark = needs_nvcc

# --- Warps ---------------------------------------------------------------------------------------


@each_seed
def test_shuffles_and_votes(seed: int) -> None:
    x = np.random.default_rng(seed).integers(-50, 50, 32).astype(np.int32)
    out = np.zeros((9, 32), np.int32)
    load("warp").launch("shuffles", 1, 32, [x, out], seed=seed)
    lane = np.arange(32)
    same = [sum(1 << int(k) for k in lane if x[k] & 3 == v & 3) for v in x]
    ballot = sum(1 << k for k in range(32) if x[k] & 1)
    part = sum(1 << k for k in range(12, 32) if x[k] & 2)
    wanted = [
        x[lane ^ 5],
        x[np.where(lane + 3 < 32, lane + 3, lane)],
        x[np.where(lane % 8 >= 2, lane - 2, lane)],
        x[lane // 16 * 16 + lane * 7 % 16],
        [int32(ballot)] * 32,
        [x.sum() + x.min()] * 32,
        [int((x == 5).any()) + 2] * 32,
        [int32(s) for s in same],
        np.where(lane < 12, x[lane ^ 1], int32(part)),
    ]
    np.testing.assert_array_equal(out, wanted)


MMAS = ["tf32_k8", "tf32_k4", "f16_k16", "bf16_k16", "f16_k8", "bf16_k8"]


@pytest.mark.parametrize("which", MMAS)
def test_matrix_product(which: str) -> None:
    dtype, depth = which.split("_k")
    K = int(depth)
    a, b, c = numbers(16, K), numbers(8, K, seed=1), numbers(16, 8, seed=2)
    d = np.zeros_like(c)
    if dtype == "tf32":
        args = x, y = [(v.view(np.uint32) & 0xFFFFE000).view(np.float32) for v in (a, b)]
    elif dtype == "f16":
        args = x, y = [v.astype(np.float16) for v in (a, b)]
    else:
        args = [bfloat_bits(v) for v in (a, b)]
        x, y = [bfloats(v) for v in args]
    load("warp").launch(f"mma_{which}", 1, 32, [*args, c, d])
    exact = x.astype(np.float64) @ y.astype(np.float64).T + c
    np.testing.assert_array_equal(d, exact.astype(np.float32))


def test_matrix_product_with_float16_sums() -> None:
    a, b, c = (numbers(*s).astype(np.float16) for s in ((16, 16), (8, 16), (16, 8)))
    d = np.zeros_like(c)
    load("warp").launch("mma_f16_sums", 1, 32, [a, b, c, d])
    exact = a.astype(np.float64) @ b.astype(np.float64).T + c
    np.testing.assert_array_equal(d, exact.astype(np.float16))


@pytest.mark.parametrize("name", ["matrices", "matrices_transposed"])
def test_matrix_load(name: str) -> None:
    x = np.arange(256).astype(np.uint16).reshape(16, 16)
    out = np.zeros((32, 4), np.uint32)
    load("warp").launch(name, 1, 32, [x, out])
    for k, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        tile = x[row : row + 8, column : column + 8]
        tile = (tile.T if "transposed" in name else tile).astype(np.uint32)
        pairs = tile[:, 0::2] | tile[:, 1::2] << 16
        np.testing.assert_array_equal(out[:, k].reshape(8, 4), pairs)


@each_seed
def test_shuffle_in_a_diverged_warp(seed: int) -> None:
    x, out = np.arange(32).astype(np.int32), np.zeros(32, np.int32)
    faulty("warp divergence", load("warp"), "shuffle_when_diverged", 1, 32, [x, out], seed=seed)
    faulty("warp divergence", load("warp"), "shuffle_beyond_the_mask", 1, 32, [x, out], seed=seed)


@each_seed
def test_lanes_share_memory_only_through_a_warp_barrier(seed: int) -> None:
    x, out = np.arange(32).astype(np.int32), np.zeros(32, np.int32)
    load("warp").launch("warp_barrier", 1, 32, [x, out], seed=seed)
    np.testing.assert_array_equal(out, x[::-1])
    racy(load("warp"), "no_warp_barrier", 1, 32, [x, out], seed=seed)


# --- Asynchronous copies -------------------------------------------------------------------------


@each_seed
def test_asynchronous_copies(seed: int) -> None:
    x, out = numbers(2, 64, 4), np.zeros(64, np.float32)
    load("warp").launch("copies", 1, 64, [x, out], seed=seed)
    np.testing.assert_array_equal(out, np.roll(x[0, :, 0], -1) + np.roll(x[1, :, 3], -2))
    for name in ("copies_not_waited_for", "copies_one_not_waited_for", "copies_no_barrier"):
        racy(load("warp"), name, 1, 64, [x, out], seed=seed)


@each_seed
def test_copy_into_a_stage_in_use(seed: int) -> None:
    x, out = numbers(2, 64), np.zeros((2, 64), np.float32)
    load("warp").launch("refilled", 1, 64, [x, out], seed=seed)
    np.testing.assert_array_equal(out, x[:, ::-1])
    faulty("race", load("warp"), "refilled_too_early", 1, 64, [x, out], seed=seed)


def test_copy_with_zeros() -> None:
    x, out = numbers(64, 2), np.full((64, 2), np.nan, np.float32)
    load("warp").launch("copies_with_zeros", 1, 64, [x, out, 40])
    np.testing.assert_array_equal(out, np.where(np.arange(64)[:, None] < 40, x, 0))

"""The PTX interpreter: what it computes against numpy, and each of its checks on a wrong kernel and
on the right one beside it (tests/ptxvm/probes).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import setup_build
from tests import ptxvm
from tests.ptxvm import Fault, Memory, Program

PROBES = Path(__file__).parent / "probes"
SEEDS = [0, 1, 2, 3, 4]

Array = np.ndarray[Any, Any]
Load = Callable[[str], Program]

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: it compiles the probes"
)
each_seed = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Compiles a file of probes for an architecture, once."""
    folder = tmp_path_factory.mktemp("ptx")
    programs: dict[tuple[str, str], Program] = {}

    def load(name: str, arch: str = "compute_80") -> Program:
        if (name, arch) not in programs:
            text = ptxvm.compile_ptx(PROBES / f"{name}.cu", folder, arch=arch)
            programs[name, arch] = Program(text)
        return programs[name, arch]

    return load


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def integers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape).astype(np.int32)


def bfloat_bits(x: Array) -> Array:
    """Round to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bfloats(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def racy(program: Program, *args: Any, **kwargs: Any) -> Any:
    """The race of a launch, where a read may also come before there is anything to read."""
    return faulty("race", program, *args, checks=("races",), **kwargs)


def faulty(kind: str, program: Program, *args: Any, **kwargs: Any) -> Any:
    """The fault of this kind that a launch must make."""
    with pytest.raises(Fault) as raised:
        program.launch(*args, **kwargs)
    assert raised.value.kind == kind, str(raised.value)
    return raised.value


# --- Arithmetic ----------------------------------------------------------------------------------

ODD = [0, 1, -1, 2**31 - 1, -(2**31), 255, -256]


def int32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def truncated_division(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def integer_results(x: int, y: int) -> list[int]:
    ux, uy, s = x % 2**32, y % 2**32, y & 31
    pool = [*ux.to_bytes(4, "little"), *uy.to_bytes(4, "little")]
    odd = y | 1
    quotient = truncated_division(x, odd)
    field = (x >> s) & 0x7F
    mask = (0x1FF << s) & (2**32 - 1)
    return [
        x + y, x - y, x * y, x * y >> 32, ux * uy >> 32,
        quotient, x - quotient * odd, ux // (uy | 1), min(x, y), max(ux, uy),
        x << s, x >> s, ux >> s, (x & y) ^ (x | ~y), ux.bit_count(),
        32 - ux.bit_length(), int(f"{ux:032b}"[::-1], 2), (ux & -ux).bit_length(),
        sum(pool[n] << 8 * k for k, n in enumerate([4, 1, 6, 3])),
        (uy << 32 | ux) << s >> 32, abs(x),
        # Beyond the top, bfe goes on with the sign.
        (x >> s if s > 25 else field - (field >> 6 << 7)),
        (uy & ~mask) | (ux << s & mask),
        (x + 128) % 256 - 128 + uy % 65536,
    ]  # fmt: skip


def test_integers(load: Load) -> None:
    a = np.concatenate([np.repeat(ODD, len(ODD)), integers(200)]).astype(np.int32)
    b = np.concatenate([np.tile(ODD, len(ODD)), integers(200, seed=1)]).astype(np.int32)
    out = np.zeros((24, len(a)), np.int32)
    load("arithmetic").launch("integers", 4, 64, [a, b, out, len(a)])
    wanted = [integer_results(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(out.T, [[int32(v) for v in row] for row in wanted])


def test_long_integers(load: Load) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(-(2**63), 2**63, (2, 200), dtype=np.int64)
    out = np.zeros((6, 200), np.int64)
    load("arithmetic").launch("long_integers", 4, 64, [a, b, out, 200])
    for x, y, got in zip(a.tolist(), b.tolist(), out.T.tolist(), strict=True):
        ux, uy = x % 2**64, y % 2**64
        wanted = [x * y + x, x * y >> 64, truncated_division(x, y | 1), ux % (uy | 1),
                  x >> (y & 63), 64 - ux.bit_length() + uy.bit_count()]  # fmt: skip
        assert got == [(v + 2**63) % 2**64 - 2**63 for v in wanted]


def directed(exact: Array, towards: float) -> Array:
    """float64 results rounded to float32 towards a bound; 0 for towards zero."""
    near = exact.astype(np.float32)
    if towards == 0:
        wrong = np.abs(near) > np.abs(exact)
    else:
        wrong = near < exact if towards > 0 else near > exact
    return np.where(wrong, np.nextafter(near, np.float32(towards)), near)


def test_floats(load: Load) -> None:
    a, b = numbers(500), numbers(500, seed=1)
    out = np.zeros((16, 500), np.float32)
    load("arithmetic").launch("floats", 4, 128, [a, b, out, 500])
    # Sums and products of float32 are exact in float64, or near enough to round alike.
    x, y = a.astype(np.float64), b.astype(np.float64)
    up, down = np.inf, -np.inf
    wanted = [
        a + b, a * b, (x * y + 1).astype(np.float32), a / b, np.sqrt(np.abs(a)),
        directed(x + y, down), directed(x + y, up), directed(x * y, 0),
        directed(x * y + 1, down), directed(x / y, up), np.minimum(a, b), np.maximum(a, b),
        np.floor(a * 10), np.rint(b * 10), np.clip(a, 0, 1), np.copysign(a, b),
    ]  # fmt: skip
    for row, (got, want) in enumerate(zip(out, wanted, strict=True)):
        np.testing.assert_array_equal(got, want.astype(np.float32), err_msg=str(row))


def test_functions(load: Load) -> None:
    a = numbers(500) * np.float32(8)
    out = np.zeros((6, 500), np.float32)
    load("arithmetic").launch("functions", 4, 128, [a, out, 500])
    x = a.astype(np.float64)
    wanted = [np.exp(x), np.tanh(x), np.log(np.abs(x) + 1e-3), 1 / (1 + np.exp(-x)), np.sin(x)]
    for got, want in zip(out, [*wanted, np.tanh(x)], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_doubles(load: Load) -> None:
    a, b = numbers(300, dtype=np.float64) / 3, numbers(300, seed=1, dtype=np.float64) / 7
    out = np.zeros((5, 300))
    load("arithmetic").launch("doubles", 3, 128, [a, b, out, 300])
    wanted = [a * b + a / b, np.exp(a), np.tanh(a), a + b,
              np.sqrt(np.abs(a)) + np.log(np.abs(b) + 1e-3)]  # fmt: skip
    np.testing.assert_allclose(out, wanted, rtol=1e-14, atol=1e-15)
    assert (out[3] <= a + b).all() and (out[3] < a + b).any()


def test_every_16_bit_number(load: Load) -> None:
    halves, floats = np.zeros((2, 65536), np.float32)
    load("arithmetic").launch("to_floats", 128, 512, [halves, floats])
    bits = np.arange(65536).astype(np.uint16)
    np.testing.assert_array_equal(halves, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(floats, bfloats(bits))


def test_rounding_to_16_bits(load: Load) -> None:
    rng = np.random.default_rng(3)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    wide = rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(9e9)), wide[np.isfinite(wide)]])
    half, bfloat = np.zeros((2, len(x)), np.uint16)
    tf32 = np.zeros(len(x), np.uint32)
    load("arithmetic").launch(
        "from_floats", -(-len(x) // 512), 512, [x, half, bfloat, tf32, len(x)]
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(bfloat, bfloat_bits(x))
    np.testing.assert_array_equal(tf32, (x.view(np.uint32) + np.uint32(0x1000)) & 0xFFFFE000)


def test_pairs(load: Load) -> None:
    a, b = (numbers(256, seed=s).astype(np.float16) for s in (4, 5))
    c, d = (bfloat_bits(numbers(256, seed=s)) for s in (6, 7))
    half, bfloat = np.zeros(256, np.float16), np.zeros(256, np.uint16)
    load("arithmetic").launch("pairs", 1, 128, [a, b, half, c, d, bfloat, 128])
    x, y = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_array_equal(half, (x * y + (a + b)).astype(np.float16))
    x, y = bfloats(c), bfloats(d)
    product = bfloats(bfloat_bits(x * y))
    np.testing.assert_array_equal(bfloat, bfloat_bits(x * y + product))


def test_conversions(load: Load) -> None:
    a = numbers(256) * np.float32(1000)
    out = np.zeros((5, 256), np.int32)
    load("arithmetic").launch("conversions", 2, 128, [a, out, 256])
    whole = np.trunc(a).astype(np.int64)
    wanted = [whole, np.rint(a), np.trunc(np.abs(a)), (whole + 128) % 256 - 128,
              (a * np.float32(1e6)).astype(np.int64) >> 3]  # fmt: skip
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("arch", ["compute_75", "compute_90", "compute_120"])
def test_branches_and_local_memory(load: Load, arch: str) -> None:
    a = np.arange(-20, 80).astype(np.int32)
    out = np.zeros(100, np.int32)
    load("arithmetic", arch).launch("branches", 2, 64, [a, out, 100])
    for k, x in enumerate(a.tolist()):
        v = x * (x & 7)
        v = [v + 11, v * 3, v - int(a[(k + 1) % 100]), v ^ 0x55, -v, v << 2, v * v + 1, 7][x & 7]
        assert out[k] == int32((v * 0x123456789ABCDEF + x >> 50) + v)


# Registers share places; these must not, though nothing reads them in between.
REGISTERS = """
.version 9.0
.target sm_80
.visible .entry k(.param .u64 out) {
  .reg .b32 %r<8>; .reg .b64 %rd<3>; .reg .pred %p<3>;
  ld.param.u64 %rd0, [out];
  mov.u32 %r5, %tid.x;
  mov.u32 %r0, 5;
  setp.eq.u32 %p0, %r5, 1;
  @%p0 mov.u32 %r0, 7;
  mov.u32 %r4, 0;
  mov.u32 %r7, 0;
again:
  @%p0 bra skip;
  add.u32 %r1, %r4, 1;
  mul.lo.u32 %r2, %r1, 3;
  add.u32 %r7, %r7, %r2;
skip:
  mov.u32 %r3, 1000;
  add.u32 %r4, %r4, 1;
  setp.lt.u32 %p1, %r4, 4;
  @%p1 bra again;
  add.u32 %r6, %r0, %r7;
  add.u32 %r6, %r6, %r3;
  mad.wide.u32 %rd1, %r5, 4, %rd0;
  st.global.u32 [%rd1], %r6;
  ret;
}
"""


def test_registers_that_share_places() -> None:
    out = np.zeros(3, np.int32)
    Program(REGISTERS).launch("k", 1, 3, [out])
    assert out.tolist() == [1005 + 30, 1007, 1005 + 30]


# --- Warps ---------------------------------------------------------------------------------------


@each_seed
def test_shuffles_and_votes(load: Load, seed: int) -> None:
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
def test_matrix_product(load: Load, which: str) -> None:
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


def test_matrix_product_with_float16_sums(load: Load) -> None:
    a, b, c = (numbers(*s).astype(np.float16) for s in ((16, 16), (8, 16), (16, 8)))
    d = np.zeros_like(c)
    load("warp").launch("mma_f16_sums", 1, 32, [a, b, c, d])
    exact = a.astype(np.float64) @ b.astype(np.float64).T + c
    np.testing.assert_array_equal(d, exact.astype(np.float16))


@pytest.mark.parametrize("name", ["matrices", "matrices_transposed"])
def test_matrix_load(load: Load, name: str) -> None:
    x = np.arange(256).astype(np.uint16).reshape(16, 16)
    out = np.zeros((32, 4), np.uint32)
    load("warp").launch(name, 1, 32, [x, out])
    for k, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        tile = x[row : row + 8, column : column + 8]
        tile = (tile.T if "transposed" in name else tile).astype(np.uint32)
        pairs = tile[:, 0::2] | tile[:, 1::2] << 16
        np.testing.assert_array_equal(out[:, k].reshape(8, 4), pairs)


@each_seed
def test_shuffle_in_a_diverged_warp(load: Load, seed: int) -> None:
    x, out = np.arange(32).astype(np.int32), np.zeros(32, np.int32)
    faulty("warp divergence", load("warp"), "shuffle_when_diverged", 1, 32, [x, out], seed=seed)
    faulty("warp divergence", load("warp"), "shuffle_beyond_the_mask", 1, 32, [x, out], seed=seed)


@each_seed
def test_lanes_share_memory_only_through_a_warp_barrier(load: Load, seed: int) -> None:
    x, out = np.arange(32).astype(np.int32), np.zeros(32, np.int32)
    load("warp").launch("warp_barrier", 1, 32, [x, out], seed=seed)
    np.testing.assert_array_equal(out, x[::-1])
    racy(load("warp"), "no_warp_barrier", 1, 32, [x, out], seed=seed)


# --- Asynchronous copies -------------------------------------------------------------------------


@each_seed
def test_asynchronous_copies(load: Load, seed: int) -> None:
    x, out = numbers(2, 64, 4), np.zeros(64, np.float32)
    load("warp").launch("copies", 1, 64, [x, out], seed=seed)
    np.testing.assert_array_equal(out, np.roll(x[0, :, 0], -1) + np.roll(x[1, :, 3], -2))
    for name in ("copies_not_waited_for", "copies_one_not_waited_for", "copies_no_barrier"):
        racy(load("warp"), name, 1, 64, [x, out], seed=seed)


@each_seed
def test_copy_into_a_stage_in_use(load: Load, seed: int) -> None:
    x, out = numbers(2, 64), np.zeros((2, 64), np.float32)
    load("warp").launch("refilled", 1, 64, [x, out], seed=seed)
    np.testing.assert_array_equal(out, x[:, ::-1])
    faulty("race", load("warp"), "refilled_too_early", 1, 64, [x, out], seed=seed)


def test_copy_with_zeros(load: Load) -> None:
    x, out = numbers(64, 2), np.full((64, 2), np.nan, np.float32)
    load("warp").launch("copies_with_zeros", 1, 64, [x, out, 40])
    np.testing.assert_array_equal(out, np.where(np.arange(64)[:, None] < 40, x, 0))


# --- Bounds, first use ---------------------------------------------------------------------------


def test_bounds_of_arrays(load: Load) -> None:
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


def test_bounds_of_shared_memory(load: Load) -> None:
    x, out = numbers(64), np.zeros(64, np.float32)
    program = load("memory")
    program.launch("shared_index", 1, 64, [x, out, 3], shared=67 * 4)
    np.testing.assert_array_equal(out, x)
    faulty("out of bounds", program, "shared_index", 1, 64, [x, out, 4], shared=67 * 4)
    faulty("out of bounds", program, "shared_index", 1, 64, [x, out, -1], shared=67 * 4)


def test_alignment(load: Load) -> None:
    memory = Memory()
    x, out = memory.copy(numbers(132)), memory.copy(np.zeros(128, np.float32))
    load("memory").launch("wide_load", 1, 32, [x, out, 4], memory=memory)
    np.testing.assert_array_equal(out, x[4:])
    faulty("misaligned access", load("memory"), "wide_load", 1, 32, [x, out, 1], memory=memory)


@each_seed
def test_uninitialised_shared_memory(load: Load, seed: int) -> None:
    x, out = numbers(64), np.zeros(64, np.float32)
    load("memory").launch("partly_filled", 1, 64, [x, out, 64], seed=seed)
    faulty("uninitialised read", load("memory"), "partly_filled", 1, 64, [x, out, 63], seed=seed)


def test_uninitialised_local_memory(load: Load) -> None:
    x, out = np.arange(16).astype(np.int32), np.zeros(8, np.int32)
    load("memory").launch("partly_local", 1, 8, [x, out, 8])
    np.testing.assert_array_equal(out, 2 * np.arange(8))
    faulty("uninitialised read", load("memory"), "partly_local", 1, 8, [x, out, 7])


@each_seed
def test_uninitialised_arrays(load: Load, seed: int) -> None:
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
    # What one launch wrote, the next may read; so with what the host wrote.
    load("memory").launch("sum_of", 1, 32, [*args, 10], memory=memory, seed=seed)
    fresh = memory.empty(64, np.float32)
    fresh[...] = 1
    memory.mark_written(fresh[:64])
    load("memory").launch("sum_of", 1, 32, [x, fresh, out, 0], memory=memory, seed=seed)
    assert out[0] == 64


def test_inputs_are_not_written(load: Load) -> None:
    memory = Memory()
    x = memory.copy(numbers(64), "x", writable=False)
    fault = faulty("read-only memory", load("memory"), "writes_input", 1, 64, [x], memory=memory)
    assert "a write to x" in str(fault)


@pytest.mark.parametrize("arch", ["compute_75", "compute_80", "compute_120"])
def test_cache_hints(load: Load, arch: str) -> None:
    x, out = numbers(64), np.zeros((6, 64), np.float32)
    load("memory", arch).launch("hints", 1, 64, [x, out])
    np.testing.assert_array_equal(out, np.tile(x, (6, 1)))


@each_seed
def test_atomics(load: Load, seed: int) -> None:
    counts, wide, total = np.zeros(8, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.float32)
    counts[2] = 1000
    load("memory").launch("atomics", 2, 48, [counts, wide, total], seed=seed)
    rounds = 96 % 10
    wanted = [2 * sum(range(48)), 47, 0, 2**32 - 1, 0, rounds, 48, 2 * 96]
    np.testing.assert_array_equal(counts, wanted)
    assert wide[0] == 96 << 33 and total[0] == 48


# --- Races ---------------------------------------------------------------------------------------


@each_seed
def test_barrier_between_threads_of_a_block(load: Load, seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(64, np.float32)
    program.launch("rotated", 1, 64, [x, out, 5], seed=seed)
    np.testing.assert_array_equal(out, np.roll(x, -5))
    racy(program, "rotated_early_read", 1, 64, [x, out, 5], seed=seed)
    fault = faulty("race", program, "rotated_early_write", 1, 64, [x, out, 5], seed=seed)
    assert "shared memory" in str(fault) and str(fault).count("PTX line") == 2


@each_seed
def test_16_bit_neighbours(load: Load, seed: int) -> None:
    x, out = np.arange(64).astype(np.uint16), np.zeros(64, np.uint16)
    load("memory").launch("neighbours", 1, 64, [x, out, 1], seed=seed)
    load("memory").launch("neighbours", 1, 64, [x, out, 5], seed=seed)
    faulty("race", load("memory"), "neighbours", 1, 64, [x, out, 2], seed=seed)


@each_seed
def test_races_in_global_memory(load: Load, seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(128, np.float32)
    work = np.zeros(64, np.float32)
    program.launch("reversed", 1, 64, [x, work, out], seed=seed)
    np.testing.assert_array_equal(out[:64], x[::-1])
    faulty("race", program, "reversed_early", 1, 64, [x, work, out], seed=seed)
    program.launch("both_blocks", 2, 64, [out, 64], seed=seed)
    fault = faulty("race", program, "both_blocks", 2, 64, [out, 63], seed=seed)
    assert "block 0 thread" in str(fault) and "block 1 thread" in str(fault)


@each_seed
def test_non_coherent_loads(load: Load, seed: int) -> None:
    x, y, out = np.zeros((3, 64), np.float32)
    load("memory").launch("non_coherent", 1, 64, [x, y, out], seed=seed)
    faulty("non-coherent read", load("memory"), "non_coherent", 1, 64, [y, y, out], seed=seed)


@each_seed
def test_atomics_do_not_race(load: Load, seed: int) -> None:
    at = np.random.default_rng(seed).integers(0, 8, 500).astype(np.int32)
    counts = np.zeros(8, np.int32)
    load("memory").launch("hits", 3, 64, [counts, at, len(at)], seed=seed)
    np.testing.assert_array_equal(counts, 3 * np.bincount(at, minlength=8))


# --- Barriers ------------------------------------------------------------------------------------


@each_seed
def test_barrier_divergence(load: Load, seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(64, np.float32)
    faulty("barrier divergence", program, "two_barriers", 1, 64, [x, out], seed=seed)
    program.launch("exits_before_barrier", 1, 64, [x, out, 64], seed=seed)
    faulty("barrier divergence", program, "exits_before_barrier", 1, 64, [x, out, 40], seed=seed)


@each_seed
def test_deadlock(load: Load, seed: int) -> None:
    program, x, out = load("memory"), numbers(64), np.zeros(64, np.float32)
    fault = faulty("deadlock", program, "half_at_barrier", 1, 64, [x, out], seed=seed)
    assert "waits at a barrier" in str(fault) and fault.block is None
    args = [np.zeros(1, np.int32), np.zeros(1, np.int32)]
    faulty("deadlock", program, "waits_for_ever", 1, 2, args, seed=seed, checks=())
    faulty("deadlock", program, "waits_for_ever", 1, 2, args, seed=seed, max_steps=10000)


@each_seed
def test_named_barriers(load: Load, seed: int) -> None:
    program, x, out = load("memory"), numbers(2, 32), np.zeros((2, 32), np.float32)
    program.launch("produced", 1, 64, [x, out], seed=seed)
    np.testing.assert_array_equal(out, x[:, ::-1])
    racy(program, "produced_unseen", 1, 64, [x, out], seed=seed)


@each_seed
@pytest.mark.parametrize("threads", [96, 80])
def test_barriers_that_count(load: Load, seed: int, threads: int) -> None:
    x = np.random.default_rng(seed).integers(0, 100, threads).astype(np.int32)
    out = np.zeros(threads, np.int32)
    load("memory").launch("counts", 1, threads, [x, out], seed=seed)
    assert (out == (x & 1).sum() * 4 + (x > 98).any() * 2 + 1).all()


# --- Between blocks ------------------------------------------------------------------------------

BLOCKS, THREADS, STEPS = 3, 64, 4


def ring(steps: int) -> tuple[Array, Array]:
    """A ring of numbers and what exchange makes of it."""
    x = (np.arange(BLOCKS * THREADS) * 37 % 11).astype(np.int32)
    y = x
    for _ in range(steps):
        y = np.roll(y, 1) + np.roll(y, -1)
    return x, y


def run_ring(program: Program, name: str, **kwargs: Any) -> tuple[Array, Array]:
    x, wanted = ring(STEPS)
    memory = Memory()
    x, y = memory.copy(x, "x"), memory.empty(x.shape, np.int32, "y")
    count = memory.copy(np.zeros(BLOCKS, np.uint32), "count")
    args = [x, y, count, len(x), STEPS]
    program.launch(name, BLOCKS, THREADS, args, memory=memory, **kwargs)
    return x, wanted


def exchange(program: Program, barrier: str) -> str:
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
def test_barriers_of_the_grid(load: Load, barrier: str, seed: int) -> None:
    program = load("order")
    np.testing.assert_array_equal(*run_ring(program, exchange(program, barrier), seed=seed))


@each_seed
@pytest.mark.parametrize("name", ["split_barrier", "flags", "generations"])
def test_other_ways_to_wait(load: Load, name: str, seed: int) -> None:
    np.testing.assert_array_equal(*run_ring(load("order"), name, seed=seed))


@each_seed
@pytest.mark.parametrize("barrier", WRONG)
def test_wrong_barriers_of_the_grid(load: Load, barrier: str, seed: int) -> None:
    program = load("order")
    with pytest.raises(Fault) as raised:
        run_ring(program, exchange(program, barrier), seed=seed, checks=("races",))
    assert raised.value.kind == WRONG[barrier], str(raised.value)


@each_seed
def test_one_buffer_where_two_are_needed(load: Load, seed: int) -> None:
    x, _ = ring(STEPS)
    program, count = load("order"), np.zeros(1, np.uint32)
    args = [x, count, len(x), STEPS]
    faulty("race", program, program.name_of("one_buffer"), BLOCKS, THREADS, args, seed=seed)


@each_seed
def test_flags_in_shared_memory(load: Load, seed: int) -> None:
    program, x, out = load("order"), np.arange(32).astype(np.int32), np.zeros(32, np.int32)
    args = [1, 64, [x, out]]
    program.launch(program.name_of("shared_flagILb1ELb1E"), *args, seed=seed)
    np.testing.assert_array_equal(out, x[::-1])
    for wrong in ("shared_flagILb0ELb1E", "shared_flagILb1ELb0E"):
        faulty("weak memory", program, program.name_of(wrong), *args, seed=seed)


@pytest.mark.parametrize("fences", [True, False])
def test_stale_values_of_volatile_loads(load: Load, fences: bool) -> None:
    """All accesses are strong: nothing races, but without fences they may come out of order."""
    program, right, stale = load("order"), 0, 0
    for seed in range(20):
        x, flag, out = np.zeros(64, np.int32), np.zeros(1, np.uint32), np.zeros(64, np.int32)
        name = program.name_of(f"pass_onILb{int(fences)}E")
        run = program.launch(name, 2, 32, [x, flag, out, 64], seed=seed)
        right += bool((out == np.arange(64) + 1).all())
        stale += run.stale_loads
    assert right == 20 if fences else right < 10
    assert stale > 0


# --- Errors --------------------------------------------------------------------------------------


def test_faults_of_the_kernel_itself(load: Load) -> None:
    program, out = load("memory"), np.zeros(64, np.int32)
    x = np.arange(64).astype(np.int32)
    program.launch("asserts", 1, 64, [x, out])
    np.testing.assert_array_equal(out, x)
    failed = faulty("assert", program, "asserts", 1, 64, [x + 60, out])
    assert failed.thread >= 40
    assert re.search(r"hold: x\[threadIdx.x\] < 100, in .*asserts", str(failed))
    assert faulty("division by zero", program, "divides", 1, 64, [x, out]).thread == 0
    assert "inlined" in str(faulty("unsupported", program, "calls", 1, 64, [x, out]))


class Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("scale", ctypes.c_float * 3),
    )


def test_structures_by_value(load: Load) -> None:
    program, x, out = load("memory"), numbers(60), np.zeros(60, np.float32)
    args = Args(x.ctypes.data, out.ctypes.data, 60, (ctypes.c_float * 3)(1, 2, 3))
    assert program.kernels["takes_struct"].parameter_sizes == (ctypes.sizeof(Args),)
    program.launch("takes_struct", 1, 64, [args], buffers=[x, out])
    np.testing.assert_array_equal(out, x * (np.arange(60) % 3 + 1).astype(np.float32))
    faulty("out of bounds", program, "takes_struct", 1, 64, [args], buffers=[out])


def test_every_instruction_is_known(load: Load) -> None:
    for name in ("arithmetic", "warp", "memory", "order"):
        program = load(name)
        unknown = {kernel: program.unknown(kernel) for kernel in program.kernels}
        assert not any(unknown.values()), unknown
    text = (
        ".version 9.0\n.target sm_90\n.visible .entry k()\n{\nwgmma.fence.sync.aligned;\nret;\n}\n"
    )
    program = Program(text)
    assert program.unknown("k") == ["wgmma.fence.sync.aligned"]
    faulty("unsupported", program, "k", 1, 1, [])


def test_launch_errors(load: Load) -> None:
    program, x = load("memory"), np.ones(64, np.int32)
    with pytest.raises(ValueError, match="no kernel is named 'absent'"):
        program.launch("absent", 1, 1, [])
    with pytest.raises(ValueError, match="divides takes 2 arguments, got 1"):
        program.launch("divides", 1, 64, [x])
    with pytest.raises(ValueError, match="limited to 64 threads a block, got 65"):
        program.launch("divides", 1, 65, [x, x.copy()])
    with pytest.raises(ValueError, match=r"argument 0 of takes_struct has 32 bytes, got 31"):
        program.launch("takes_struct", 1, 64, [bytes(31)])
    with pytest.raises(ValueError, match="overlaps"):
        program.launch("divides", 1, 64, [x[:40], x[30:]])
    with pytest.raises(ValueError, match="checks must be of"):
        program.launch("divides", 1, 64, [x, x.copy()], checks=["speed"])
    with pytest.raises(RuntimeError, match="what is this"):
        Program(".version 9.0\n.target sm_80\n.visible .entry k()\n{\n.what is this;\nret;\n}\n")


def test_memory_behind_pointers() -> None:
    memory = Memory()
    x = memory.copy(np.arange(12).reshape(3, 4), "x")
    view = memory.view(x[1].ctypes.data, (2, 4), x.dtype)
    np.testing.assert_array_equal(view, x[1:])
    view[0, 0] = 99
    assert x[1, 0] == 99
    with pytest.raises(ValueError, match="no array holds"):
        memory.view(x.ctypes.data + 8, (3, 4), x.dtype)

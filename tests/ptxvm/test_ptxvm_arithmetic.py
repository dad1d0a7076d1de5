"""The PTX interpreter: arithmetic, conversions and branches, compared with numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxvm import Program
from tests.ptxvm.kit import Array, bfloat_bits, bfloats, int32, load, needs_nvcc, numbers

pytestmark = needs_nvcc

EXTREMES = [0, 1, -1, 2**31 - 1, -(2**31), 255, -256]


def integers(*shape: int, seed: int = 0) -> Array:
    """Random numbers of 32 bits."""
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape).astype(np.int32)


def truncated_division(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def integer_results(x: int, y: int) -> list[int]:
    """The results of the probe `integers` for one pair of numbers, before they wrap to 32 bits."""
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
        # bfe: bits of the field above bit 31 are copies of the sign.
        (x >> s if s > 25 else field - (field >> 6 << 7)),
        (uy & ~mask) | (ux << s & mask),
        (x + 128) % 256 - 128 + uy % 65536,
    ]  # fmt: skip


def test_integers() -> None:
    a = np.concatenate([np.repeat(EXTREMES, len(EXTREMES)), integers(200)]).astype(np.int32)
    b = np.concatenate([np.tile(EXTREMES, len(EXTREMES)), integers(200, seed=1)]).astype(np.int32)
    out = np.zeros((24, len(a)), np.int32)
    load("arithmetic").launch("integers", 4, 64, [a, b, out, len(a)])
    wanted = [integer_results(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(out.T, [[int32(v) for v in row] for row in wanted])


def test_long_integers() -> None:
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
    """Rounds float64 numbers to float32, towards inf, -inf or 0."""
    near = exact.astype(np.float32)
    if towards == 0:
        wrong = np.abs(near) > np.abs(exact)
    else:
        wrong = near < exact if towards > 0 else near > exact
    return np.where(wrong, np.nextafter(near, np.float32(towards)), near)


def test_floats() -> None:
    a, b = numbers(500), numbers(500, seed=1)
    out = np.zeros((16, 500), np.float32)
    load("arithmetic").launch("floats", 4, 128, [a, b, out, 500])
    # float64 holds the sums and products of float32 numbers exactly, or so nearly that they round
    # to the same float32 numbers.
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


def test_functions() -> None:
    a = numbers(500) * np.float32(8)
    out = np.zeros((6, 500), np.float32)
    load("arithmetic").launch("functions", 4, 128, [a, out, 500])
    x = a.astype(np.float64)
    wanted = [np.exp(x), np.tanh(x), np.log(np.abs(x) + 1e-3), 1 / (1 + np.exp(-x)), np.sin(x)]
    for got, want in zip(out, [*wanted, np.tanh(x)], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_doubles() -> None:
    a, b = numbers(300, dtype=np.float64) / 3, numbers(300, seed=1, dtype=np.float64) / 7
    out = np.zeros((5, 300))
    load("arithmetic").launch("doubles", 3, 128, [a, b, out, 300])
    wanted = [a * b + a / b, np.exp(a), np.tanh(a), a + b,
              np.sqrt(np.abs(a)) + np.log(np.abs(b) + 1e-3)]  # fmt: skip
    np.testing.assert_allclose(out, wanted, rtol=1e-14, atol=1e-15)
    assert (out[3] <= a + b).all() and (out[3] < a + b).any()


def test_every_16_bit_number() -> None:
    halves, floats = np.zeros((2, 65536), np.float32)
    load("arithmetic").launch("to_floats", 128, 512, [halves, floats])
    bits = np.arange(65536).astype(np.uint16)
    np.testing.assert_array_equal(halves, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(floats, bfloats(bits))


def test_rounding_to_16_bits() -> None:
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


def test_pairs() -> None:
    a, b = (numbers(256, seed=s).astype(np.float16) for s in (4, 5))
    c, d = (bfloat_bits(numbers(256, seed=s)) for s in (6, 7))
    half, bfloat = np.zeros(256, np.float16), np.zeros(256, np.uint16)
    load("arithmetic").launch("pairs", 1, 128, [a, b, half, c, d, bfloat, 128])
    x, y = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_array_equal(half, (x * y + (a + b)).astype(np.float16))
    x, y = bfloats(c), bfloats(d)
    product = bfloats(bfloat_bits(x * y))
    np.testing.assert_array_equal(bfloat, bfloat_bits(x * y + product))


def test_conversions() -> None:
    a = numbers(256) * np.float32(1000)
    out = np.zeros((5, 256), np.int32)
    load("arithmetic").launch("conversions", 2, 128, [a, out, 256])
    whole = np.trunc(a).astype(np.int64)
    wanted = [whole, np.rint(a), np.trunc(np.abs(a)), (whole + 128) % 256 - 128,
              (a * np.float32(1e6)).astype(np.int64) >> 3]  # fmt: skip
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("arch", ["compute_75", "compute_90", "compute_120"])
def test_branches_and_local_memory(arch: str) -> None:
    a = np.arange(-20, 80).astype(np.int32)
    out = np.zeros(100, np.int32)
    load("arithmetic", arch).launch("branches", 2, 64, [a, out, 100])
    for k, x in enumerate(a.tolist()):
        v = x * (x & 7)
        v = [v + 11, v * 3, v - int(a[(k + 1) % 100]), v ^ 0x55, -v, v << 2, v * v + 1, 7][x & 7]
        assert out[k] == int32((v * 0x123456789ABCDEF + x >> 50) + v)


# A kernel for the sharing of slots by registers. %r0 is set before the loop and read after it, and
# %r7 is not read in every round. No other register may take their slots.
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


# Inline assembly repeats its labels, each time in braces of its own.
LABELS = """
.version 9.0
.target sm_80
.visible .entry k(.param .u64 out) {
  .reg .b32 %r<3>; .reg .b64 %rd<2>; .reg .pred %p<2>;
  ld.param.u64 %rd0, [out];
  mov.u32 %r0, 0;
  mov.u32 %r1, 0;
again:
  {
    again: add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 5;
    @%p0 bra again;
  }
  {
    again: add.u32 %r0, %r0, 100;
    setp.lt.u32 %p0, %r0, 300;
    @%p0 bra again;
    @!%p0 bra behind;
  }
  mov.u32 %r0, 0;
behind:
  add.u32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, 2;
  @%p1 bra again;
  st.global.u32 [%rd0], %r0;
  ret;
}
"""


def test_labels_in_braces() -> None:
    out = np.zeros(1, np.int32)
    Program(LABELS).launch("k", 1, 1, [out])
    # 5, 105, 205, 305 in the first round, and 306, 406 in the second one.
    assert out[0] == 406


def test_registers_that_share_slots() -> None:
    out = np.zeros(3, np.int32)
    Program(REGISTERS).launch("k", 1, 3, [out])
    assert out.tolist() == [1005 + 30, 1007, 1005 + 30]

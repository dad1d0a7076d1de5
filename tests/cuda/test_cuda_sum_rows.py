"""The kernel that sums over rows, in the interpreter, against sums in float64."""

from __future__ import annotations

import numpy as np
import pytest

import setup_build
from tests.kit import build
from tests.kit.device import STORAGE, Array, Device, from_device, to_device
from tests.kit.device_cases import DTYPES, EPS

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

# The columns that a block sums.
COLUMNS = {"f32": 128, "f64": 64, "f16": 256, "bf16": 256}


def put(device: Device, values: Array, dtype: str, offset: int) -> Array:
    """Values on a device, from the value `offset` of a new array on."""
    stored = to_device(values, dtype)
    whole = device.memory.empty((offset + stored.size,), STORAGE[dtype], "m")
    there = whole[offset:].reshape(stored.shape)
    there[...] = stored
    device.memory.mark_written(there)
    return there


def sums(
    device: Device, matrices: list[Array], dtype: str, offset: int = 0, again: bool = False
) -> list[Array]:
    """The sums of each matrix over its rows, in the stored type. All have the same rows."""
    asked, results, kept = [], [], []
    for values in matrices:
        kept.append(put(device, values, dtype, offset))
        columns = values.shape[1]
        out, copy = (
            device.memory.empty((columns,), STORAGE[dtype], name) for name in ("out", "again")
        )
        second = copy.ctypes.data if again else 0
        asked.append((columns, kept[-1].ctypes.data, out.ctypes.data, second))
        results.append((out, copy))
    getattr(build.host(), f"sum_rows_{dtype}")(device, len(matrices[0]), asked)
    for out, copy in results:
        assert device.memory.written(out).all()
        if again:
            np.testing.assert_array_equal(out, copy)
    return [out for out, _ in results]


def draw(rows: int, columns: int, dtype: str, seed: int = 0) -> Array:
    """Normal values that are exact in the stored type."""
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    return from_device(to_device(values, dtype), dtype).astype(np.float64)


def assert_sum(got: Array, values: Array, dtype: str) -> None:
    """The sum is in the compute type, and is rounded once."""
    exact = values.sum(axis=0)
    error = np.abs(from_device(got, dtype).astype(np.float64) - exact)
    sums_eps = EPS["f64" if dtype == "f64" else "f32"]
    limit = 8 * sums_eps * np.abs(values).sum(axis=0) + EPS[dtype] / 2 * np.abs(exact)
    assert (error <= limit).all(), (values.shape, (error - limit).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 9, 63, 64, 65, 200])
def test_any_number_of_columns(rows: int, dtype: str) -> None:
    """One column, fewer and more than a block has, and rows that are not aligned to 16 bytes."""
    block = COLUMNS[dtype]
    for columns in (1, 7, 8, 40, block - 1, block, block + 3, 2 * block + 8):
        values = draw(rows, columns, dtype)
        assert_sum(sums(Device(build.ptx(80)), [values], dtype, again=True)[0], values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: str) -> None:
    values = np.zeros((0, 5))
    assert (sums(Device(build.ptx(80)), [values], dtype, again=True)[0] == 0).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_long_ranges(dtype: str) -> None:
    """Ranges of the largest number of rows, the last of which is short."""
    values = draw(33 * 512 + 5, 4, dtype)
    assert_sum(sums(Device(build.ptx(80)), [values], dtype)[0], values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [50, 150])
def test_alignment_changes_no_bit(rows: int, dtype: str) -> None:
    """Rows that are aligned are read in vectors, others one value at a time."""
    for columns in (16, 300):
        values = draw(rows, columns, dtype)
        (aligned,) = sums(Device(build.ptx(80)), [values], dtype)
        (other,) = sums(Device(build.ptx(80)), [values], dtype, offset=1)
        np.testing.assert_array_equal(aligned, other)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_neither_threads_nor_other_sums_change_a_bit(dtype: str) -> None:
    """Six sums in one launch, of matrices of different widths."""
    matrices = [draw(150, columns, dtype, columns) for columns in (300, 1, 40, 129, 128, 7)]
    alone = [sums(Device(build.ptx(80)), [values], dtype)[0] for values in matrices]
    for seed in range(4):
        device = Device(build.ptx(80), seed)
        for got, wanted in zip(sums(device, matrices, dtype), alone, strict=True):
            np.testing.assert_array_equal(got, wanted)
        assert device.launches == [f"sum_rows_{dtype}"]


def test_nan_and_infinity_stay_in_their_column() -> None:
    values = draw(150, 20, "f32")
    values[70, 3], values[149, 19], values[0, 0] = np.nan, np.inf, -np.inf
    (got,) = sums(Device(build.ptx(80)), [values], "f32")
    assert np.isnan(got[3]) and got[19] == np.inf and got[0] == -np.inf
    assert np.isfinite(np.delete(got, [0, 3, 19])).all()


def test_a_counter_is_zero_again_after_a_launch() -> None:
    """So the sums of a pass could be launched again without another memset."""
    device = Device(build.ptx(80))
    values = draw(150, 20, "f32")
    sums(device, [values], "f32")
    (counters,) = (a for a in device._scratch if a.nbytes == 4)
    assert not counters.any()


def rows_of_range(rows: int) -> int:
    return int(build.host().rows_of_range(rows))


def test_length_of_a_range() -> None:
    """A warp sums at most 64 rows in one go, and there are at most 32 ranges of fewer than 512."""
    for rows in [*range(1, 3000), 4800, 16384, 16385, 100_000, 1 << 40]:
        length = rows_of_range(rows)
        assert 64 <= length <= 512 and length % 8 == 0
        assert length == 64 or -(-rows // length) <= 32 or length == 512
    assert rows_of_range(4800) == 152

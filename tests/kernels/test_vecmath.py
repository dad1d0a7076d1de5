"""The vector math of every instruction set, and the scalar functions of csrc/cells/math.h.

The unit of errors is the last place of the exact result, at least the smallest subnormal. The exact
result is libm's in a wider type. The sweeps here visit a part of all arguments;
`python -m tests.kernels.sweep` visits every float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kit.build import native

ISAS = ["portable", "avx2", "avx512"]
DTYPES = [np.float32, np.float64]
# The largest error of each function, in these units.
BUDGET = {"exp": 2.0, "sigmoid": 3.0, "tanh": 3.0}
FUNCTIONS = list(BUDGET)
INF, NAN = np.inf, np.nan


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    missing = native().isas()[request.param]
    if missing:
        pytest.skip(f"{request.param}: {missing}")
    return request.param


def bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns of numbers, for comparisons in which NaN equals itself and -0 differs from 0."""
    return x.view(np.uint32 if x.dtype == np.float32 else np.uint64)


def check(found: dict, budget: float, least_count: int) -> None:
    assert found["count"] >= least_count
    assert found["worst_ulps"] <= budget, found
    assert found["worst_step_back"] <= 1, found


def rank(x: float) -> int:
    """The position of x among all float64 numbers in rising order, counted from 0."""
    magnitude = int(np.float64(abs(x)).view(np.int64))
    return -magnitude if x < 0 else magnitude


def sweep64(isa: str, function: str, lowest: float, highest: float, blocks: int) -> None:
    """Checks `blocks` groups of 256 neighbouring numbers, which are spread over a range."""
    if not hasattr(native(), "sweep_float64"):
        pytest.skip("this platform's long double is no wider than double")
    stride = max(1, (rank(highest) - rank(lowest)) // (256 * blocks))
    found = native().sweep_float64(isa, function, lowest, highest, stride)
    check(found, BUDGET[function], 256 * blocks)


# --- Error and monotonicity ----------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_over_its_whole_range(isa: str, function: str) -> None:
    # 256 neighbours of every 2^15 numbers are checked: 256 groups for each exponent and sign.
    check(native().sweep_float32(isa, function, stride=128), BUDGET[function], 33_000_000)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_every_number_near_the_thresholds(isa: str, function: str) -> None:
    # exp underflows, exp overflows, tanh reaches 1 and -1, and sigmoid reaches 1.
    for lowest, highest in [(-104.1, -86.9), (88.5, 89.1), (8.6, 9.1), (-9.1, -8.6), (16.5, 17.5)]:
        check(native().sweep_float32(isa, function, lowest, highest), BUDGET[function], 70_000)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_over_its_whole_range(isa: str, function: str) -> None:
    sweep64(isa, function, -INF, INF, 2000)
    # More arguments are taken where the functions are not constant.
    sweep64(isa, function, -760.0, -(2.0**-40), 3000)
    sweep64(isa, function, 2.0**-40, 760.0, 3000)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_near_the_thresholds(isa: str, function: str) -> None:
    # exp underflows, exp overflows, and tanh reaches 1 and -1.
    for lowest, highest in [(-745.2, -708.3), (709.7, 709.8), (18.6, 19.1), (-19.1, -18.6)]:
        sweep64(isa, function, lowest, highest, 200)
    # Every number near 27 ln 2 is checked. There 2 is half the distance of neighbours of exp(2 x),
    # and a little beyond tanh becomes constant.
    edge = 27 * np.log(2)
    sweep64(isa, function, edge - 1e-9, edge + 5e-9, 6000)


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_scalars(function: str) -> None:
    found = native().sweep_float32("scalar", function, stride=512)
    check(found, BUDGET[function], 8_000_000)
    sweep64("scalar", function, -760.0, 760.0, 2000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_measure_sees_what_it_should(dtype: type) -> None:
    """The sweeps' `judge` reports an error and a decrease that the test puts in."""
    x = np.linspace(-3, 3, 1001, dtype=dtype)
    wide = np.float64 if dtype == np.float32 else np.longdouble
    y = np.tanh(x.astype(wide)).astype(dtype)
    found = native().judge("tanh", x, y)
    assert 0.3 < found["worst_ulps"] <= 0.51
    assert found["worst_step_back"] == 0
    assert native().judge("sigmoid", x, y)["worst_ulps"] > 1e5

    off = y.copy()
    off[700] += 4 * np.spacing(off[700])
    found = native().judge("tanh", x, off)
    assert 3.4 < found["worst_ulps"] < 4.6
    assert found["worst_at"] == x[700]

    off = y.copy()
    off[301] = off[300] - 2 * np.spacing(abs(off[300]))
    found = native().judge("tanh", x, off)
    assert found["worst_step_back"] == 2
    assert found["step_back_at"] == x[301]

    for wrong in (NAN, INF):
        off = y.copy()
        off[10] = wrong
        assert native().judge("tanh", x, off)["worst_ulps"] > 1e5
    # A subnormal result of n units that is flushed to 0 has an error of n units.
    tiny = np.finfo(dtype).smallest_subnormal
    assert native().judge("relu", np.array([7 * tiny]), np.zeros(1, dtype))["worst_ulps"] == 7


# --- Single values -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "x", "y"),
    [
        ("exp", [0.0, -0.0, INF, -INF, 1000.0, -1000.0], [1, 1, INF, 0, INF, 0]),
        ("sigmoid", [0.0, -0.0, INF, -INF, 1000.0, -1000.0], [0.5, 0.5, 1, 0, 1, 0]),
        ("tanh", [0.0, -0.0, INF, -INF, 1000.0, -1000.0], [0.0, -0.0, 1, -1, 1, -1]),
        ("relu", [0.0, INF, -INF, 3.5, -3.5], [0.0, INF, 0.0, 3.5, 0.0]),
    ],
)
def test_exact_values(isa: str, function: str, x: list, y: list, dtype: type) -> None:
    x, y = np.array(x, dtype), np.array(y, dtype)
    np.testing.assert_array_equal(bits(native().vecmath(isa, function, x)), bits(y))
    if function != "exp":
        np.testing.assert_array_equal(bits(native().vecmath("scalar", function, x)), bits(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_and_smallest(isa: str, dtype: type) -> None:
    """Arguments and results that are subnormal or near the largest number."""
    info = np.finfo(dtype)
    tiny, small, large = info.smallest_subnormal, info.smallest_normal, info.max
    x = np.array([-large, -small, -tiny, tiny, small, large], dtype)
    run = native().vecmath
    np.testing.assert_array_equal(run(isa, "exp", x), np.array([0, 1, 1, 1, 1, INF], dtype))
    np.testing.assert_array_equal(run(isa, "sigmoid", x), np.array([0, *[0.5] * 4, 1], dtype))
    np.testing.assert_array_equal(
        run(isa, "tanh", x), np.array([-1, -small, -tiny, tiny, small, 1], dtype)
    )


def test_subnormal_results(isa: str) -> None:
    x = np.array([-100], np.float32)
    for function in ("exp", "sigmoid"):
        y = native().vecmath(isa, function, x)
        np.testing.assert_array_equal(y, np.array([3.783506e-44], np.float32))
    x = np.array([-740.0])
    for function in ("exp", "sigmoid"):
        assert native().vecmath(isa, function, x)[0] == 4.199557e-322


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [*FUNCTIONS, "relu"])
def test_nan_stays_nan_in_its_lane(isa: str, function: str, dtype: type) -> None:
    x = np.linspace(-2, 2, 64, dtype=dtype)
    for lane in range(16):
        for nan in (NAN, -NAN):
            mixed = x.copy()
            mixed[16 + lane] = nan
            expected = np.arange(64) == 16 + lane
            y = native().vecmath(isa, function, mixed)
            np.testing.assert_array_equal(np.isnan(y), expected)
            clean = native().vecmath(isa, function, x)
            np.testing.assert_array_equal(bits(y[~expected]), bits(clean[~expected]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_odd(isa: str, dtype: type) -> None:
    x = np.random.default_rng(0).normal(0, 4, 10_000).astype(dtype)
    y = native().vecmath(isa, "tanh", x)
    np.testing.assert_array_equal(bits(native().vecmath(isa, "tanh", -x)), bits(-y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [*ISAS, "scalar"])
def test_relu_and_its_gradient_are_torchs(where: str, dtype: type) -> None:
    if where != "scalar" and native().isas()[where]:
        pytest.skip(f"{where}: {native().isas()[where]}")
    tiny = np.finfo(dtype).smallest_subnormal
    values = np.array([-INF, -2.5, -tiny, 0.0, tiny, 1.5, INF, NAN], dtype)
    x = torch.from_numpy(values.repeat(5)).requires_grad_()
    d = torch.tensor([1.5, -2.0, 0.0, INF, NAN], dtype=x.dtype).repeat(len(values))
    y = torch.relu(x)
    y.backward(d)
    got = native().vecmath(where, "relu", x.detach().numpy())
    np.testing.assert_array_equal(got, y.detach().numpy())
    d_x = native().relu_grad(where, got, d.numpy())
    np.testing.assert_array_equal(d_x, x.grad.numpy())


# --- Partial vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_loads(isa: str, dtype: type) -> None:
    """Loads n lanes and zeros. An access to the memory behind them would crash."""
    lanes = {"portable": 16, "avx2": 32, "avx512": 64}[isa] // np.dtype(dtype).itemsize
    x = np.arange(1, lanes + 1, dtype=dtype)
    for n in range(lanes + 1):
        got = native().load_partial(isa, x[:n].copy())
        np.testing.assert_array_equal(got, np.where(np.arange(lanes) < n, x, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [*FUNCTIONS, "relu"])
def test_a_result_does_not_depend_on_its_place(isa: str, function: str, dtype: type) -> None:
    """Arrays of every length, which end at inaccessible memory. The lane changes no bit."""
    x = np.random.default_rng(1).normal(0, 3, 70).astype(dtype)
    one_by_one = np.concatenate([native().vecmath(isa, function, x[i : i + 1]) for i in range(70)])
    for n in range(71):
        got = native().vecmath(isa, function, x[:n].copy())
        np.testing.assert_array_equal(bits(got), bits(one_by_one[:n]))


def test_a_wrong_name_is_an_error() -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="no instruction set is named sse9"):
        native().vecmath("sse9", "tanh", x)
    with pytest.raises(ValueError, match="portable has no function cosh"):
        native().vecmath("portable", "cosh", x)

"""Whole layers with every instruction set, without torch, compared with numpy in float64.

Every buffer lies between bands that must stay as they are, and holds NaN before the engine writes
it. Gradients are compared with gradients of the portable kernels in float64, which are compared
with exact derivatives of the numpy layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fusedrnn._library import CELLS
from tests.kit import numpy_reference
from tests.kit.build import native
from tests.kit.cases import Case, assert_same_bits, cast, each_dtype, run
from tests.kit.numpy_reference import WEIGHTS, Array

# A vector holds 2 to 16 numbers and a panel up to 64 units. H is below, at and above these widths,
# and several times as large.
H_SIZES = [1, 3, 16, 17, 31, 33, 65, 130]
# A tile of a product has at most 14 rows (AVX2, backward and RNN), so N takes every value up to it.
N_SIZES = range(1, 15)
T_SIZES = [1, 2, 7]
# Batch sizes, I and H. With so few rows, weights are read as torch stores them.
FEW_ROWS = [((1,), 40, 30), ((1, 1, 1), 49, 73), ((2, 1), 3, 57), ((3, 2, 1), 130, 107)]
# Limits of the largest error of a tensor, as a multiple of eps and of the tensor's largest value.
EPS_OF_OUTPUTS, EPS_OF_GRADIENTS = 12, 32


def _cases(cell: str) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for H in H_SIZES:
        for N in N_SIZES:
            for T in T_SIZES:
                sizes = np.full(T, N)
                if rng.random() < 0.5:  # a packed batch; sequences beyond sizes[0] have no step
                    sizes = np.sort(rng.integers(1, N + 1, size=T))[::-1]
                yield Case(
                    cell=cell,
                    N=N,
                    I=int(rng.integers(1, 20)),
                    H=H,
                    P=max(1, int(H * rng.uniform(0.2, 1))) if CELLS[cell].projects else H,
                    D=int(rng.integers(1, 3)),
                    bias=bool(rng.random() < 0.7),
                    batch_sizes=tuple(map(int, sizes)),
                    c_in_y=CELLS[cell].has_c and N % 3 == 1,
                )
    for sizes, I, H in FEW_ROWS:
        P = H - 9 if CELLS[cell].projects else H
        yield Case(cell, max(sizes), I, H, P, 1 + len(sizes) % 2, H % 2 == 1, sizes)


@functools.cache
def cases(cell: str) -> list[Case]:
    """All combinations of H, N and T. The other options are drawn at random for each."""
    return list(_cases(cell))


def some_cases(cell: str) -> list[Case]:
    """Every seventh case. Each size of H, N and T still comes up."""
    return cases(cell)[::7]


each_cell = pytest.mark.parametrize("cell", CELLS)


def assert_close(
    actual: dict[str, Array],
    expected: dict[str, Array],
    where: object,
    eps_of_gradients: float = EPS_OF_GRADIENTS,
) -> None:
    """Compares with errors relative to the largest value, or to 1 if that is larger.

    The terms of a gradient are about 1, and may cancel.
    """
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert got.shape == wanted.shape, (name, where)
        if got.size == 0:
            continue
        scale = max(1.0, np.abs(wanted).max())
        error = np.abs(got.astype(np.float64) - wanted).max() / scale / np.finfo(got.dtype).eps
        limit = eps_of_gradients if name.startswith("d_") else EPS_OF_OUTPUTS
        assert error <= limit, f"{name} is off by {error:.1f} eps: {where}"


def assert_derivative(case: Case, name: str, gradient: Array) -> None:
    """Compares a gradient with the derivative of the numpy layer, in one random direction."""
    direction = np.random.default_rng(1).normal(size=gradient.shape)
    terms = gradient * direction
    wanted = numpy_reference.derivative(case.inputs, name, direction, case.loss_weights)
    scale = max(1.0, np.abs(terms).sum())
    assert abs(terms.sum() - wanted) <= 1e-14 * scale, f"d_{name}: {case}"


# --- Results -------------------------------------------------------------------------------------


@each_dtype
@each_cell
def test_outputs_and_gradients(isa: str, cell: str, dtype: type) -> None:
    for case in cases(cell):
        assert_close(run(case, isa, dtype), case.expected, case)


@each_cell
def test_the_judge_of_gradients(cell: str) -> None:
    for case in cases(cell)[::4]:
        for name, gradient in case.expected.items():
            if name.startswith("d_") and gradient.size:
                assert_derivative(case, name.removeprefix("d_"), gradient)


def on_scalars(case: Case, dtype: type) -> dict[str, Array]:
    """The results of `run`, from the cells with V = float or double, each direction alone."""
    i = {name: cast(value, dtype) for name, value in case.inputs.items()}
    d_out = {name: cast(value, dtype) for name, value in case.loss_weights.items()}
    halves = np.split(d_out["y"], case.D, axis=1)
    results = [
        native().scalar_layer(
            case.cell,
            i["x"],
            i["weights"][d],
            i["batch_sizes"],
            i["h0"][d],
            None if i["c0"] is None else i["c0"][d],
            np.ascontiguousarray(halves[d]),
            d_out["h_n"][d],
            None if i["c0"] is None else d_out["c_n"][d],
            row_input=i["row_input"],
            descending=d == 1,
        )
        for d in range(case.D)
    ]
    got = {"y": np.concatenate([r["y"] for r in results], axis=1)}
    got["d_x"] = sum(r["d_x"] for r in results)
    for name, own in (("h_n", "h"), ("c_n", "c"), ("d_h0", "d_h0"), ("d_c0", "d_c0")):
        got[name] = None if results[0][own] is None else np.stack([r[own] for r in results])
    for d, result in enumerate(results):
        got |= {f"d_{name} {d}": result[f"d_{name}"] for name in WEIGHTS}
    return {name: value for name, value in got.items() if value is not None}


@each_dtype
@each_cell
def test_cells_on_scalars(cell: str, dtype: type) -> None:
    """The cells compiled for scalars, as for CUDA, in a loop without code of the engine."""
    without = [case for case in cases(cell) if not case.c_in_y]  # c in y is the engine's work
    for case in without[1::2]:
        assert_close(on_scalars(case, dtype), case.expected, case)


@each_cell
def test_several_chunks(isa: str, cell: str) -> None:
    """There are enough rows for x W and backward to take several chunks; the last is shorter."""
    case, expected = large_case(cell)
    columns, T = CELLS[cell].gates * case.H, len(case.batch_sizes)
    for chunk_values in native().chunk_values():
        sizes = (case.batch_sizes, case.N, columns, case.P, case.I, case.D, 1, chunk_values)
        chunk_steps = native().make_plan(*sizes)[0]
        assert 1 < chunk_steps < T // 2
        assert T % chunk_steps
    # The expected gradients are themselves sums of 10^4 rows in one running sum.
    assert_close(run(case, isa, np.float64), expected, isa, eps_of_gradients=300)


@functools.cache
def large_case(cell: str) -> tuple[Case, dict[str, Array]]:
    H, T = 6, 47
    N = 50_000 // (CELLS[cell].gates * H)
    sizes = np.sort(np.random.default_rng(0).integers(N // 2, N + 1, size=T))[::-1]
    sizes[0] = N
    P = 4 if CELLS[cell].projects else H
    case = Case(cell, N, 1, H, P, 2, True, tuple(sizes.tolist()))
    return case, on_scalars(case, np.float64) | numpy_reference.layer(**case.inputs)


# --- Options that change no bit ------------------------------------------------------------------


@each_dtype
@each_cell
def test_outputs_are_the_same_without_keep(isa: str, cell: str, dtype: type) -> None:
    for case in some_cases(cell):
        inputs = {name: cast(value, dtype) for name, value in case.inputs.items()}
        *kept, _ = native().layer_forward(isa, **inputs, keep=True)
        *plain, reserve = native().layer_forward(isa, **inputs, keep=False)
        assert reserve is None
        names = [name for name, k in zip(("y", "h_n", "c_n"), kept, strict=True) if k is not None]
        assert_same_bits(
            dict(zip(names, plain, strict=False)), dict(zip(names, kept, strict=False)), case
        )


@each_cell
def test_threads_change_no_bit(isa: str, cell: str) -> None:
    ways = set()
    for case in [*some_cases(cell), *few_sequences(cell)]:
        alone = run(case, isa, np.float32)
        for threads, at_once in ((2, False), (3, True), (5, False), (28, False)):
            many = run(case, isa, np.float32, threads=threads, at_once=at_once)
            assert_same_bits(many, alone, (threads, case))
            columns = CELLS[cell].gates * case.H
            plan = native().make_plan(
                case.batch_sizes, case.N, columns, case.P, case.I, case.D, threads, 1 << 17
            )
            ways.add((plan[2] > 0, "each with its x W" in plan[3], at_once))
    assert len(ways) == 6, "every way to share a layer, at once and one after another"


def few_sequences(cell: str) -> Iterator[Case]:
    """Cases in which threads share each step: weights of 2^15 numbers and few sequences."""
    H = math.isqrt(2**15 // CELLS[cell].gates) + 1
    P = 91 if CELLS[cell].projects else H
    for D in (1, 2):
        yield Case(cell, 1, 3, H, P, D, True, (1,) * 5)
        yield Case(cell, 2, 3, H, P, D, False, (2, 2, 1, 1))
        yield Case(cell, 4, 3, H, P, D, True, (2, 1))  # two sequences have no step


@each_cell
def test_gradients_that_are_not_wanted(isa: str, cell: str) -> None:
    """An absent gradient of y counts as zero. Leaving out some gradients changes no other."""
    for case in some_cases(cell):
        i = {name: cast(value, np.float32) for name, value in case.inputs.items()}
        d_out = {name: cast(value, np.float32) for name, value in case.loss_weights.items()}
        reserve = native().layer_forward(isa, **i, keep=True)[3]
        sizes = (isa, cell, i["x"], i["weights"], i["batch_sizes"], reserve)
        d_states = (d_out["h_n"], d_out.get("c_n"))

        how = {"row_input": i["row_input"], "c_in_y": case.c_in_y}

        def backward(d_y: Array | None, **want: bool) -> list[Any]:
            given = (*sizes, d_y, *d_states)  # noqa: B023
            d_x, d_h, d_c, d_w = native().layer_backward(*given, **how, **want)  # noqa: B023
            return [d_x, d_h, d_c, *(g for direction in d_w for g in direction)]

        def assert_equal(got: list[Any], wanted: list[Any]) -> None:
            for g, w in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(g, w)

        assert_equal(backward(None), backward(np.zeros_like(d_out["y"])))
        whole = backward(d_out["y"])
        assert_equal(backward(d_out["y"], want_x=False), [None, *whole[1:]])
        none = [None] * (len(whole) - 3)
        assert_equal(backward(d_out["y"], want_weights=False), [*whole[:3], *none])


@each_dtype
@each_cell
def test_nan_stays_in_its_sequence(isa: str, cell: str, dtype: type) -> None:
    for case in some_cases(cell):
        clean = run(case, isa, dtype)
        sick = case.N // 2
        rows, first = [], 0
        for n in case.batch_sizes:
            rows += [first + sick] if sick < n else []
            first += n
        case = dataclasses.replace(case)  # a copy computes its own inputs
        case.inputs["x"][rows] = case.inputs["h0"][:, sick] = np.nan
        got = run(case, isa, dtype)
        assert np.isnan(got["y"][rows]).all()
        for name in ("y", "d_x"):
            others = [np.delete(r[name], rows, axis=0) for r in (got, clean)]
            np.testing.assert_array_equal(*others)
        for name in ("h_n", "c_n", "d_h0", "d_c0"):
            if name in clean:
                others = [np.delete(r[name], sick, axis=1) for r in (got, clean)]
                np.testing.assert_array_equal(*others)


# --- The tests notice faults ---------------------------------------------------------------------


def test_a_fence_notices() -> None:
    native().overrun(0)
    native().overrun(9)
    with pytest.raises(RuntimeError, match="written before ten"):
        native().overrun(-1)
    with pytest.raises(RuntimeError, match="written past ten"):
        native().overrun(10)


def test_an_error_is_noticed() -> None:
    case = cases("gru")[-1]
    for name, wanted in case.expected.items():
        for wrong in (1e-11, np.nan):
            off = wanted.copy()
            off.flat[off.size // 2] += wrong
            with pytest.raises(AssertionError, match="is off by"):
                assert_close({name: off}, {name: wanted}, case)
    gradient = case.expected["d_w_hh 0"].copy()
    gradient[0, 0] += 1e-8
    with pytest.raises(AssertionError, match="d_w_hh"):
        assert_derivative(case, "w_hh 0", gradient)

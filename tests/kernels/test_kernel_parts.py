"""The functions of a kernel table one by one: packing, products, sums, and the time loop of one
direction, cut into chunks, runs of sequences and slices of units.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fusedrnn._library import CELLS
from tests.kit import numpy_reference
from tests.kit.build import native
from tests.kit.cases import Case, assert_same_bits, cast, each_dtype
from tests.kit.numpy_reference import Array

VECTOR_BYTES = {"portable": 16, "avx2": 32, "avx512": 64}


def lanes(isa: str, dtype: type) -> int:
    return VECTOR_BYTES[isa] // np.dtype(dtype).itemsize


def panels_of(width: int, units: int) -> int:
    return -(-width // units)


def untouched(array: Array) -> bool:
    """Whether a buffer still holds only the bytes that the fence filled it with."""
    return (np.ascontiguousarray(array).view(np.uint8) == 0xFF).all()


# --- Packing -------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("gates", [1, 2, 3, 4])
def test_panels_of_gates(isa: str, gates: int, dtype: type) -> None:
    """[panel][K][gates][units], biases [panel][2][gates][units], and zeros beyond the width."""
    rng = np.random.default_rng(0)
    for width, K in itertools.product([1, 3, 16, 17, 33, 65, 130], [1, 5, 64]):
        weight = rng.normal(size=(gates * width, K)).astype(dtype)
        b_x, b_h = rng.normal(size=(2, gates * width)).astype(dtype)

        def pack(
            biases: Any, count: int, begin: int, end: int, want: bool = True
        ) -> tuple[Array, Array, int]:
            return native().pack_gates(isa, weight, *biases, gates, count, begin, end, want)  # noqa: B023

        units = pack((b_x, b_h), 0, 0, 0)[2]
        assert units == lanes(isa, dtype) * {1: 4, 2: 2, 3: 1, 4: 1}[gates]
        count = panels_of(width, units)
        panels, bias, _ = pack((b_x, b_h), count, 0, count)
        padded = np.zeros((gates, count * units, K), dtype)
        padded[:, :width] = weight.reshape(gates, width, K)
        wanted = padded.reshape(gates, count, units, K).transpose(1, 3, 0, 2)
        np.testing.assert_array_equal(panels, wanted)
        padded = np.zeros((2, gates, count * units), dtype)
        padded[0, :, :width], padded[1, :, :width] = b_x.reshape(gates, -1), b_h.reshape(gates, -1)
        wanted = padded.reshape(2, gates, count, units).transpose(2, 0, 1, 3)
        np.testing.assert_array_equal(bias, wanted)

        np.testing.assert_array_equal(pack((None, None), count, 0, count)[1], 0)
        without_bias = pack((None, None), count, 0, count, False)
        assert without_bias[1] is None
        np.testing.assert_array_equal(without_bias[0], panels)
        # A part packs its own panels and writes no others.
        begin, end = count // 3, count - count // 3
        part, part_bias, _ = pack((b_x, b_h), count, begin, end)
        inside = (np.arange(count) >= begin) & (np.arange(count) < end)
        for got, whole in ((part, panels), (part_bias, bias)):
            np.testing.assert_array_equal(got[inside], whole[inside])
            assert untouched(got[~inside])


@each_dtype
def test_panels_of_columns(isa: str, dtype: type) -> None:
    """[panel][K][units] of the first N columns, with zeros beyond them."""
    rng = np.random.default_rng(0)
    for K, N, gap in itertools.product([1, 3, 17, 64], [1, 3, 16, 17, 33, 65, 130], [0, 5]):
        matrix = rng.normal(size=(K, N + gap)).astype(dtype)
        units = native().pack_columns(isa, matrix, N, 0, 0, 0)[1]
        assert units == 4 * lanes(isa, dtype)
        count = panels_of(N, units)
        panels, _ = native().pack_columns(isa, matrix, N, count, 0, count)
        padded = np.zeros((K, count * units), dtype)
        padded[:, :N] = matrix[:, :N]
        wanted = padded.reshape(K, count, units).transpose(1, 0, 2)
        np.testing.assert_array_equal(panels, wanted)
        begin, end = count // 3, count - count // 3
        part, _ = native().pack_columns(isa, matrix, N, count, begin, end)
        np.testing.assert_array_equal(part[begin:end], panels[begin:end])
        assert untouched(part[:begin])
        assert untouched(part[end:])


# --- Products ------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm(isa: str, transposed: bool, dtype: type) -> None:
    """Sizes leave every remainder of tiles, terms and panels. Parts of c are computed alone too."""
    rng = np.random.default_rng(0)
    sizes = itertools.product(
        [1, 2, 5, 13, 47, 48, 49, 100], [1, 7, 65, 255, 257, 600], [1, 3, 17, 66, 130]
    )
    for M, K, N in sizes:
        a, b = rng.normal(size=(M, K)).astype(dtype), rng.normal(size=(K, N)).astype(dtype)
        before = rng.normal(size=(M, N + 3)).astype(dtype)
        left = np.pad(a.T if transposed else a, ((0, 0), (0, 2)), constant_values=np.nan)
        left = np.ascontiguousarray(left)
        exact = a.astype(np.float64) @ b.astype(np.float64)
        limit = (2 * K + 16) * np.finfo(dtype).eps

        def gemm(
            accumulate: bool, rows: tuple[int, int], panels: tuple[int, int] = (0, 1 << 40)
        ) -> Array:
            how = (left, transposed, b, before, accumulate)  # noqa: B023
            return native().gemm(isa, *how, *rows, *panels)

        for accumulate in (False, True):
            whole = gemm(accumulate, (0, M))
            wanted = exact + accumulate * before[:, :N]
            np.testing.assert_allclose(whole[:, :N], wanted, rtol=0, atol=limit)
            np.testing.assert_array_equal(whole[:, N:], before[:, N:])
            # A part of c has the same bits as the whole, and the rest of c stays as it was.
            first, last = sorted(rng.integers(0, M + 1, size=2).tolist())
            part = gemm(accumulate, (first, last))
            np.testing.assert_array_equal(part[first:last], whole[first:last])
            np.testing.assert_array_equal(np.delete(part, np.s_[first:last], 0),
                                          np.delete(before, np.s_[first:last], 0))  # fmt: skip
            units = 4 * lanes(isa, dtype)
            part = gemm(accumulate, (0, M), (1, 2))
            np.testing.assert_array_equal(part[:, units : 2 * units], whole[:, units : 2 * units])
            np.testing.assert_array_equal(part[:, :units], before[:, :units])
            np.testing.assert_array_equal(part[:, 2 * units :], before[:, 2 * units :])


def test_gemm_of_long_sums_in_float32(isa: str) -> None:
    """Gradients of weights sum many rows. A single running sum would be wrong by 30 eps here."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30_000, 20)).astype(np.float32)
    got = native().gemm(isa, a, True, b, np.zeros((20, 20), np.float32), False, 0, 20)
    exact = a.T.astype(np.float64) @ b
    assert np.abs(got - exact).max() <= 6 * np.finfo(np.float32).eps * np.abs(exact).max()


# --- Sums ----------------------------------------------------------------------------------------


@each_dtype
def test_sum_rows(isa: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    for rows, columns in itertools.product([0, 1, 2, 127, 128, 129, 400], [1, 3, 16, 37]):
        m = rng.normal(size=(rows, columns)).astype(dtype)
        out = rng.normal(size=columns).astype(dtype)
        for begin, end in ((0, columns), (columns // 3, columns - columns // 4)):
            for accumulate in (False, True):
                got = native().sum_rows(isa, m, out, begin, end, accumulate)
                wanted = m.astype(np.longdouble).sum(0) + accumulate * out
                np.testing.assert_allclose(
                    got[begin:end], wanted[begin:end], rtol=0, atol=200 * np.finfo(dtype).eps
                )
                np.testing.assert_array_equal(got[:begin], out[:begin])
                np.testing.assert_array_equal(got[end:], out[end:])


def test_sum_rows_of_many_rows_in_float32(isa: str) -> None:
    """A single running sum would be wrong by 1 % here."""
    m = np.full((1_000_000, 2), 0.1, np.float32)
    got = native().sum_rows(isa, m, np.zeros(2, np.float32), 0, 2, False)
    np.testing.assert_allclose(got, 1e6 * float(np.float32(0.1)), rtol=1e-4)


# --- Time loops ----------------------------------------------------------------------------------

GAP = 3  # columns of y between the end of a row and the begin of the next


def steps(
    case: Case, isa: str, dtype: type, descending: bool, keep: bool, cuts: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Runs the first direction of a case forward and, if keep is set, backward."""
    i = {name: cast(value, dtype) for name, value in case.inputs.items()}
    w = i["weights"][0]
    h0, c0 = i["h0"][0], None if i["c0"] is None else i["c0"][0]
    gates_x = i["x"] @ w[0].T
    forward = native().steps_forward(
        *(isa, case.cell, gates_x, w, i["batch_sizes"], h0, c0),
        descending=descending,
        keep=keep,
        y_ld=case.P + GAP,
        cuts=cuts,
    )
    assert untouched(forward["y"][:, case.P :])
    forward["y"] = np.ascontiguousarray(forward["y"][:, : case.P])
    if not keep:
        return forward, {}
    d_out = {name: cast(value, dtype) for name, value in case.loss_weights.items()}
    d_y = np.full((len(i["x"]), case.P + GAP), np.nan, dtype)
    d_y[:, : case.P] = d_out["y"][:, : case.P]
    d_c = None if c0 is None else d_out["c_n"][0]
    backward = native().steps_backward(
        *(isa, case.cell, forward, w, i["batch_sizes"], d_y, d_out["h_n"][0], d_c),
        descending=descending,
        cuts=cuts,
    )
    return tuple(
        {name: value for name, value in result.items() if value is not None}
        for result in (forward, backward)
    )


def carries_h(cell: str) -> bool:
    """Whether h_{t-1} reaches h_t other than through the weights, as in the GRUs."""
    G = CELLS[cell].gates
    products = {"w_ih": np.zeros((G, 1)), "w_hh": np.zeros((G, 1))}
    weights = dict.fromkeys(numpy_reference.WEIGHTS) | products
    one = np.ones((1, 1))
    h, _ = numpy_reference.step_of(cell)(one, one, 0 * one, weights)
    return bool(h.any())


BATCHES = [
    (1, (1,)),
    (3, (3, 3, 3, 3)),
    (5, (5, 5, 3, 3, 1)),
    (13, (9, 9, 8, 7, 7, 7, 2, 1)),  # four sequences have no step
    (16, (16, 15, 15, 4, 4, 4, 4, 1, 1)),
]


@each_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_any_cut_gives_the_same(isa: str, cell: str, dtype: type) -> None:
    """Chunks, runs of sequences and slices of units change no bit, with one exception.

    The parts of d_h in the backward pass of a GRU are added to d_y in another order where a chunk
    ends, since d_h then goes through memory as one number.
    """
    for (N, batch_sizes), H in itertools.product(BATCHES, [1, 5, 17, 33, 66, 130]):
        P = max(1, H - 2) if CELLS[cell].projects else H
        case = Case(cell, N, 3, H, P, 1, True, batch_sizes)
        live, T = batch_sizes[0], len(batch_sizes)
        for descending in (False, True):
            whole = native().Cuts(T, [0, live], 1)
            forward, backward = steps(case, isa, dtype, descending, True, whole)
            plain, _ = steps(case, isa, dtype, descending, False, whole)
            outputs = {name: forward[name] for name in plain if plain[name] is not None}
            assert_same_bits(
                {name: plain[name] for name in outputs}, outputs, ("without keep", case)
            )
            for chunk in (1, 2, 3, T):
                # Some runs hold no sequence, some hold one. There may be more slices than panels.
                for runs, slices in (
                    ([0, live], 1),
                    ([0, live], 7),
                    ([0, live // 3, live // 3, live], 2),
                    ([*range(live + 1)], 1),
                ):
                    how = (f"chunks of {chunk}", runs, slices, descending, case)
                    cuts = native().Cuts(chunk, runs, slices)
                    got, got_back = steps(case, isa, dtype, descending, True, cuts)
                    assert_same_bits(got, forward, how)
                    if chunk == T or not carries_h(cell):
                        assert_same_bits(got_back, backward, how)
                    else:
                        assert got_back.keys() == backward.keys()
                        for name, wanted in backward.items():
                            atol = 8 * np.finfo(dtype).eps * max(1, np.abs(wanted).max())
                            np.testing.assert_allclose(got_back[name], wanted, rtol=0, atol=atol)
                    if descending:
                        continue
                    got, _ = steps(case, isa, dtype, descending, False, cuts)
                    assert_same_bits({name: got[name] for name in outputs}, outputs, how)

"""Layers whose products multiply pairs of bfloat16, compared with torch.nn and float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from fusedrnn._library import LIBRARY
from tests.kit.layers import CELLS, Cell, error, make_states, map_tensors, ragged, randn, run

pytestmark = pytest.mark.skipif(
    not LIBRARY.multiplies_pairs,
    reason=f"{LIBRARY.isa} multiplies no pairs of bfloat16: such layers compute in float32",
)

bf16 = torch.bfloat16


# T, N, I and H, by what the engine does with them. P is H // 2, which is even too.
SHAPES = {
    "weights as stored": (2, 2, 64, 132),
    "three rows as stored": (1, 3, 48, 96),
    "one row, packed": (40, 1, 6, 36),
    "one step": (1, 9, 2, 4),
    "a part of a tile": (7, 5, 34, 20),
    "sums in parts that stay near": (3, 5, 6, 640),
    "input in parts that stay near": (3, 5, 2050, 8),
    "many rows, several chunks": (45, 33, 10, 256),
    "no sequence": (3, 0, 4, 8),
}


def compare(cell: Cell, I: int, H: int, x: object, N: int, **options: bool) -> None:
    """Errors against float64 are at most twice torch.nn's, plus one ulp."""
    ours, theirs = (layer.to(bf16) for layer in cell.make(I, H, **options))
    reference = copy.deepcopy(theirs).double()
    hx = make_states(ours, N, bf16)
    wide = run(reference, map_tensors(torch.Tensor.double, x), map_tensors(torch.Tensor.double, hx))
    expected, actual = run(theirs, x, hx), run(ours, x, hx)
    for name, value in wide.items():
        limit = 2 * error(expected[name], value) + torch.finfo(bf16).eps
        assert error(actual[name], value) <= limit, name
        assert actual[name].dtype == bf16


# Errors of relu depend on luck, since it has a kink. test_precision.py draws many inputs for it.
SMOOTH = [cell for cell in CELLS if "relu" not in cell.name]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cell", SMOOTH, ids=str)
def test_shapes(cell: Cell, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    T, N, I, H = shape
    compare(cell, I, H, randn(T, N, I, dtype=bf16), N)


@pytest.mark.parametrize("cell", SMOOTH, ids=str)
def test_packed_both_ways(cell: Cell) -> None:
    torch.manual_seed(0)
    x = pack_sequence(ragged((9, 2, 7, 7, 1), 6, bf16), enforce_sorted=False)
    compare(cell, 6, 20, x, 5, bidirectional=True)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_exact_products(cell: Cell) -> None:
    """Sums of small integers are exact, so that a lost or repeated term changes the result."""
    torch.manual_seed(0)
    ours, theirs = (layer.to(bf16) for layer in cell.make(70, 36))
    with torch.no_grad():
        for layer in (ours, theirs):
            for p in layer.parameters():
                p.copy_(torch.randint(-1, 2, p.shape, generator=torch.Generator().manual_seed(7)))
    x = torch.randint(-2, 3, (1, 5, 70)).to(bf16)
    zeros = map_tensors(torch.zeros_like, make_states(ours, 5, bf16))
    with torch.no_grad():
        got, wide = (
            ours(x, zeros)[0],
            theirs.double()(x.double(), map_tensors(torch.Tensor.double, zeros))[0],
        )
    assert error(got, wide) <= torch.finfo(bf16).eps


def test_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    lstm = CELLS[0].make(64, 512)[0].to(bf16)
    x = randn(6, 40, 64, dtype=bf16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(lstm, x, None))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())

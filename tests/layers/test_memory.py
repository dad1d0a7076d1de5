"""A training step keeps at most as much memory for backward as torch.nn's layer does."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import kept
from fusedrnn._library import LIBRARY
from tests.kit.layers import BY_NAME, TORCH_CELLS, Cell, make_input, ragged

T, N, I, H = 20, 8, 24, 32
LENGTHS = (T, 18, 17, 12, 9, 5, 5, 1)


DTYPES = [torch.float32, torch.float64]
if LIBRARY.multiplies_pairs:  # other kernels keep x and the weights converted to float32
    DTYPES.append(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_layer_keeps_at_most_what_torch_keeps(
    cell: Cell, bidirectional: bool, layers: int, form: str, dtype: torch.dtype
) -> None:
    ours, theirs = cell.make(I, H, bidirectional=bidirectional, num_layers=layers, dtype=dtype)
    x, _ = make_input(form, ragged(LENGTHS, I, dtype))
    limit = kept(theirs, x)
    assert limit > 0
    assert kept(ours, x) <= limit


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("name", ["rnn_tanh", "rnn_relu"])
def test_rnn_keeps_h_once(name: str, form: str) -> None:
    """The layer keeps h after every step, and before the first.

    Its copy of batch_sizes is no saved tensor and is not counted, as in torch.nn.
    """
    ours, _ = BY_NAME[name].make(I, H, dtype=torch.float64)
    rows = T * N if form == "plain" else sum(LENGTHS)
    expected = (rows + N) * H * 8
    x, _ = make_input(form, ragged(LENGTHS, I))
    assert kept(ours, x) == expected

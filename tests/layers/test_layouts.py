"""Tensors of other layouts. Sparse ones become dense; for others an error says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from tests.kit.layers import error, flat, randn

CELLS: list[tuple[type[Any], type[Any]]] = [
    (fusedrnn.FusedLSTMCell, nn.LSTMCell),
    (fusedrnn.FusedGRUCell, nn.GRUCell),
    (fusedrnn.FusedRNNCell, nn.RNNCell),
]
LAYERS: list[type[Any]] = [fusedrnn.FusedLSTM, fusedrnn.FusedGRU, fusedrnn.FusedRNN]
SPARSE = ["to_sparse", "to_sparse_csr", "to_sparse_csc"]
pytestmark = pytest.mark.filterwarnings("ignore:.*(beta|prototype).*:UserWarning")


def few(*shape: int) -> Tensor:
    x = randn(*shape, seed=1)
    return x * (x > 0)


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize(("ours", "theirs"), CELLS)
def test_a_cell_takes_a_sparse_input(ours: type[Any], theirs: type[Any], form: str) -> None:
    """torch.nn's cells take it too. Ours also give the gradient of the input."""
    module, plain = ours(4, 6).double(), theirs(4, 6).double()
    plain.load_state_dict(module.state_dict())
    x = few(3, 4)
    sparse = getattr(x, form)()
    expected = flat(plain(sparse))
    for trainable in (True, False):
        module.requires_grad_(trainable)
        got = flat(module(sparse))
        assert all(t.layout == torch.strided for t in got)
        assert all(error(a, b) < 1e-12 for a, b in zip(got, expected, strict=True))
    leaf = x.clone().requires_grad_()
    states = tuple(t.detach().to_sparse() for t in expected)
    y = module(getattr(leaf, form)(), states if len(states) == 2 else states[0])
    (d_x,) = torch.autograd.grad(flat(y)[0].sum(), leaf)
    dense = tuple(t.to_dense() for t in states)
    y = module(leaf, dense if len(states) == 2 else dense[0])
    assert error(d_x, torch.autograd.grad(flat(y)[0].sum(), leaf)[0] * (x != 0)) < 1e-12


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_takes_sparse_tensors(layer: type[Any]) -> None:
    module = layer(4, 6).double()
    x = few(5, 3, 4)
    hx = module(x)[1]
    states = tuple(t.to_sparse() for t in flat(hx))
    got = module(x.to_sparse(), states if len(states) == 2 else states[0])
    for a, b in zip(flat(got), flat(module(x, hx)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layer", [*LAYERS, *(ours for ours, _ in CELLS)])
def test_layouts_that_are_refused(layer: type[Any]) -> None:
    module = layer(4, 6)
    x = randn(3, 4).float() if "Cell" in layer.__name__ else randn(5, 3, 4).float()
    for layout in (torch.strided, torch.jagged):
        if layout is torch.jagged and "Cell" not in layer.__name__:
            continue  # layers take them, see test_jagged.py
        nested = torch.nested.nested_tensor([x, x[:2]], layout=layout)
        with pytest.raises(RuntimeError, match=r"input must be a dense tensor, got a nested one"):
            module(nested)
    with pytest.raises(RuntimeError, match=r"input must be a dense tensor, got layout .*mkldnn"):
        module(x.to_mkldnn())
    name = "weight_hh" if "Cell" in layer.__name__ else "weight_hh_l0"
    sparse = getattr(module, name).detach().to_sparse_csr()
    setattr(module, name, nn.Parameter(sparse, requires_grad=False))
    with pytest.raises(RuntimeError, match=rf"{name} must be a dense tensor, got layout .*sparse"):
        module(x)

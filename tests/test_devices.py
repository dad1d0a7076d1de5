"""What must hold on every device, run on a GPU too where there is one.

The rest of the suite computes on the CPU, and on a GPU's code in the interpreter.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import _reference, ops
from tests.calls import CELLS_AND_FORMS, make_call
from tests.helpers import CELLS, TORCH_CELLS, Cell, error, make_states, ragged, randn, run

# Largest error over the largest value of a tensor.
LIMIT = {
    torch.float64: 1e-11,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


def on(device: torch.device, value: Any) -> Any:
    """Moves a tensor, a PackedSequence, or a tuple of them."""
    if value is None:
        return None
    if isinstance(value, tuple) and not hasattr(value, "batch_sizes"):
        return tuple(on(device, part) for part in value)
    return value.to(device)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_layer(device: torch.device, cell: str, form: str, dtype: torch.dtype) -> None:
    """Outputs and gradients against the reference in float64."""
    call = make_call(cell, form, T=7, N=10, H=24, dtype=dtype)
    wide = call.with_leaves([t.detach().double().requires_grad_() for t in call.leaves])
    call = call.with_leaves([t.detach().to(device).requires_grad_() for t in call.leaves])
    results: list[list[Tensor]] = []
    for c, layer in ((call, ops.layer), (wide, _reference.layer)):
        outputs = c.run(layer)
        grads = [randn(*o.shape, seed=k).to(o) for k, o in enumerate(outputs)]
        torch.autograd.backward(outputs, grads)
        gradients = [t.grad for t in c.leaves]
        assert all(g is not None for g in gradients)
        results.append([*outputs, *(g for g in gradients if g is not None)])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == dtype and got.device.type == device.type
        assert error(got.cpu(), wanted) <= LIMIT[dtype]


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_module_beside_torchs(device: torch.device, cell: Cell, form: str) -> None:
    """Two layers in two directions, on the device; torch.nn's on the CPU."""
    ours, theirs = cell.make(5, 8, num_layers=2, bidirectional=True, dtype=torch.float64)
    x: Any = randn(6, 4, 5)
    if form == "packed":
        x = pack_sequence(ragged((3, 6, 1, 6), 5), enforce_sorted=False)
    hx = make_states(ours, 4, torch.float64)
    expected = run(theirs, x, hx)
    actual = run(ours.to(device), on(device, x), on(device, hx))
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].device.type == device.type
        assert error(actual[name].cpu(), wanted) <= 1e-11, name


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradcheck(device: torch.device, cell: Cell) -> None:
    layer, _ = cell.make(2, 3, bidirectional=True, dtype=torch.float64)
    layer.to(device)
    x = randn(3, 2, 2).to(device).requires_grad_()
    parameters = list(layer.parameters())

    def outputs(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x, lengths=[3, 1])[0]

    assert torch.autograd.gradcheck(outputs, (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_cells(device: torch.device, name: str) -> None:
    theirs = getattr(torch.nn, f"{name}Cell")(4, 6, dtype=torch.float64)
    ours = getattr(fusedrnn, f"Fused{name}Cell")(4, 6, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = randn(3, 4)
    hx = _states(name)
    expected = run(theirs, x, hx)
    actual = run(ours.to(device), x.to(device), on(device, hx))
    for key, wanted in expected.items():
        assert error(actual[key].cpu(), wanted) <= 1e-12, key


def _states(name: str) -> Any:
    h, c = randn(3, 6), randn(3, 6)
    return (h, c) if name == "LSTM" else h


def test_same_bits_again(device: torch.device) -> None:
    layer = fusedrnn.FusedLSTM(16, 64, bidirectional=True, device=device)
    x = torch.randn(30, 12, 16, device=device)
    first = run(layer, x)
    assert all(torch.equal(t, first[name]) for name, t in run(layer, x).items())


def test_autocast(device: torch.device) -> None:
    layer = fusedrnn.FusedGRU(4, 6, device=device)
    x = torch.randn(5, 2, 4, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, h_n = layer(x)
    assert y.dtype == h_n.dtype == torch.bfloat16
    assert error(y.cpu(), layer(x)[0].detach().cpu()) <= LIMIT[torch.bfloat16]


def test_compile_without_a_break(device: torch.device) -> None:
    layer = fusedrnn.FusedLSTM(4, 6, device=device)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 4, device=device)
    expected, actual = run(layer, x), run(compiled, x)
    for name, got in actual.items():
        assert torch.equal(got, expected[name.replace("_orig_mod.", "")]), name

"""Memory that is replaced, freed or written to between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from tests.kit.layers import CELL_MODULES, CELLS, error, flat, randn

f64 = torch.float64
NAMES = [*map(str, CELLS), *(f"{name} cell" for name in CELL_MODULES)]
each = pytest.mark.parametrize("name", NAMES)


def make(name: str, device: torch.device) -> tuple[Any, list[Tensor], Callable[[], Tensor]]:
    """A module, the leaves of a call (input, states, parameters), and a function to the loss."""
    x = randn(2, 3, seed=1, device=device)
    if name.endswith(" cell"):
        module = CELL_MODULES[name.removesuffix(" cell")](3, 4, dtype=f64).to(device)
        states = [randn(2, 4, seed=k, device=device) for k in (2, 3)]
    else:
        cell = CELLS[NAMES.index(name)]
        module, _ = cell.make(3, 4, device=device, dtype=f64, bidirectional=True)
        x = randn(5, 2, 3, seed=1, device=device)
        width = 2 if cell.projects else 4
        states = [randn(2, 2, size, seed=k, device=device) for k, size in ((2, width), (3, 4))]
    if not isinstance(module, (fusedrnn.FusedLSTM, fusedrnn.FusedLSTMCell)):
        del states[1]
    for t in (x, *states):
        t.requires_grad_()

    def call() -> Tensor:
        hx: Any = tuple(states) if len(states) == 2 else states[0]
        return sum((t.sin().sum() for t in flat(module(x, hx))), torch.zeros(()))

    return module, [x, *states, *module.parameters()], call


def gradients(loss: Tensor, leaves: list[Tensor], second: bool) -> list[Tensor]:
    if not second:
        return list(torch.autograd.grad(loss, leaves, allow_unused=True))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return list(
        torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), leaves)
    )


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@each
def test_another_memory(device: torch.device, name: str, second: bool) -> None:
    """Derivatives are computed with the values that forward read."""
    _, leaves, call = make(name, device)
    expected = gradients(call(), leaves, second)
    loss = call()
    for t in leaves:
        t.data = 3 * t.data
    for got, wanted in zip(gradients(loss, leaves, second), expected, strict=True):
        assert error(got, wanted) < 1e-13


@each
def test_gathered_again(device: torch.device, name: str) -> None:
    """Sharding frees weights after forward and puts equal values elsewhere before backward."""
    module, leaves, call = make(name, device)
    expected = gradients(call(), leaves, False)
    values = [p.detach().clone() for p in module.parameters()]
    loss = call()
    for p in module.parameters():
        p.data = torch.empty(0, dtype=f64, device=device)
    for p, value in zip(module.parameters(), values, strict=True):
        p.data = value
    for got, wanted in zip(gradients(loss, leaves, False), expected, strict=True):
        assert torch.equal(got, wanted)


@each
def test_freed_in_place_and_restored(device: torch.device, name: str) -> None:
    module, leaves, call = make(name, device)
    expected = gradients(call(), leaves, False)
    values = [p.detach().clone() for p in module.parameters()]
    loss = call()
    for p in module.parameters():
        p.untyped_storage().resize_(0)
    for p, value in zip(module.parameters(), values, strict=True):
        p.untyped_storage().resize_(value.untyped_storage().nbytes())
        with torch.autograd._unsafe_preserve_version_counter(p), torch.no_grad():
            p.copy_(value)
    for got, wanted in zip(gradients(loss, leaves, False), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@each
def test_unpacked_to_new_memory(device: torch.device, name: str, second: bool) -> None:
    _, leaves, call = make(name, device)
    expected = gradients(call(), leaves, second)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        loss = call()
        got = gradients(loss, leaves, second)
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < 1e-13


@each
def test_a_weight_changed_in_place_is_an_error(device: torch.device, name: str) -> None:
    module, leaves, call = make(name, device)
    weights = [p for name, p in module.named_parameters() if "bias" not in name]
    for t in (leaves[0], *weights):
        loss = call()
        with torch.no_grad():
            t.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(loss, leaves, False)


@each
def test_a_bias_changed_in_place(device: torch.device, name: str) -> None:
    """Backward does not read a bias. The derivative of backward does, and raises an error."""
    module, leaves, call = make(name, device)
    expected = gradients(call(), leaves, False)
    loss, again = call(), call()
    with torch.no_grad():
        for parameter, p in module.named_parameters():
            if "bias" in parameter:
                p.mul_(2)
    for got, wanted in zip(gradients(loss, leaves, False), expected, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(again, leaves, True)


def test_weights_that_are_computed(device: torch.device) -> None:
    """Second derivatives reach the tensors that the weights are computed from."""
    module = fusedrnn.FusedGRU(3, 4, dtype=f64, device=device)
    plain = nn.GRU(3, 4, dtype=f64, device=device)
    plain.load_state_dict(module.state_dict())
    x = randn(5, 2, 3, device=device)
    results = []
    for layer in (module, plain):
        leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        named = {k: p.sin() for (k, _), p in zip(layer.named_parameters(), leaves, strict=True)}
        y, _ = torch.func.functional_call(layer, named, (x,))
        results.append(gradients(y.sin().sum(), leaves, True))
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-12

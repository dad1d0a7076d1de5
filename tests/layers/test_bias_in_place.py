"""Biases change in place between forward and backward, which torch.nn's GRU and RNN allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.layers import CELL_MODULES, CELLS, flat, randn

f64 = torch.float64
MODULES: dict[str, Any] = {
    **{
        f"{cell} L={L} D={2 if both else 1}": lambda cell=cell, L=L, both=both: cell.make(
            4, 6, num_layers=L, bidirectional=both, dtype=f64
        )[0]
        for cell in CELLS
        for L, both in ((1, False), (2, True))
    },
    **{
        f"{name} cell": lambda make=make: make(4, 6, dtype=f64)
        for name, make in CELL_MODULES.items()
    },
}
each = pytest.mark.parametrize("name", MODULES)


def make(name: str) -> tuple[Any, Tensor, list[Tensor]]:
    """A module, its input and its parameters."""
    torch.manual_seed(0)
    module = MODULES[name]()
    x = randn(3, 4) if name.endswith(" cell") else randn(5, 3, 4)
    return module, x.requires_grad_(), list(module.parameters())


def loss(module: Any, x: Tensor) -> Tensor:
    return torch.stack([t.sin().sum() for t in flat(module(x))]).sum()


def change(module: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter, p in module.named_parameters():
            if "bias" in parameter:
                p.mul_(value)


@each
def test_gradients_are_those_of_the_forward_that_ran(name: str) -> None:
    """No kernel reads biases in backward, so even nan in them changes no gradient."""
    module, x, parameters = make(name)
    expected = torch.autograd.grad(loss(module, x), [x, *parameters])
    y = loss(module, x)
    change(module, float("nan"))
    for got, wanted in zip(torch.autograd.grad(y, [x, *parameters]), expected, strict=True):
        assert torch.equal(got, wanted)


@each
def test_second_derivatives(name: str) -> None:
    """They read the biases. A change is an error before the first derivative and not after it."""
    module, x, parameters = make(name)

    def second(y: Tensor, factor: float) -> tuple[Tensor, ...]:
        (d_x,) = torch.autograd.grad(y, x, create_graph=True)
        change(module, factor)
        return torch.autograd.grad(d_x.sin().sum(), [x, *parameters])

    expected = second(loss(module, x), 1)
    for got, wanted in zip(second(loss(module, x), 3), expected, strict=True):
        assert torch.equal(got, wanted)
    y = loss(module, x)
    change(module, 3)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: bias_[ih]h "):
        second(y, 1)


@each
def test_weights_may_not_be_changed(name: str) -> None:
    module, x, _ = make(name)
    for parameter, p in module.named_parameters():
        if "bias" not in parameter:
            y = loss(module, x)
            with torch.no_grad():
                p.mul_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


@each
def test_weights_may_not_be_changed_between_derivatives(name: str) -> None:
    """The loss is the sum of y, whose second derivative does not go through forward again."""
    module, x, _ = make(name)
    for parameter, p in module.named_parameters():
        if "bias" not in parameter:
            y = torch.stack([t.sum() for t in flat(module(x))]).sum()
            (d_x,) = torch.autograd.grad(y, x, create_graph=True)
            with torch.no_grad():
                p.mul_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(d_x.sin().sum(), x)

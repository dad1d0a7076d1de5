"""Calls of layers and cells for the processes that run out of memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tests.kit.layers import flat

Call = Callable[[], list[Tensor]]


def training(
    module: Any, input: Any, hx: Any = None, mode: Any = nullcontext, **kwargs: Any
) -> Call:
    """A function that runs forward and backward, and returns the outputs and all gradients.

    Args:
        mode: makes the context in which forward runs.
    """
    leaves = [*flat(input), *flat(hx), *module.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> list[Tensor]:
        with mode():
            outputs = flat(module(input, hx, **kwargs))
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
        return [*outputs, *gradients]

    return call


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether two calls gave the same bits."""
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

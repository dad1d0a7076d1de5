"""A layer in plain torch with the roundings of correct GPU kernels, which all limits must allow.

It is the reference layer in float32. The factors of its products are rounded to the 16-bit type, or
to TF32 if torch allows it: x, h, the emit of a stage, weights, and in backward the deltas. Values
that are kept for backward are rounded to the 16-bit type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusedrnn import _reference

Round = Callable[[Tensor], Tensor]


def to_tf32(t: Tensor) -> Tensor:
    """Rounds float32 to 10 bits of mantissa, as for a tensor core. Ties go away from zero."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def rounding(dtype: torch.dtype) -> Round:
    """The function that rounds a factor of a product."""
    if dtype == torch.float32 and torch.ops.fusedrnn._allow_tf32():
        return to_tf32
    if dtype.itemsize == 2:
        return lambda t: t.to(dtype).float()
    return lambda t: t


class Product(torch.autograd.Function):
    """a bᵀ of rounded factors, and its gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rounded: Round, delta: Round) -> Tensor:
        a, b = rounded(a), rounded(b)
        ctx.save_for_backward(a, b)
        ctx.delta = lambda d: rounded(delta(d))
        return a @ b.T

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        d = ctx.delta(d)
        return d @ b, d.T @ a, None, None


def layer(x: Tensor, *args: Any, delta: Round = lambda d: d) -> Any:
    """`_ops.layer` with these roundings. `delta` may change the deltas, to make backward wrong."""
    rounded, dtype = rounding(x.dtype), x.dtype

    def linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product: Tensor = Product.apply(a, weight, rounded, delta)
        return product if bias is None else product + bias

    def narrow(t: Tensor) -> Tensor:
        return t.to(dtype) if t.dtype == torch.float32 else t

    def widen(t: Tensor) -> Tensor:
        return t.float() if t.dtype == dtype else t

    kept: Any = contextlib.nullcontext()
    if dtype.itemsize == 2:
        kept = torch.autograd.graph.saved_tensors_hooks(narrow, widen)
    with mock.patch.object(_reference, "F", SimpleNamespace(linear=linear)), kept:
        return _reference.layer(x, *args)


def with_a_lost_unit(*args: Any) -> Any:
    """The same layer, but backward loses the deltas of the unit in which they are largest."""

    def lose(d: Tensor) -> Tensor:
        return d.index_fill(-1, d.abs().sum(0).argmax(), 0)

    return layer(*args, delta=lose)


def a_step_late(x: Tensor, *args: Any) -> Any:
    """The same layer, but each step reads the rows of the step before."""
    return layer(x.roll(1, 0), *args)

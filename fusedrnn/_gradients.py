"""Calls the op `backward`: under torch.func, through autograd, or below autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _raw_ops
from ._errors import NO_FORWARD_MODE, as_torch_raises, refuse_dual
from ._library import CELLS
from ._options import Batch, Grads, Needs, Options, Saved

__all__ = ["gradients"]


def gradients(
    grads: Grads, saved: Saved, options: Options, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """Return the gradients of x, h0, c0 and the weights; None for each that is not wanted."""
    if grads.c is not None and not CELLS[options.cell].has_c:
        grads = grads._replace(c=None)
    nothing: list[Tensor | None] = [None] * len(saved.weights)
    if grads.y is None and grads.h is None and grads.c is None:
        return None, None, None, nothing

    if forward_ad._current_level >= 0:
        refuse_dual((*grads, saved.x, saved.h0, saved.c0, *saved.weights))
    try:
        if _C._are_functorch_transforms_active():
            d_x, d_h0, d_c0, *d_weights = _FunctorchBackward.apply(
                *(grads.y, grads.h, grads.c, saved.x, saved.h0, saved.c0, saved.reserve),
                *(saved.batch, options, needs),
                *saved.weights,
            )
        elif torch.is_grad_enabled() or is_compiling():  # backward may be derived
            d_x, d_h0, d_c0, d_weights = _raw_ops.backward(grads, saved, options, needs)
        else:
            d_x, d_h0, d_c0, d_weights = _raw_ops.backward_now(grads, saved, options, needs)
    except RuntimeError as error:
        of_forward = (saved.x, saved.h0, saved.c0, saved.reserve, *saved.weights)
        on_cpu = (saved.batch.batch_sizes, saved.batch.lengths)
        raise as_torch_raises(error, (*grads, *of_forward), on_cpu) from None
    return (
        d_x if needs.x else None,
        d_h0 if needs.h else None,
        d_c0 if needs.c else None,
        d_weights if needs.weights else nothing,
    )


class _FunctorchBackward(torch.autograd.Function):
    """The op `backward` under torch.func, where it has no derivative.

    Tensors that may require grad are separate arguments, because autograd does not look into the
    records.
    """

    @staticmethod
    def forward(
        grad_y: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        reserve: Tensor,
        batch: Batch,
        options: Options,
        needs: Needs,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        d_x, d_h0, d_c0, d_weights = _raw_ops.backward(
            Grads(grad_y, grad_h, grad_c),
            Saved(x, h0, c0, weights, batch, reserve),
            options,
            needs,
        )
        return d_x, d_h0, d_c0, *d_weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "fusedrnn: second derivatives are not supported under torch.func; use "
            "torch.autograd.grad with create_graph=True"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)

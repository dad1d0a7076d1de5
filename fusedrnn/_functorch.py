"""The autograd Function of a layer under transforms of torch.func, such as grad and vjp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _raw_ops
from ._errors import NO_FORWARD_MODE
from ._gradients import gradients
from ._library import CELLS
from ._options import Batch, Grads, Needs, Options, Saved

__all__ = ["FunctorchLayer"]


class FunctorchLayer(torch.autograd.Function):
    """Runs a layer. torch.func requires a Function to have setup_context."""

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch: Batch,
        options: Options,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, h_n, c_n, reserve = _raw_ops.forward(x, h0, c0, weights, batch, options, True)
        return y, h_n, c_n, reserve

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, h0, c0, batch, options, *weights = inputs
        _, _, c_n, reserve = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([reserve] if CELLS[options.cell].has_c else [c_n, reserve]))
        sequences = (batch.batch_sizes, batch.lengths, batch.starts)
        ctx.save_for_backward(x, h0, c0, *sequences, reserve, *weights)
        ctx.size, ctx.options = batch.size, options

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: None
    ) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, _, *need_weights = ctx.needs_input_grad
        x, h0, c0, batch_sizes, lengths, starts, reserve, *weights = ctx.saved_tensors
        d_x, d_h0, d_c0, d_weights = gradients(
            Grads(grad_y, grad_h, grad_c),
            Saved(x, h0, c0, weights, Batch(batch_sizes, lengths, ctx.size, starts), reserve),
            ctx.options,
            Needs(need_x, need_h, need_c, any(need_weights)),
        )
        return (d_x, d_h0, d_c0, None, None, *d_weights)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "fusedrnn: torch.vmap is not supported; give the layer a batch of N sequences instead"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)

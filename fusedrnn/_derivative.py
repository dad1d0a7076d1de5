"""Registers the derivative of the op `forward`, for programs that call, compile or export it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._gradients import gradients
from ._library import CELLS
from ._options import Batch, Grads, Needs, Options, Saved
from ._saved import own


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, h0, c0, weights, batch_sizes, lengths, size, cell, bidirectional, keep, starts, c_in_y = (
        inputs
    )
    _, _, c_n, reserve = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([reserve] if CELLS[cell].has_c else [c_n, reserve]))
    sequences = (own(batch_sizes), own(lengths), own(starts))
    ctx.save_for_backward(x, h0, c0, *sequences, reserve, *weights)
    ctx.size, ctx.options, ctx.keep = size, Options(cell, bidirectional, c_in_y), keep


def _derivative(
    ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: None
) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError(
            "fusedrnn::forward must be called with keep=True where its result is differentiated"
        )
    need_x, need_h, need_c, need_weights, *others = ctx.needs_input_grad
    x, h0, c0, batch_sizes, lengths, starts, reserve, *weights = ctx.saved_tensors
    d_x, d_h0, d_c0, d_weights = gradients(
        Grads(grad_y, grad_h, grad_c),
        Saved(x, h0, c0, weights, Batch(batch_sizes, lengths, ctx.size, starts), reserve),
        ctx.options,
        Needs(need_x, need_h, need_c, any(need_weights)),
    )
    return (d_x, d_h0, d_c0, list(d_weights), *[None] * len(others))


torch.library.register_autograd("fusedrnn::forward", _derivative, setup_context=_setup)

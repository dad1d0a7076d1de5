"""Functions that call the ops with records, so that callers need not know the order of arguments.

The order is that of the schemas in csrc/torch/ops.cpp. torch calls derivatives, fakes and FLOP
formulas by position, so those functions take the arguments in the same order.

`forward` and `backward` go through torch's dispatcher, so autograd, compilers and torch.func see
them. The functions whose names end in `_now` call the ops below autograd in eager mode, in a tenth
of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor

from . import _library  # noqa: F401 (loads the ops)
from ._options import Batch, Grads, Needs, Options, Saved, StepOptions

__all__ = ["backward", "backward_now", "forward", "forward_now", "step_backward_now", "step_now"]

_forward = torch.ops.fusedrnn.forward
_backward = torch.ops.fusedrnn.backward
# These are the functions inside the overloads, because the call of an overload would take a tenth
# of the time of a cell module's step.
_forward_now = _forward.default._op
_backward_now = _backward.default._op
_step_now = torch.ops.fusedrnn._step.default._op
_step_backward_now = torch.ops.fusedrnn._step_backward.default._op

# The gradients of x, h0 and c0, each empty if it is not wanted, and of the weights.
Gradients = tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch: Batch,
    options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, h_n, c_n (empty for cells without c) and the reserve (empty without `keep`)."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _forward(
        *(x, h0, c0, weights, batch.batch_sizes, batch.lengths, batch.size),
        *(options.cell, options.bidirectional, keep, batch.starts, options.c_in_y),
    )
    return result


def forward_now(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch: Batch,
    options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Does the same as `forward`, below autograd."""
    with _C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _forward_now(
            x,
            h0,
            c0,
            weights,
            batch.batch_sizes,
            batch.lengths,
            batch.size,
            options.cell,
            options.bidirectional,
            keep,
            batch.starts,
            options.c_in_y,
        )
    return result


def _backward_arguments(
    grads: Grads, saved: Saved, options: Options, needs: Needs
) -> tuple[Any, ...]:
    batch = saved.batch
    return (
        grads.y,
        grads.h,
        grads.c,
        saved.x,
        saved.h0,
        saved.c0,
        saved.weights,
        saved.reserve,
        batch.batch_sizes,
        batch.lengths,
        batch.size,
        options.cell,
        options.bidirectional,
        needs.x,
        needs.state,
        needs.weights,
        batch.starts,
        options.c_in_y,
    )


def backward(grads: Grads, saved: Saved, options: Options, needs: Needs) -> Gradients:
    """Returns the gradients of x, h0, c0 and the weights; each is empty if it is not wanted."""
    result: Gradients = _backward(*_backward_arguments(grads, saved, options, needs))
    return result


def backward_now(grads: Grads, saved: Saved, options: Options, needs: Needs) -> Gradients:
    """Does the same as `backward`, below autograd."""
    with _C._AutoDispatchBelowAutograd():
        result: Gradients = _backward_now(*_backward_arguments(grads, saved, options, needs))
    return result


def step_now(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    options: StepOptions,
    keep: bool,
) -> list[Tensor]:
    """Returns h, then c if the cell has one, then the reserve with `keep`."""
    result: list[Tensor] = _step_now(
        x, h, c, weights, options.input_size, options.hidden_size, options.cell, keep
    )
    return result


def step_backward_now(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    reserve: Tensor,
    options: StepOptions,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Sequence[Tensor]]:
    """Returns the gradients of x, h, c and the weights; None or empty if they are not wanted."""
    result: tuple[Tensor | None, Tensor | None, Tensor | None, Sequence[Tensor]]
    result = _step_backward_now(
        grad_h,
        grad_c,
        x,
        weights,
        reserve,
        options.input_size,
        options.hidden_size,
        options.cell,
        needs.x,
        needs.state,
        needs.weights,
    )
    return result

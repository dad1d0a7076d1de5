"""Runs one recurrent layer over a whole batch, or one step of a cell, by calling the ops.

Functions and modules call `layer`. It calls the ops `torch.ops.fusedrnn.forward` and
`torch.ops.fusedrnn.backward`, which serve every cell and take every option as an argument. Both are
registered with autograd, so programs may also call, compile and export them directly. In eager mode
`layer` calls them in a plain `autograd.Function`, or without any Function if there is no grad,
because autograd's registered path costs about 50 µs per call.

Cell modules call `step`, which has ops of its own: their arguments are [N, I] and [N, H], as a cell
module has them.

Exported programs contain the names of the ops and of their arguments. Therefore a new option of an
op is added at the end of the arguments and has a default, and nothing is renamed, reordered or
removed. A test compares the schemas with tests/ops/golden_schemas.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _derivative, _double_backward, _fakes, _flops, _raw_ops  # noqa: F401
from ._errors import as_torch_raises, refuse_dual
from ._functorch import FunctorchLayer
from ._gradients import gradients
from ._library import CELLS
from ._options import Batch, Grads, Needs, Options, Saved, StepOptions
from ._saved import save_given, saved_given

__all__ = ["layer", "may_step", "step"]


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch: Batch,
    options: Options,
    casts: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer, in one or both directions, over a batch of sequences.

    Args:
        x: [T, N, I]; or [S, I] with `batch.batch_sizes`.
        h0: [D, N, P]; None means zeros.
        c0: [D, N, H]; None means zeros, and is required for cells without c. It may be float32 if x
            has a 16-bit dtype.
        weights: for each direction weight_ih [G*H, I] and weight_hh [G*H, P], then bias_ih and
            bias_hh [G*H] or neither, then weight_hr [P, H] for "lstm_proj" or weight_ch [3*H] for
            "lstm_peephole".
        batch: the sequences.
        options: the cell and its options.
        casts: the weights in the dtype of x, if their own dtype is another; only in eager mode. The
            gradients still go to the weights.

    Returns:
        y [T, N, D*P] (zero beyond a length) or [S, D*P], h_n [D, N, P] and c_n [D, N, H] or None.
        They have the dtype of x, but c_n has that of c0 if there is one.

    Raises:
        RuntimeError: shapes, dtypes or sizes that do not fit; the message says which. For a lack
            of GPU memory it is its subclass torch.OutOfMemoryError.
        NotImplementedError: under forward-mode AD.
    """
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    )
    if forward_ad._current_level >= 0:
        refuse_dual((x, h0, c0, *weights))
    if is_compiling():
        y, h_n, c_n, _ = _raw_ops.forward(x, h0, c0, weights, batch, options, needs_grad)
    else:
        try:
            if _C._are_functorch_transforms_active():
                y, h_n, c_n, _ = FunctorchLayer.apply(x, h0, c0, batch, options, *weights)
            elif needs_grad:
                y, h_n, c_n = _apply_layer(x, h0, c0, batch, options, casts, *weights)
            else:
                y, h_n, c_n, _ = _raw_ops.forward_now(
                    x, h0, c0, casts or weights, batch, options, False
                )
        except RuntimeError as error:
            on_cpu = (batch.batch_sizes, batch.lengths)
            raise as_torch_raises(error, (x, h0, c0, *weights), on_cpu) from None
    return y, h_n, c_n if CELLS[options.cell].has_c else None


def may_step() -> bool:
    """Whether `step` may be called: the running code is neither traced nor transformed."""
    return not (
        is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def step(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    options: StepOptions,
    casts: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """Run one step of a cell without projection, where `may_step` allows it.

    Args:
        x: [N, I] or [I].
        h: [N, H], or [H] for x [I]; None means zeros.
        c: as h, and only with h; None for cells without c. It may be float32 if x has a 16-bit
            dtype.
        weights: as in `layer`, for one direction.
        options: the cell, I and H.
        casts: as in `layer`.

    Returns:
        [h] or [h, c] after the step, in the shapes of the states.

    Raises:
        RuntimeError: an argument does not fit; the message is that of the op. For a lack of GPU
            memory it is its subclass torch.OutOfMemoryError.
    """
    try:
        if torch.is_grad_enabled() and (
            weights[0].requires_grad  # mostly true, and then `any` makes no generator
            or x.requires_grad
            or any(w.requires_grad for w in weights)
            or (h is not None and h.requires_grad)
            or (c is not None and c.requires_grad)
        ):
            stepped: tuple[Tensor, ...]
            stepped = _apply_step(x, h, c, options, casts, *weights)
            return stepped
        return _raw_ops.step_now(x, h, c, casts or weights, options, False)
    except RuntimeError as error:
        raise as_torch_raises(error, (x, h, c, *weights)) from None


class _Layer(torch.autograd.Function):
    """The layer in eager mode. It has no setup_context, which would cost 60 µs more per call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch: Batch,
        options: Options,
        casts: Sequence[Tensor] | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n, reserve = _raw_ops.forward_now(
            x, h0, c0, casts or weights, batch, options, True
        )
        ctx.set_materialize_grads(False)
        save_given(ctx, x, h0, c0, casts, weights, reserve)
        ctx.batch, ctx.options = batch, options  # batch_sizes and lengths are copies of our own
        if not CELLS[options.cell].has_c:
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, _, _, *need_weights = ctx.needs_input_grad
        x, h0, c0, reserve, *weights = saved_given(ctx)
        d_x, d_h0, d_c0, d_weights = gradients(
            Grads(grad_y, grad_h, grad_c),
            Saved(x, h0, c0, weights, ctx.batch, reserve),
            ctx.options,
            Needs(need_x, need_h, need_c, any(need_weights)),
        )
        return (d_x, d_h0, d_c0, None, None, None, *d_weights)


class _Step(torch.autograd.Function):
    """A cell's step in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        options: StepOptions,
        casts: Sequence[Tensor] | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        *states, reserve = _raw_ops.step_now(x, h, c, casts or weights, options, True)
        ctx.set_materialize_grads(False)
        save_given(ctx, x, h, c, casts, weights, reserve)
        ctx.options = options
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None = None) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, _, *need_weights = ctx.needs_input_grad
        needs = Needs(need_x, need_h, need_c, any(need_weights))
        options: StepOptions = ctx.options
        x, h, c, reserve, *weights = saved_given(ctx)
        if torch.is_grad_enabled() or not may_step():  # backward may be derived
            lead = (1,) if x.dim() == 2 else (1, 1)

            def raised(t: Tensor | None) -> Tensor | None:
                return None if t is None else t.reshape(*lead, *t.shape)

            batch = Batch(None, None, x.shape[0] if x.dim() == 2 else 1)
            d_x, d_h, d_c, d_weights = gradients(
                Grads(None, raised(grad_h), raised(grad_c)),
                Saved(x.reshape(*lead, *x.shape), raised(h), raised(c), weights, batch, reserve),
                Options(options.cell),
                needs,
            )
            d_x, d_h, d_c = (
                None if d is None else d.reshape(d.shape[len(lead) :]) for d in (d_x, d_h, d_c)
            )
        elif grad_h is None and grad_c is None:
            d_x, d_h, d_c, d_weights = None, None, None, []
        else:
            try:
                d_x, d_h, d_c, d_weights = _raw_ops.step_backward_now(
                    grad_h, grad_c, x, weights, reserve, options, needs
                )
            except RuntimeError as error:
                raise as_torch_raises(error, (grad_h, grad_c, x, reserve, *weights)) from None
        return (
            *(d_x, d_h if need_h else None, d_c if need_c else None, None, None),
            *(d_weights or [None] * len(weights)),
        )


# Function.apply first checks for transforms of torch.func, which takes 2 µs. Both callers have
# checked for them already, so they call the apply of its base class.
_apply_layer = super(torch.autograd.Function, _Layer).apply
_apply_step = super(torch.autograd.Function, _Step).apply

_flops.register()

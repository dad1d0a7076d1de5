"""One recurrent layer over a whole batch: the ops, what autograd and the compiler know of them.

`layer` is the door for everything above. The ops behind it, `torch.ops.fusedrnn.forward` and
`torch.ops.fusedrnn.backward`, take every option as an argument and serve every cell. Both are
registered with autograd, so they may be called, compiled and exported directly; `layer` takes a
shorter way to them in eager mode (a plain `autograd.Function`, or no Function at all without
grad), because the registered way costs about 50 µs a call. `step` is a cell's one step by ops of
its own, which take what a cell has as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ._library import CELLS  # isort: skip (loads the ops, of which the next ones say more)
from . import _double_backward, _fakes, _flops  # noqa: F401
from ._saved import keep, kept, own

__all__ = ["layer", "may_step", "step"]

_forward = torch.ops.fusedrnn.forward
_backward = torch.ops.fusedrnn.backward
# For eager mode, the functions inside the overloads, whose own call is a tenth of a cell's step.
_forward_now = _forward.default._op
_backward_now = _backward.default._op
_step = torch.ops.fusedrnn._step.default._op
_step_backward = torch.ops.fusedrnn._step_backward.default._op

# Options that travel unchanged through forward, backward and double backward:
# batch (N), cell, bidirectional.
_Options = tuple[int, str, bool]


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    cell: str,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    batch: int | None = None,
    casts: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer, both directions of a bidirectional one, over a batch of sequences.

    Args:
        x: [T, N, I]; or [S, I] with `batch_sizes`.
        h0: [D, N, P], zeros where None.
        c0: [D, N, H], zeros where None; None for cells without a cell state. It may be float32
            where x is of 16 bits.
        weights: per direction weight_ih [G*H, I], weight_hh [G*H, P], then bias_ih and bias_hh
            [G*H] or neither, then weight_hr [P, H] for "lstm_proj".
        cell: a key of `fusedrnn._library.CELLS`.
        bidirectional: D = 2, the second direction from each sequence's own end.
        batch_sizes: int64 [T] on the CPU, as in `PackedSequence`.
        lengths: int64 [N] on the CPU, any order, each in [0, T]; only with x [T, N, I].
        batch: N, where the caller knows it; otherwise read from x, h0 or batch_sizes.
        casts: the weights in the dtype of x, where they themselves are of another; only in eager
            mode. Gradients are those of the weights.

    Returns:
        y [T, N, D*P] (zero beyond a length) or [S, D*P], h_n [D, N, P], c_n [D, N, H] or None, in
        the dtype of x; c_n in that of c0 where there is one.

    Raises:
        RuntimeError: shapes, dtypes or sizes that do not fit; the message says which. A lack of
            GPU memory is a torch.OutOfMemoryError, which is one.
        NotImplementedError: under forward-mode AD.
    """
    if batch is None:
        if batch_sizes is None:
            batch = x.shape[1]
        elif h0 is not None:
            batch = h0.shape[1]
        else:
            batch = int(batch_sizes[0])
    options = (batch, cell, bidirectional)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    )
    if forward_ad._current_level >= 0:
        _refuse_dual(x, h0, c0, *weights)
    if is_compiling():
        y, h_n, c_n, _ = _forward(x, h0, c0, weights, batch_sizes, lengths, *options, needs_grad)
    else:
        try:
            if _C._are_functorch_transforms_active():
                y, h_n, c_n, _ = _FunctorchLayer.apply(
                    x, h0, c0, batch_sizes, lengths, options, *weights
                )
            elif needs_grad:
                y, h_n, c_n = _apply_layer(
                    x, h0, c0, batch_sizes, lengths, options, casts, *weights
                )
            else:
                with _C._AutoDispatchBelowAutograd():
                    y, h_n, c_n, _ = _forward_now(
                        x, h0, c0, casts or weights, batch_sizes, lengths, *options, False
                    )
        except _FROM_OPS as error:
            raise _as_torch_raises(error) from None
    return y, h_n, c_n if CELLS[cell].has_c else None


# What an op raises: the engine on a GPU knows no torch, and what it throws is a ValueError.
_FROM_OPS = (RuntimeError, ValueError)


def _as_torch_raises(error: Exception) -> Exception:
    """Return the exception that torch has for what an op can only say in words.

    A torch.OutOfMemoryError for a lack of GPU memory; a RuntimeError as all others of the ops for
    a regime that cannot run and for devices without a kernel; otherwise the error itself.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return error
    if "CUDA out of memory" in str(error):
        return torch.OutOfMemoryError(f"{error}. A smaller batch or shorter sequences need less.")
    if isinstance(error, ValueError) and "regime was asked for" in str(error):
        return RuntimeError(f"fusedrnn: {error}")
    if isinstance(error, NotImplementedError) and "fusedrnn::" in str(error):
        return RuntimeError(
            "fusedrnn: the tensors of a call must be on one device, also those that a hook for "
            f"saved tensors gives back to backward: {error}"
        )
    return error


def may_step() -> bool:
    """Whether `step` may be called: nobody traces or transforms what runs now."""
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
    input_size: int,
    hidden_size: int,
    cell: str,
    casts: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """Run one step of a cell without projection, where `may_step` allows it.

    Args:
        x: [N, I] or [I].
        h: [N, H], without N for [I]; zeros where None.
        c: as h, and only with h; None for cells without a cell state. It may be float32 where x is
            of 16 bits.
        weights: as `layer`'s, of one direction.
        input_size: I.
        hidden_size: H.
        cell: a key of `fusedrnn._library.CELLS`.
        casts: as `layer`'s.

    Returns:
        [h] or [h, c] after the step, of the shapes of the states.

    Raises:
        RuntimeError: whatever does not fit, in the op's own words; torch.OutOfMemoryError, which
            is one, for a lack of GPU memory.
    """
    try:
        if torch.is_grad_enabled() and (
            weights[0].requires_grad  # most often, and then no generator is made
            or x.requires_grad
            or any(w.requires_grad for w in weights)
            or (h is not None and h.requires_grad)
            or (c is not None and c.requires_grad)
        ):
            stepped: tuple[Tensor, ...]
            stepped = _apply_step(x, h, c, (input_size, hidden_size, cell), casts, *weights)
            return stepped
        result: list[Tensor]
        result = _step(x, h, c, casts or weights, input_size, hidden_size, cell, False)
        return result
    except _FROM_OPS as error:
        raise _as_torch_raises(error) from None


_NO_FORWARD_MODE = (
    "fusedrnn: forward-mode AD is not supported; use reverse mode (torch.autograd.grad)"
)


def _refuse_dual(*tensors: Tensor | None) -> None:
    # A compiled function would lose tangents without a word, and shows none while it is traced.
    if is_compiling() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(_NO_FORWARD_MODE)


class _Layer(torch.autograd.Function):
    """The layer in eager mode. The ctx form: setup_context costs 60 µs more a call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        options: _Options,
        casts: Sequence[Tensor] | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _C._AutoDispatchBelowAutograd():
            y, h_n, c_n, reserve = _forward_now(
                x, h0, c0, casts or weights, batch_sizes, lengths, *options, True
            )
        ctx.set_materialize_grads(False)
        keep(ctx, x, h0, c0, casts, weights, batch_sizes, lengths, reserve)
        ctx.options = options
        if not CELLS[options[1]].has_c:
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, _, _, _, *need_weights = ctx.needs_input_grad
        d_x, d_h0, d_c0, d_weights = _gradients(
            grads, kept(ctx), ctx.options, need_x, need_h, need_c, any(need_weights)
        )
        return (d_x, d_h0, d_c0, None, None, None, None, *d_weights)


class _Step(torch.autograd.Function):
    """A cell's step in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        options: tuple[int, int, str],
        casts: Sequence[Tensor] | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        *states, reserve = _step(x, h, c, casts or weights, *options, True)
        ctx.set_materialize_grads(False)
        keep(ctx, x, h, c, casts, weights, reserve)
        ctx.options = options
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None = None) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, _, *need_weights = ctx.needs_input_grad
        x, h, c, reserve, *weights = kept(ctx)
        if torch.is_grad_enabled() or not may_step():  # to be derived again, or traced: as a layer
            lead = (1,) if x.dim() == 2 else (1, 1)

            def raised(t: Tensor | None) -> Tensor | None:
                return None if t is None else t.reshape(*lead, *t.shape)

            d_x, d_h, d_c, d_weights = _gradients(
                (None, raised(grad_h), raised(grad_c)),
                (raised(x), raised(h), raised(c), None, None, reserve, *weights),
                (x.shape[0] if x.dim() == 2 else 1, ctx.options[2], False),
                *(need_x, need_h, need_c, any(need_weights)),
            )
            d_x, d_h, d_c = (
                None if d is None else d.reshape(d.shape[len(lead) :]) for d in (d_x, d_h, d_c)
            )
        elif grad_h is None and grad_c is None:
            d_x, d_h, d_c, d_weights = None, None, None, []
        else:
            try:
                d_x, d_h, d_c, d_weights = _step_backward(
                    *(grad_h, grad_c, x, weights, reserve, *ctx.options),
                    *(need_x, need_h or need_c, any(need_weights)),
                )
            except _FROM_OPS as error:
                raise _as_torch_raises(error) from None
        return (
            *(d_x, d_h if need_h else None, d_c if need_c else None, None, None),
            *(d_weights or [None] * len(weights)),
        )


# Function.apply would look for transforms of torch.func first, for 2 µs; both callers have.
_apply_layer = super(torch.autograd.Function, _Layer).apply
_apply_step = super(torch.autograd.Function, _Step).apply


class _FunctorchLayer(torch.autograd.Function):
    """The same for torch.func's grad and vjp, which ask for the setup_context form."""

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        options: _Options,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = _forward(x, h0, c0, weights, batch_sizes, lengths, *options, True)
        return tuple(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, h0, c0, batch_sizes, lengths, options, *weights = inputs
        _, _, c_n, reserve = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([reserve] if CELLS[options[1]].has_c else [c_n, reserve]))
        ctx.save_for_backward(x, h0, c0, batch_sizes, lengths, reserve, *weights)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, _, _, *need_weights = ctx.needs_input_grad
        d_x, d_h0, d_c0, d_weights = _gradients(
            grads, ctx.saved_tensors, ctx.options, need_x, need_h, need_c, any(need_weights)
        )
        return (d_x, d_h0, d_c0, None, None, None, *d_weights)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "fusedrnn: torch.vmap is not supported; give the layer a batch of N sequences instead"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


class _FunctorchBackward(torch.autograd.Function):
    """The backward op under torch.func, where it cannot be derived again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        (*before, reserve, batch_sizes, lengths), options, weights = args[:9], args[9], args[10:]
        d_x, d_h0, d_c0, d_weights = _backward(
            *before, weights, reserve, batch_sizes, lengths, *options
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
        raise NotImplementedError(_NO_FORWARD_MODE)


def _gradients(
    grads: Sequence[Tensor | None],
    saved: Sequence[Any],
    options: _Options,
    need_x: bool,
    need_h: bool,
    need_c: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """Call the backward op; None for what is not wanted."""
    x, h0, c0, batch_sizes, lengths, reserve, *weights = saved
    grad_y, grad_h, grad_c = grads[:3]
    if not CELLS[options[1]].has_c:
        grad_c = None
    nothing: list[Tensor | None] = [None] * len(weights)
    if grad_y is None and grad_h is None and grad_c is None:
        return None, None, None, nothing

    if forward_ad._current_level >= 0:
        _refuse_dual(grad_y, grad_h, grad_c, x, h0, c0, *weights)
    needs = (need_x, need_h or need_c, need_weights)
    before = (grad_y, grad_h, grad_c, x, h0, c0)
    after = (reserve, batch_sizes, lengths)
    try:
        if _C._are_functorch_transforms_active():
            d_x, d_h0, d_c0, *d_weights = _FunctorchBackward.apply(
                *before, *after, (*options, *needs), *weights
            )
        elif torch.is_grad_enabled() or is_compiling():  # to be derived again
            d_x, d_h0, d_c0, d_weights = _backward(*before, weights, *after, *options, *needs)
        else:
            with _C._AutoDispatchBelowAutograd():
                d_x, d_h0, d_c0, d_weights = _backward_now(
                    *before, weights, *after, *options, *needs
                )
    except _FROM_OPS as error:
        raise _as_torch_raises(error) from None
    return (
        d_x if need_x else None,
        d_h0 if need_h else None,
        d_c0 if need_c else None,
        d_weights if need_weights else nothing,
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, h0, c0, weights, batch_sizes, lengths, batch, cell, bidirectional, keep = inputs
    _, _, c_n, reserve = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([reserve] if CELLS[cell].has_c else [c_n, reserve]))
    sequences = (own(batch_sizes), own(lengths))
    ctx.save_for_backward(x, h0, c0, *sequences, reserve, *weights)
    ctx.options = (batch, cell, bidirectional)
    ctx.keep = keep


def _forward_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError(
            "fusedrnn::forward must be called with keep=True where its result is differentiated"
        )
    need_x, need_h, need_c, need_weights, *_ = ctx.needs_input_grad
    d_x, d_h0, d_c0, d_weights = _gradients(
        grads, ctx.saved_tensors, ctx.options, need_x, need_h, need_c, any(need_weights)
    )
    return (d_x, d_h0, d_c0, list(d_weights), *[None] * 6)


torch.library.register_autograd(
    "fusedrnn::forward", _forward_derivative, setup_context=_forward_setup
)
_flops.register()

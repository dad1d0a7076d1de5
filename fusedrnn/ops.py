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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _reference
from ._library import CELLS, LIBRARY

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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer, both directions of a bidirectional one, over a batch of sequences.

    Args:
        x: [T, N, I]; or [S, I] with `batch_sizes`.
        h0: [D, N, P], zeros where None.
        c0: [D, N, H], zeros where None; None for cells without a cell state.
        weights: per direction weight_ih [G*H, I], weight_hh [G*H, P], then bias_ih and bias_hh
            [G*H] or neither, then weight_hr [P, H] for "lstm_proj".
        cell: a key of `fusedrnn._library.CELLS`.
        bidirectional: D = 2, the second direction from each sequence's own end.
        batch_sizes: int64 [T] on the CPU, as in `PackedSequence`.
        lengths: int64 [N] on the CPU, any order, each in [0, T]; only with x [T, N, I].
        batch: N, where the caller knows it; otherwise read from x, h0 or batch_sizes.

    Returns:
        y [T, N, D*P] (zero beyond a length) or [S, D*P], h_n [D, N, P], c_n [D, N, H] or None.

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
    if is_compiling():
        y, h_n, c_n, _ = _forward(x, h0, c0, weights, batch_sizes, lengths, *options, needs_grad)
    else:
        try:
            if _C._are_functorch_transforms_active():
                y, h_n, c_n, _ = _FunctorchLayer.apply(
                    x, h0, c0, batch_sizes, lengths, options, *weights
                )
            elif needs_grad:
                y, h_n, c_n = _apply_layer(x, h0, c0, batch_sizes, lengths, options, *weights)
            else:
                if forward_ad._current_level >= 0:
                    _refuse_dual(x, h0, c0, *weights)
                with _C._AutoDispatchBelowAutograd():
                    y, h_n, c_n, _ = _forward_now(
                        x, h0, c0, weights, batch_sizes, lengths, *options, False
                    )
        except _FROM_OPS as error:
            raise _as_torch_raises(error) from None
    return y, h_n, c_n if CELLS[cell].has_c else None


# What an op raises: the engine on a GPU knows no torch, and what it throws is a ValueError.
_FROM_OPS = (RuntimeError, ValueError)


def _as_torch_raises(error: Exception) -> Exception:
    """Return the exception that torch has for what an op can only say in words.

    A torch.OutOfMemoryError for a lack of GPU memory; a RuntimeError as all others of the ops for
    a regime that cannot run; otherwise the error itself.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return error
    if "CUDA out of memory" in str(error):
        return torch.OutOfMemoryError(f"{error}. A smaller batch or shorter sequences need less.")
    if isinstance(error, ValueError) and "regime was asked for" in str(error):
        return RuntimeError(f"fusedrnn: {error}")
    return error


def may_step() -> bool:
    """Whether `step` may be called: nobody traces, transforms or casts what runs now."""
    return not (
        is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._is_any_autocast_enabled()
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
) -> Sequence[Tensor]:
    """Run one step of a cell without projection, where `may_step` allows it.

    Args:
        x: [N, I] or [I].
        h: [N, H], without N for [I]; zeros where None.
        c: as h, and only with h; None for cells without a cell state.
        weights: as `layer`'s, of one direction.
        input_size: I.
        hidden_size: H.
        cell: a key of `fusedrnn._library.CELLS`.

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
            stepped = _apply_step(x, h, c, (input_size, hidden_size, cell), *weights)
            return stepped
        result: list[Tensor] = _step(x, h, c, weights, input_size, hidden_size, cell, False)
        return result
    except _FROM_OPS as error:
        raise _as_torch_raises(error) from None


_NO_FORWARD_MODE = (
    "fusedrnn: forward-mode AD is not supported; use reverse mode (torch.autograd.grad)"
)


def _refuse_dual(*tensors: Tensor | None) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(_NO_FORWARD_MODE)


# Where biases stand among weights, by the number of these: of one direction or two, the second
# and the last with a projection.
_BIASES = {4: (2, 3), 5: (2, 3), 8: (2, 3, 6, 7), 10: (2, 3, 7, 8)}


def _save(ctx: Any, tensors: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
    """Save for backward what it reads: of the biases only that there are some.

    As in torch.nn's GRU and RNN they may be changed in place before backward, whose kernels ask
    only for their sizes. Saved tensors may not.
    """
    places = _BIASES.get(len(weights), ())
    if not places or weights[2].dim() != 1:  # two directions without biases
        ctx.biases = ()
        ctx.save_for_backward(*tensors, *weights)
        return
    kept: list[Tensor | None] = [*tensors, *weights]
    biases, versions = [], 0
    for k in places:
        bias = weights[k]
        biases.append(bias)
        versions += bias._version
        kept[len(tensors) + k] = None
    ctx.save_for_backward(*kept)
    ctx.biases, ctx.versions, ctx.count = biases, versions, len(weights)


def _saved(ctx: Any) -> Sequence[Any]:
    """Return what `_save` saved, and the biases in their places."""
    if not ctx.biases:
        return ctx.saved_tensors
    saved = list(ctx.saved_tensors)
    biases = ctx.biases
    if torch.is_grad_enabled():  # second derivatives read them, perhaps after another change
        if ctx.versions != sum(b._version for b in biases):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: a bias, which second derivatives need as forward read it"
            )
        biases = [b.clone() for b in biases]
    begin = len(saved) - ctx.count
    for k, bias in zip(_BIASES[ctx.count], biases, strict=True):
        saved[begin + k] = bias
    return saved


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
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _C._AutoDispatchBelowAutograd():
            y, h_n, c_n, reserve = _forward_now(
                x, h0, c0, weights, batch_sizes, lengths, *options, True
            )
        ctx.set_materialize_grads(False)
        _save(ctx, (x, h0, c0, batch_sizes, lengths, reserve), weights)
        ctx.options = options
        if not CELLS[options[1]].has_c:
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, _, _, *need_weights = ctx.needs_input_grad
        d_x, d_h0, d_c0, d_weights = _gradients(
            grads, _saved(ctx), ctx.options, need_x, need_h, need_c, any(need_weights)
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
        options: tuple[int, int, str],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        *states, reserve = _step(x, h, c, weights, *options, True)
        ctx.set_materialize_grads(False)
        _save(ctx, (x, h, c, reserve), weights)
        ctx.options = options
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None = None) -> tuple[Any, ...]:
        need_x, need_h, need_c, _, *need_weights = ctx.needs_input_grad
        x, h, c, reserve, *weights = _saved(ctx)
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
            *(d_x, d_h if need_h else None, d_c if need_c else None, None),
            *(d_weights or [None] * len(weights)),
        )


# Function.apply would look for transforms of torch.func first, for 2 µs; both callers have.
_apply_layer = super(torch.autograd.Function, _Layer).apply
_apply_step = super(torch.autograd.Function, _Step).apply


class _FunctorchLayer(_Layer):
    """The same for torch.func's grad and vjp, which ask for the setup_context form."""

    @staticmethod
    def forward(  # type: ignore[override]
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
        ctx.biases = ()  # they are among the saved
        ctx.options = options

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


# --- Shapes, for the compiler ------------------------------------------------------------------


def _sizes(
    x: Tensor, weights: Sequence[Tensor], cell: str, bidirectional: bool
) -> tuple[int, int, int, list[Any]]:
    """Return D, H, P and the leading sizes of x."""
    spec = CELLS[cell]
    directions = 2 if bidirectional else 1
    hidden = weights[0].shape[0] // spec.gates
    return directions, hidden, weights[1].shape[1], list(x.shape[:-1])


def _check_devices(x: Tensor, on_cpu: Sequence[Tensor | None], **others: Any) -> None:
    """Raise where a meta or fake tensor stands beside tensors of another device."""
    for name, value in others.items():
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if t is not None and t.device != x.device:
                raise RuntimeError(
                    f"fusedrnn: {name} must be on {x.device} as x is, got {t.device}"
                )
    for name, t in zip(("batch_sizes", "lengths"), on_cpu, strict=True):
        if t is not None and t.device.type != "cpu":
            raise RuntimeError(f"fusedrnn: {name} must be on the CPU, got {t.device}")


def _in_pairs(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether the CPU engine multiplies pairs of bfloat16, and keeps it; sizes = I, H, P."""
    return (
        dtype == torch.bfloat16
        and LIBRARY.multiplies_pairs
        and all(size % 2 == 0 for size in sizes)
    )


def _empty_reserve(x: Tensor, cell: str, sizes: tuple[Any, Any, Any, Any, Any]) -> Tensor:
    """Return what forward keeps for rows of states; sizes = rows, N, D, H, P."""
    spec = CELLS[cell]
    rows, batch, directions, hidden, width = sizes
    emits, has_c = int(spec.stages > 1), int(spec.has_c)  # torch 2.11: a bool times a SymInt fails
    saved = (batch if spec.saves_h else rows) * spec.saved * hidden
    of_dtype = saved + rows * (emits * hidden + width)
    of_state = rows * has_c * hidden
    if x.device.type != "cuda":
        if _in_pairs(x.dtype, x.shape[-1], hidden, width):
            of_dtype = of_dtype // 2
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty([directions * (of_dtype + of_state)], dtype=compute)
    # Bytes: all in the dtype of x but c, which is float32 for the 16-bit types, and aligned.
    if x.dtype.itemsize == 2:
        before_c = (saved + rows * width) * 2
        padding = (before_c % 4) if spec.has_c else 0
        one = before_c + padding + of_state * 4 + rows * emits * hidden * 2
        one = (one + 3) // 4 * 4
    else:
        one = (of_dtype + of_state) * x.dtype.itemsize
    return x.new_empty([directions * one], dtype=torch.uint8)


@torch.library.register_fake("fusedrnn::forward")
def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    batch: int,
    cell: str,
    bidirectional: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(x, (batch_sizes, lengths), h0=h0, c0=c0, weights=weights)
    spec = CELLS[cell]
    directions, hidden, width, lead = _sizes(x, weights, cell, bidirectional)
    rows: Any = 1
    for size in lead:
        rows = rows * size
    kept = (rows, batch) if keep else (0, 0)
    return (
        x.new_empty([*lead, directions * width]),
        x.new_empty([directions, batch, width]),
        x.new_empty([directions, batch, hidden] if spec.has_c else [0]),
        _empty_reserve(x, cell, (*kept, directions, hidden, width)),
    )


@torch.library.register_fake("fusedrnn::backward")
def _backward_fake(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    batch: int,
    cell: str,
    bidirectional: bool,
    need_x: bool,
    need_state: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    states = {"grad_y": grad_y, "grad_h": grad_h, "grad_c": grad_c, "h0": h0, "c0": c0}
    _check_devices(x, (batch_sizes, lengths), **states, weights=weights, reserve=reserve)
    directions, hidden, width, _ = _sizes(x, weights, cell, bidirectional)
    has_c = CELLS[cell].has_c
    return (
        x.new_empty(x.shape if need_x else [0]),
        x.new_empty([directions, batch, width] if need_state else [0]),
        x.new_empty([directions, batch, hidden] if need_state and has_c else [0]),
        [w.new_empty(w.shape) for w in weights] if need_weights else [],
    )


# --- Derivatives of the ops themselves ---------------------------------------------------------

torch.library.define("fusedrnn::_own", "(Tensor t) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("fusedrnn::_own", "CPU")
def _own_now(t: Tensor) -> Tensor:
    return t.clone()


@torch.library.register_fake("fusedrnn::_own")
def _own_fake(t: Tensor) -> Tensor:
    return torch.empty_like(t)


def _own(t: Tensor | None) -> Tensor | None:
    """Return a copy of batch_sizes or lengths to keep for backward, None of None.

    They lie on the CPU, often in a loader's memory, which fills it again before backward. The copy
    is an op because a compiler drops a clone, or makes it in backward, when it is too late.
    """
    return None if t is None else torch.ops.fusedrnn._own(t)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, h0, c0, weights, batch_sizes, lengths, batch, cell, bidirectional, keep = inputs
    _, _, c_n, reserve = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([reserve] if CELLS[cell].has_c else [c_n, reserve]))
    sequences = (_own(batch_sizes), _own(lengths))
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


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    grad_y, grad_h, grad_c, x, h0, c0, weights, _, batch_sizes, lengths, *options = inputs
    ctx.set_materialize_grads(False)
    sequences = (_own(batch_sizes), _own(lengths))
    ctx.save_for_backward(grad_y, grad_h, grad_c, x, h0, c0, *sequences, *weights)
    ctx.options = tuple(options)


def _without_autocast(tensors: Sequence[Tensor | None]) -> torch.autocast:
    """Return a context in which nothing on the device of the tensors is cast."""
    kind = next(t.device.type for t in tensors if t is not None)
    return torch.autocast("cuda" if kind == "cuda" else "cpu", enabled=False)


def _derive(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """Gradients of (output, gradient) pairs with respect to inputs, None where there is none."""
    result: list[Tensor | None] = [None] * len(inputs)
    present = [i for i, t in enumerate(inputs) if t is not None]
    if outputs:
        derived = torch.autograd.grad(
            [o for o, _ in outputs],
            [t for t in inputs if t is not None],
            [g for _, g in outputs],
            create_graph=create_graph,
            allow_unused=True,
        )
        for i, d in zip(present, derived, strict=True):
            result[i] = d
    return result


def _second_derivative(
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    bidirectional: bool,
    create_graph: bool,
) -> list[Tensor | None]:
    """Derive the backward op: gradients of grads and primals, None where there is none.

    Recomputes from x, states and weights in plain torch ops and derives that twice; never goes
    through the reserve, which is not a differentiable function of anything autograd knows.

    Args:
        grads: gradients of y, h_n and c_n.
        primals: x, h0, c0 and the weights.
        grad_grads: gradients of what backward returned for each primal.
        batch_sizes: as in `layer`.
        lengths: as in `layer`.
        cell: as in `layer`.
        bidirectional: as in `layer`.
        create_graph: whether the result is to be differentiated once more.
    """

    def alias(t: Tensor | None) -> Tensor | None:
        # A tensor of its own to derive by, joined to t where a third derivative may want that.
        if t is None:
            return None
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad(), _without_autocast(primals):
        outer = [alias(g) for g in grads]
        inner = [alias(t) for t in primals]
        x, h0, c0, *weights = inner
        outputs = _reference.layer(
            *(x, h0, c0, weights),  # type: ignore[arg-type]
            cell=cell,
            bidirectional=bidirectional,
            batch_sizes=batch_sizes,
            lengths=lengths,
        )
        # Where every length is 0 and there is no state, an output depends on nothing.
        first = _derive(
            [
                (o, g)
                for o, g in zip(outputs, outer, strict=True)
                if g is not None and o is not None and o.requires_grad
            ],
            inner,
            create_graph=True,
        )
        return _derive(
            [
                (f, gg)
                for f, gg in zip(first, grad_grads, strict=True)
                if gg is not None and f is not None and f.requires_grad
            ],
            [*outer, *inner],
            create_graph,
        )


@torch.library.custom_op(
    "fusedrnn::double_backward",
    mutates_args=(),
    schema="(Tensor?[] grads, Tensor?[] primals, Tensor?[] grad_grads, Tensor? batch_sizes, "
    "Tensor? lengths, str cell, bool bidirectional) -> Tensor[]",
)
def _double_backward(
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    bidirectional: bool,
) -> list[Tensor]:
    """`_second_derivative` as one node of a traced graph: its loop depends on the lengths."""
    # The kernel of an op runs with autograd shut out; this one needs it.
    with _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False):
        result = _second_derivative(
            grads, primals, grad_grads, batch_sizes, lengths, cell, bidirectional, False
        )
    return [
        torch.zeros_like(t) if r is None else r.clone()
        for t, r in zip([*grads, *primals], result, strict=True)
        if t is not None
    ]


@_double_backward.register_fake
def _double_backward_fake(
    grads: Sequence[Tensor | None], primals: Sequence[Tensor | None], *_: Any
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (*grads, *primals) if t is not None]


def _backward_derivative(
    ctx: Any,
    gg_x: Tensor | None,
    gg_h0: Tensor | None,
    gg_c0: Tensor | None,
    gg_weights: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    grad_y, grad_h, grad_c, x, h0, c0, batch_sizes, lengths, *weights = ctx.saved_tensors
    _, cell, bidirectional, need_x, need_state, need_weights = ctx.options
    grads = [grad_y, grad_h, grad_c]
    primals = [x, h0, c0, *weights]
    wanted = [
        gg_x if need_x else None,
        gg_h0 if need_state else None,
        gg_c0 if need_state and c0 is not None else None,
        *(gg_weights if need_weights else [None] * len(weights)),
    ]
    sequences = (batch_sizes, lengths, cell, bidirectional)
    if is_in_torch_dispatch_mode():  # traced: one node, which has no third derivative
        derived = iter(_double_backward(grads, primals, wanted, *sequences))
        result = [None if t is None else next(derived) for t in (*grads, *primals)]
    else:
        result = _second_derivative(grads, primals, wanted, *sequences, torch.is_grad_enabled())
    d_grad_y, d_grad_h, d_grad_c, d_x, d_h0, d_c0, *d_weights = result
    return (d_grad_y, d_grad_h, d_grad_c, d_x, d_h0, d_c0, d_weights, *[None] * 9)


torch.library.register_autograd(
    "fusedrnn::forward", _forward_derivative, setup_context=_forward_setup
)
torch.library.register_autograd(
    "fusedrnn::backward", _backward_derivative, setup_context=_backward_setup
)

"""The derivative of the op `backward`, computed in plain torch ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _reference
from ._checks import check_storage
from ._options import Batch, Needs, Options, batch_of
from ._saved import own

__all__ = ["second_derivative"]


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    grad_y, grad_h, grad_c, x, h0, c0, weights, _, batch_sizes, lengths, *others = inputs
    size, cell, bidirectional, need_x, need_state, need_weights, starts, c_in_y = others
    ctx.set_materialize_grads(False)
    sequences = (own(batch_sizes), own(lengths), own(starts))
    ctx.save_for_backward(grad_y, grad_h, grad_c, x, h0, c0, *sequences, *weights)
    ctx.size, ctx.options = size, Options(cell, bidirectional, c_in_y)
    ctx.needs = Needs(need_x, need_state, need_state and c0 is not None, need_weights)


def _without_autocast(tensors: Sequence[Tensor | None]) -> torch.autocast:
    """Return a context in which nothing on the device of the tensors is cast."""
    kind = next(t.device.type for t in tensors if t is not None)
    return torch.autocast("cuda" if kind == "cuda" else "cpu", enabled=False)


def _derive(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """Returns the gradient of each input for (output, gradient) pairs, None if it has none."""
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


def second_derivative(
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    batch: Batch,
    options: Options,
    create_graph: bool,
) -> list[Tensor | None]:
    """Derive the op `backward`: return the gradients of grads and primals, None if there is none.

    The function computes the layer again from x, the states and the weights in plain torch ops, and
    derives the result twice. It does not use the reserve, which autograd cannot differentiate.

    Args:
        grads: the gradients of y, h_n and c_n that `backward` was given.
        primals: x, h0, c0 and the weights.
        grad_grads: the gradients of the results of `backward`, one for each primal.
        batch: as in `_reference.layer`.
        options: as in `_reference.layer`.
        create_graph: whether the result will be differentiated once more.
    """

    def alias(t: Tensor | None) -> Tensor | None:
        # Returns another tensor to differentiate with respect to. It stays connected to t if t
        # requires grad, because a third derivative may need t.
        if t is None:
            return None
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    sequences = (batch.batch_sizes, batch.lengths, batch.starts)
    for t in (*grads, *primals, *grad_grads, *sequences):
        if t is not None:
            check_storage("a tensor that a higher derivative reads", t)
    with torch.enable_grad(), _without_autocast(primals):
        outer = [alias(g) for g in grads]
        inner = [alias(t) for t in primals]
        x, h0, c0, *weights = inner
        assert x is not None
        outputs = _reference.layer(x, h0, c0, weights, batch, options)  # type: ignore[arg-type]
        # An output depends on no input if every length is 0 and there is no state; it is left out.
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
                (f, gg.to(f.dtype))  # gg may be float32 where f has 16 bits
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
    "Tensor? lengths, str cell, bool bidirectional, Tensor? starts=None, bool c_in_y=False) "
    "-> Tensor[]",
)
def _double_backward(
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    bidirectional: bool,
    starts: Tensor | None = None,
    c_in_y: bool = False,
) -> list[Tensor]:
    """`second_derivative` as one op for traced graphs, because its loop depends on the lengths."""
    x, *_ = primals
    assert x is not None
    batch = batch_of(x, batch_sizes, lengths, starts)
    options = Options(cell, bidirectional, c_in_y)
    # torch runs the kernel of an op without autograd, which this kernel needs.
    with _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False):
        result = second_derivative(grads, primals, grad_grads, batch, options, False)
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
    grad_y, grad_h, grad_c, x, h0, c0, batch_sizes, lengths, starts, *weights = ctx.saved_tensors
    options: Options = ctx.options
    needs: Needs = ctx.needs
    grads = [grad_y, grad_h, grad_c]
    primals = [x, h0, c0, *weights]
    wanted = [
        gg_x if needs.x else None,
        gg_h0 if needs.h else None,
        gg_c0 if needs.c else None,
        *(gg_weights if needs.weights else [None] * len(weights)),
    ]
    if is_in_torch_dispatch_mode():  # traced: one op, which has no derivative of its own
        derived = iter(
            _double_backward(
                *(grads, primals, wanted, batch_sizes, lengths),
                *(options.cell, options.bidirectional, starts, options.c_in_y),
            )
        )
        result = [None if t is None else next(derived) for t in (*grads, *primals)]
    else:
        batch = Batch(batch_sizes, lengths, ctx.size, starts)
        create_graph = torch.is_grad_enabled()
        result = second_derivative(grads, primals, wanted, batch, options, create_graph)
    gradients = (*result[:6], result[6:])  # of grad_y, grad_h, grad_c, x, h0, c0 and the weights
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))


torch.library.register_autograd(
    "fusedrnn::backward", _backward_derivative, setup_context=_backward_setup
)

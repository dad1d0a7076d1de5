"""The tensors that are saved for backward, and how they are joined to the graph again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_storage
from ._library import CELLS

__all__ = ["keep", "kept", "own"]


# The hooks for saved tensors of this thread, None without any.
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _ValueOf(torch.autograd.Function):
    """The value that a tensor had in forward, or its cast: derived as the tensor itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def keep(
    ctx: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    casts: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *others: Tensor | None,
) -> None:
    """Save for backward what forward has read.

    A parameter's memory may be another by then (`p.data = ...`), so an alias stands for it, and
    backward sees the values of its forward. Aliases of weights take no memory of their own, and
    cost half as much on ctx as among the saved tensors, where hooks have to see them.
    """
    if x.requires_grad and x.is_leaf:
        x = x.detach()
    if h0 is not None and h0.requires_grad and h0.is_leaf:
        h0 = h0.detach()
    if c0 is not None and c0.requires_grad and c0.is_leaf:
        c0 = c0.detach()
    if casts is None and _hooks(False) is None:
        ctx.save_for_backward(x, h0, c0, *others)
        ctx.weights = weights, [w.data for w in weights], list(map(_version_of, weights))
    else:
        ctx.save_for_backward(x, h0, c0, *others, *(casts or [w.detach() for w in weights]))
        ctx.weights = weights, [], []


def _biases(ctx: Any, count: int) -> list[bool]:
    """Return which of a call's weights are biases, those of its one or two directions."""
    directions = 1 + getattr(ctx.options, "bidirectional", False)
    spec = CELLS[ctx.options.cell]
    parameters = spec.parameters_with(count == directions * len(spec.parameters))
    return [p.is_bias for p in parameters] * directions


def _until_derived(weight: Tensor, value: Tensor, is_bias: bool) -> Tensor:
    """Return the value of a weight for a derivative of backward, which may come much later.

    As in torch.nn a bias may change before it, and a change in place of a weight is an error: of an
    alias that has its version, where the weight still has the memory of then.
    """
    if is_bias:
        check_storage("a bias that a derivative of backward reads", value)
        return value.clone()
    return weight.detach() if weight.data_ptr() == value.data_ptr() else value


_version_of = operator.attrgetter("_version")


def kept(ctx: Any) -> Sequence[Any]:
    """Return what `keep` saved; joined to what it came from where backward is derived again."""
    weights, values, versions = ctx.weights
    saved: list[Any] = [*ctx.saved_tensors, *values]
    derived = torch.is_grad_enabled()
    for k, (w, version) in enumerate(zip(weights, versions, strict=False)):
        # A bias is read only where backward is derived.
        if w._version != version and (derived or not _biases(ctx, len(weights))[k]):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a weight or bias {list(w.shape)} is at version {w._version}; "
                f"expected version {version} instead"
            )
    if derived:
        nodes = iter(ctx.next_functions)  # one for each tensor that forward was given
        for k, t in enumerate(saved[:3]):
            if t is not None:
                node, _ = next(nodes)
                if node is not None and not t.requires_grad:  # a leaf's
                    saved[k] = _ValueOf.apply(node.variable, t)
        begin = len(saved) - len(weights)
        then: Any = saved[begin:]
        if values:
            then = map(_until_derived, weights, values, _biases(ctx, len(weights)))
        saved[begin:] = map(_ValueOf.apply, weights, then)
    return saved


torch.library.define("fusedrnn::_own", "(Tensor t) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("fusedrnn::_own", "CPU")
def _own_now(t: Tensor) -> Tensor:
    return t.clone()


@torch.library.register_fake("fusedrnn::_own")
def _own_fake(t: Tensor) -> Tensor:
    return torch.empty_like(t)


def own(t: Tensor | None) -> Tensor | None:
    """Return a copy of batch_sizes or lengths to keep for backward, None of None.

    They lie on the CPU, often in a loader's memory, which fills it again before backward. The copy
    is an op because a compiler drops a clone, or makes it in backward, when it is too late.
    """
    return None if t is None else torch.ops.fusedrnn._own(t)

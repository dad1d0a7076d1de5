"""Saves tensors for backward, and connects them to the graph again if backward is derived."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_storage
from ._library import CELLS, CellParameter

__all__ = ["own", "save_given", "saved_given"]


# Returns the hooks for saved tensors of this thread, or None if there are none.
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _ValueOf(torch.autograd.Function):
    """Returns `value`, a tensor's value in forward or its cast; its gradient goes to the tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def save_given(
    ctx: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    casts: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *others: Tensor | None,
) -> None:
    """Save for backward the tensors that forward has read.

    A leaf may get other memory before backward (`p.data = ...`). Therefore an alias of its present
    memory is saved, and backward reads the values that forward has read. Aliases of weights take no
    memory. They are stored on ctx, which takes half the time of saving them as saved tensors. They
    are saved tensors only if there are casts, or hooks for saved tensors, which must see them.
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


def _parameters_of(ctx: Any, count: int) -> list[CellParameter]:
    """Return which parameter each of a call's weights is, in one or two directions."""
    directions = 1 + getattr(ctx.options, "bidirectional", False)
    spec = CELLS[ctx.options.cell]
    parameters = spec.parameters_with(count == directions * len(spec.parameters))
    return parameters * directions


def _until_derived(weight: Tensor, value: Tensor, is_bias: bool) -> Tensor:
    """Return a weight's value for the derivative of backward, which may be computed much later.

    As in torch.nn a bias may change until then, so its value is copied. A weight that changes in
    place until then is an error. torch finds it by the version of the tensor that is returned,
    which is the weight's own version as long as the weight has the memory that forward read.
    """
    if is_bias:
        check_storage("a bias that a derivative of backward reads", value)
        return value.clone()
    return weight.detach() if weight.data_ptr() == value.data_ptr() else value


def _refuse_changed(
    ctx: Any, weights: Sequence[Tensor], versions: Sequence[int], derived: bool
) -> None:
    """Raise where a weight that backward reads was changed in place since forward."""
    parameters = _parameters_of(ctx, len(weights))
    for w, version, parameter in zip(weights, versions, parameters, strict=True):
        # Only the derivative of backward reads a bias.
        if w._version != version and (derived or not parameter.is_bias):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {parameter.name} {list(w.shape)} is at version {w._version}; "
                f"expected version {version} instead"
            )


_version_of = operator.attrgetter("_version")


def saved_given(ctx: Any) -> Sequence[Any]:
    """Return what `save_given` saved, joined to the graph again if backward is derived."""
    weights, values, versions = ctx.weights
    saved: list[Any] = [*ctx.saved_tensors, *values]
    derived = torch.is_grad_enabled()
    if versions and list(map(_version_of, weights)) != versions:
        _refuse_changed(ctx, weights, versions, derived)
    if derived:
        nodes = iter(ctx.next_functions)  # one for each tensor among the arguments of forward
        for k, t in enumerate(saved[:3]):
            if t is not None:
                node, _ = next(nodes)
                if node is not None and not t.requires_grad:  # an alias of a leaf
                    saved[k] = _ValueOf.apply(node.variable, t)
        begin = len(saved) - len(weights)
        then: Any = saved[begin:]
        if values:
            biases = (parameter.is_bias for parameter in _parameters_of(ctx, len(weights)))
            then = map(_until_derived, weights, values, biases)
        saved[begin:] = map(_ValueOf.apply, weights, then)
    return saved


torch.library.define("fusedrnn::_own", "(Tensor t) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("fusedrnn::_own", ("CPU", "CUDA"))
def _own_now(t: Tensor) -> Tensor:
    return t.clone()


@torch.library.register_fake("fusedrnn::_own")
def _own_fake(t: Tensor) -> Tensor:
    return torch.empty_like(t)


def own(t: Tensor | None) -> Tensor | None:
    """Return a copy of batch_sizes, lengths or starts to keep for backward; None for None.

    They are often in the memory of a data loader or of a rollout buffer, which may overwrite them
    before backward. The copy is an op of its own, because a compiler may remove a clone, or move it
    to backward, where it would be too late.
    """
    return None if t is None else torch.ops.fusedrnn._own(t)

"""Autocast: its dtype, and the casts of weights, which are made once per region.

torch casts a float32 parameter at its first use under autocast and keeps the cast until the
outermost region ends. Python cannot read torch's casts, nor ask whether a region is still the
same. But as long as torch keeps the cast of a tensor, the autograd node that made the cast stays
the same, and every node has a dictionary for Python. This module therefore owns a tensor, the mark,
and passes it to an op whose inputs autocast casts. Our casts are in the dictionary of the node that
cast the mark. So they live exactly as long as torch's own casts, and are freed with them.

Unlike torch, this module notices if a weight changes in place within a region: it compares the
weight's version, memory and strides. As in torch.nn, it does not notice a write that leaves the
version unchanged: one through ``.data``, or one by an optimizer with fused=True.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.compiler import is_compiling

from ._checks import check_storage

__all__ = ["autocast_dtype", "cast", "cast_weights"]

_addmm = torch.ops.aten.addmm.default._op  # the inner function, which bypasses torch function modes


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast on a device, or None if autocast is off there."""
    if not _C._is_any_autocast_enabled():  # this check is cheap; nn.RNNBase.check_input has it too
        return None
    kind = device.type
    # Some devices, such as "meta", have no autocast, and is_autocast_enabled raises for them.
    if kind != "cpu" and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Cast a floating-point tensor other than float64, as autocast does; return others as is."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        check_storage("a tensor that autocast casts", tensor)
        return tensor.to(dtype)
    return tensor


def cast_weights(weights: Sequence[Any], dtype: torch.dtype) -> list[Tensor] | None:
    """Return the weights in a 16-bit dtype, without a graph, each cast once per autocast region.

    Return None where casts may not be kept: if the call is traced or transformed, if autocast's
    cache is off, while a CUDA graph is captured, and if a weight is not a float32 parameter.
    """
    first = weights[0]
    if (
        is_compiling()
        or not torch.is_autocast_cache_enabled()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or not isinstance(first, Tensor)
        or dtype.itemsize != 2
        or (first.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    if torch.is_inference_mode_enabled():  # autograd could not use a cast that was made in it
        with torch.inference_mode(False):
            return _from_region(weights, first.device, dtype)
    return _from_region(weights, first.device, dtype)


def _from_region(
    weights: Sequence[Any], device: torch.device, dtype: torch.dtype
) -> list[Tensor] | None:
    if not _may_keep(weights[0]):
        return None
    kept = _region(device, dtype)
    casts = []
    for w in weights:
        entry = kept.get(id(w))
        if (
            entry is None
            or entry[0] is not w
            or entry[1] != w._version
            or entry[2] != w.data_ptr()
            or entry[3] != w.stride()
        ):
            if not _may_keep(w):
                return None
            check_storage("a weight that autocast casts", w)
            with torch.no_grad():
                # The entry also keeps the weight, so that no other tensor gets its id, and an alias
                # of its memory, so that new memory (`w.data = ...`) never has the same address.
                entry = w, w._version, w.data_ptr(), w.stride(), w.to(dtype), w.detach()
            kept[id(w)] = entry
        casts.append(entry[4])
    return casts


def _may_keep(w: Any) -> bool:
    """Whether a weight's version, memory and strides show that its values are unchanged."""
    return (
        (type(w) is nn.Parameter or (type(w) is Tensor and w.requires_grad))
        and w.dtype == torch.float32
        and w.is_leaf
        and w.layout == torch.strided
        and not w.is_inference()
    )


# For each device and dtype, the mark and the matrix that is multiplied in the same op.
_MARKS: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def _region(device: torch.device, dtype: torch.dtype) -> dict[int, Any]:
    """Return the dictionary that lives as long as torch's casts in this region."""
    if (device, dtype) not in _MARKS:
        # The mark is an empty matrix, so that nothing is computed.
        mark = torch.zeros(0, 0, device=device, requires_grad=True)
        _MARKS[device, dtype] = mark, torch.zeros(0, 0, device=device, dtype=dtype)
    mark, factor = _MARKS[device, dtype]
    before = torch.is_grad_enabled()
    # Without grad the cast would have no node, and torch would keep that cast.
    _C._set_grad_enabled(True)
    try:
        # addmm(matrix, a, b) saves no tensor for the gradient of the matrix.
        node = _addmm(mark, factor, factor).grad_fn.next_functions[0][0]
    finally:
        _C._set_grad_enabled(before)
    kept: dict[int, Any] = node.metadata
    return kept

"""Autocast: its dtype, and casts of weights that are made once in a region.

torch casts a float32 parameter at its first use under autocast and keeps the cast until the
outermost region ends. Python cannot reach what it keeps, nor ask whether a region is still the
same. But while torch keeps the cast of a tensor, the autograd node that made that cast stays the
same too, and a node carries a dictionary for Python. So a tensor of ours, the mark, goes through
an op that autocast casts, and our casts lie in the dictionary of the node of its cast: they are
there exactly as long as torch's own, whatever ends the region, and take no memory after it.

What torch does not see, a change in place within a region, is seen here: by the version, the
memory and the strides of a weight. Only a write that torch counts no version for is not, as in
torch.nn: through ``.data``, or by an optimizer with fused=True.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.compiler import is_compiling

from ._checks import check_storage

__all__ = ["autocast_dtype", "cast", "cast_weights"]

_addmm = torch.ops.aten.addmm.default._op  # which no torch function mode sees


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast asks for on a device, None where it is off."""
    if not _C._is_any_autocast_enabled():  # cheap, as in nn.RNNBase.check_input
        return None
    kind = device.type
    # Some devices, "meta" for one, have no autocast, and asking whether it is on raises.
    if kind != "cpu" and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Cast what autocast casts: floating tensors other than float64."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        check_storage("a tensor that autocast casts", tensor)
        return tensor.to(dtype)
    return tensor


def cast_weights(weights: Sequence[Any], dtype: torch.dtype) -> list[Tensor] | None:
    """Return the weights in a 16-bit dtype, each cast once in a region of autocast; no graph.

    None where casts are not to be kept: where the call is traced or transformed, with autocast's
    cache off, in the capture of a CUDA graph, and for weights that are no parameters in float32.
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
    if torch.is_inference_mode_enabled():  # a cast made there could not be trained with
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
                # The weight itself is kept too, so that its id remains its own, and its memory, so
                # that no other values of it (`w.data = ...`) come to lie at the same address.
                entry = w, w._version, w.data_ptr(), w.stride(), w.to(dtype), w.detach()
            kept[id(w)] = entry
        casts.append(entry[4])
    return casts


def _may_keep(w: Any) -> bool:
    """Whether what is known of a weight tells that its values are the same as before."""
    return (
        (type(w) is nn.Parameter or (type(w) is Tensor and w.requires_grad))
        and w.dtype == torch.float32
        and w.is_leaf
        and w.layout == torch.strided
        and not w.is_inference()
    )


# For each device and dtype, the mark and a factor for the product with it.
_MARKS: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def _region(device: torch.device, dtype: torch.dtype) -> dict[int, Any]:
    """Return the dictionary that lives as long as torch's casts of this region."""
    if (device, dtype) not in _MARKS:
        # Without an element, so that nothing is computed.
        mark = torch.zeros(0, 0, device=device, requires_grad=True)
        _MARKS[device, dtype] = mark, torch.zeros(0, 0, device=device, dtype=dtype)
    mark, factor = _MARKS[device, dtype]
    before = torch.is_grad_enabled()
    # torch keeps a cast that it made without grad, which has no node.
    _C._set_grad_enabled(True)
    try:
        # The sum of a matrix and a product saves nothing for the gradient of the matrix.
        node = _addmm(mark, factor, factor).grad_fn.next_functions[0][0]
    finally:
        _C._set_grad_enabled(before)
    kept: dict[int, Any] = node.metadata
    return kept

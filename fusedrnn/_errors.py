"""The exceptions that torch has for what an op can only say in words."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

__all__ = ["FROM_OPS", "NO_FORWARD_MODE", "as_torch_raises", "refuse_dual"]

# What an op raises: the engine on a GPU knows no torch, and what it throws is a ValueError.
FROM_OPS = (RuntimeError, ValueError)

NO_FORWARD_MODE = (
    "fusedrnn: forward-mode AD is not supported; use reverse mode (torch.autograd.grad)"
)


def as_torch_raises(error: Exception) -> Exception:
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


def refuse_dual(tensors: Iterable[Tensor | None]) -> None:
    """Raises where a tensor carries a tangent of forward-mode AD."""
    # A compiled function would lose tangents without a word, and shows none while it is traced.
    if is_compiling() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(NO_FORWARD_MODE)

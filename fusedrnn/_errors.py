"""Turns errors of the ops into the exceptions that torch raises in the same case.

The code of the ops can only raise a RuntimeError with a message. For some errors the message ends
with a tag. This module recognises the tag and removes it, so that the user does not see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

__all__ = [
    "MEMORY_TAG",
    "NO_FORWARD_MODE",
    "REGIME_TAG",
    "as_torch_raises",
    "refuse_dual",
    "refuses_regime",
]

# The tags are the same as in csrc/torch/error_tags.h.
REGIME_TAG = " [fusedrnn:regime]"
MEMORY_TAG = " [fusedrnn:memory]"

NO_FORWARD_MODE = (
    "fusedrnn: forward-mode AD is not supported; use reverse mode (torch.autograd.grad)"
)


def as_torch_raises(
    error: RuntimeError, tensors: Iterable[Tensor | None], on_cpu: Sequence[Tensor | None] = ()
) -> Exception:
    """Return the exception that torch would raise for an error of an op.

    Args:
        error: the exception that the op raised.
        tensors: the tensors of the call that must be on one device.
        on_cpu: the tensors of the call that must be on the CPU.

    Returns:
        A torch.OutOfMemoryError for a lack of GPU memory; a RuntimeError for tensors on different
        devices or with different layouts, for which torch finds no kernel; otherwise the error,
        without its tag.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return error
    text = str(error)
    if text.endswith(MEMORY_TAG):
        text = text.removesuffix(MEMORY_TAG)
        return torch.OutOfMemoryError(f"{text}. A smaller batch or shorter sequences need less.")
    if text.endswith(REGIME_TAG):
        refused = RuntimeError(text.removesuffix(REGIME_TAG))
        refused.fusedrnn_tag = REGIME_TAG  # type: ignore[attr-defined]
        return refused
    if isinstance(error, NotImplementedError):
        places = {(t.device, t.layout) for t in tensors if t is not None}
        if len(places) > 1 or any(t is not None and not t.is_cpu for t in on_cpu):
            return RuntimeError(
                "fusedrnn: the tensors of a call must be on one device, also those that a hook "
                f"for saved tensors gives back to backward: {error}"
            )
    return error


def refuses_regime(error: BaseException) -> bool:
    """Whether an error says that the regime that was asked for cannot run."""
    return getattr(error, "fusedrnn_tag", "") == REGIME_TAG


def refuse_dual(tensors: Iterable[Tensor | None]) -> None:
    """Raises NotImplementedError if a tensor has a tangent of forward-mode AD."""
    # While a function is traced no tangents are visible, and the compiled function would lose them
    # silently, so every trace under forward-mode AD is refused.
    if is_compiling() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(NO_FORWARD_MODE)

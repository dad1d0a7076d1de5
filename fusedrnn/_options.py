"""The records in which a call's sequences and options travel, from the layers to the ops and back.

Each goes whole through every function and is read by name. An option that is added later is a field
with a default at the end of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch", "Grads", "Needs", "Options", "Saved", "StepOptions", "batch_of"]


class Batch(NamedTuple):
    """The sequences of a call.

    Attributes:
        batch_sizes: int64 [T] on the CPU, as in a PackedSequence, where x is packed rows [S, I].
        lengths: int64 [N] on the CPU, any order, each in [0, T], where x [T, N, I] is padded.
        size: N.
    """

    batch_sizes: Tensor | None
    lengths: Tensor | None
    size: int


class Options(NamedTuple):
    """The options of a layer.

    Attributes:
        cell: a key of `fusedrnn._library.CELLS`.
        bidirectional: two directions (D = 2), the second from each sequence's own end.
    """

    cell: str
    bidirectional: bool = False


class StepOptions(NamedTuple):
    """The options of a cell's single step, and the sizes that its weights must have."""

    input_size: int
    hidden_size: int
    cell: str


class Needs(NamedTuple):
    """Which gradients are wanted: of x, h0, c0, and of any weight."""

    x: bool
    h: bool
    c: bool
    weights: bool

    @property
    def state(self) -> bool:
        """Whether the gradient of a state is wanted."""
        return self.h or self.c


class Grads(NamedTuple):
    """The gradients of y, h_n and c_n that reached backward; None for zeros."""

    y: Tensor | None
    h: Tensor | None
    c: Tensor | None


class Saved(NamedTuple):
    """The values that backward reads of its forward, as the ops take them."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    batch: Batch
    reserve: Tensor


def batch_of(x: Tensor, batch_sizes: Tensor | None = None, lengths: Tensor | None = None) -> Batch:
    """Returns the record for a call whose N is not known otherwise."""
    N = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    return Batch(batch_sizes, lengths, N)

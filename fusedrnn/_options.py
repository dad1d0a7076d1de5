"""The records that carry the sequences and options of a call from the layers to the ops.

Functions pass a record on as a whole and read its fields by name. A new option is added as a field
with a default at the end of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch", "Grads", "Needs", "Options", "Saved", "StepOptions", "batch_of"]


class Batch(NamedTuple):
    """The sequences of a call.

    Attributes:
        batch_sizes: int64 [T] on the CPU, as in a PackedSequence, if x is packed rows [S, I].
        lengths: int64 [N] on the CPU, in any order, each in [0, T], if x is padded [T, N, I].
        size: N.
        starts: bool on the device of x, [T, N] or [S] for packed rows: whether a sequence begins at
            a step, so that no state comes from before it.
    """

    batch_sizes: Tensor | None
    lengths: Tensor | None
    size: int
    starts: Tensor | None = None


class Options(NamedTuple):
    """The options of a layer.

    Attributes:
        cell: a key of `fusedrnn._library.CELLS`.
        bidirectional: whether there are two directions (D = 2); the second begins at each
            sequence's own end.
        c_in_y: whether y also has c after every step, D*H features behind those of h.
    """

    cell: str
    bidirectional: bool = False
    c_in_y: bool = False


class StepOptions(NamedTuple):
    """The options of one step of a cell: the sizes that the weights must have, and the cell."""

    input_size: int
    hidden_size: int
    cell: str


class Needs(NamedTuple):
    """The gradients that are wanted: of x, of h0, of c0, and of at least one weight."""

    x: bool
    h: bool
    c: bool
    weights: bool

    @property
    def state(self) -> bool:
        """Whether the gradient of h0 or of c0 is wanted."""
        return self.h or self.c


class Grads(NamedTuple):
    """The gradients of y, h_n and c_n that backward receives; None means zeros."""

    y: Tensor | None
    h: Tensor | None
    c: Tensor | None


class Saved(NamedTuple):
    """The arguments and results of forward that backward reads, in the form that the ops take."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    batch: Batch
    reserve: Tensor


def batch_of(
    x: Tensor,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
) -> Batch:
    """Returns the record for a call, with N from x [T, N, I] or from batch_sizes."""
    N = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    return Batch(batch_sizes, lengths, N, starts)

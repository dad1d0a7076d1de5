"""Nested tensors of layout jagged: [N, j, I], where the N sequences have lengths of their own.

Their values are the rows of all sequences one after another. Here they are brought into the order
of packed data and back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Jagged", "is_jagged", "read_jagged", "rows_of_jagged_starts"]


class Jagged(NamedTuple):
    """The sequences of a jagged tensor.

    Attributes:
        values: the rows of all sequences, and perhaps others that belong to none.
        offsets: [N + 1], where the sequences begin in rows of the result, which has no others.
        rows: [S], the row of `values` for each row in packed order.
        inverse: [S], the row in packed order for each row of the result.
        order: the sequences that are not empty, the longest first.
        batch_sizes: int64 [T] on the CPU, as in a PackedSequence of these sequences.
        lengths: the lengths of all N sequences.
    """

    values: Tensor
    offsets: Tensor
    rows: Tensor
    inverse: Tensor
    order: Tensor
    batch_sizes: Tensor
    lengths: list[int]

    def nested(self, rows: Tensor) -> Tensor:
        """Returns rows in the order of the result as a jagged tensor."""
        least, most = min(self.lengths, default=0), max(self.lengths, default=0)
        return torch.nested.nested_tensor_from_jagged(
            rows, self.offsets, min_seqlen=least, max_seqlen=most
        )

    def unpacked(self, packed: Tensor, dim: int) -> Tensor:
        """Returns packed rows in the order of the result, one sequence after another."""
        return packed.index_select(dim, self.inverse)

    def all_states(self, state: Tensor, initial: Tensor | None) -> Tensor:
        """Returns states [.., N, ..] of all sequences; an empty one keeps its initial state."""
        if initial is None:
            initial = state.new_zeros(state.shape[0], len(self.lengths), state.shape[2])
        return initial.index_copy(1, self.order, state)


def is_jagged(t: Any) -> bool:
    """Whether t is a nested tensor of layout jagged."""
    return isinstance(t, Tensor) and t.is_nested and t.layout is torch.jagged


def read_jagged(name: str, t: Any, dim: int) -> Jagged:
    """Reads a jagged tensor [N, j, ..] of `dim` dimensions.

    On a GPU the host waits for the offsets.

    Raises:
        ValueError: a tensor with another number of dimensions, or ragged in another one.
        RuntimeError: sequences that are not within the rows of the tensor.
        NotImplementedError: in a compiled graph, whose shapes would depend on the offsets.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} must be a dense or packed tensor in a compiled graph, got a nested one; give "
            "a padded batch with lengths="
        )
    if t.dim() != dim or t._ragged_idx != 1:
        sizes = "[N, j, I]" if dim == 3 else "[N, j]"
        raise ValueError(
            f"{name} must be a nested tensor {sizes} whose dimension 1 is ragged, got one of "
            f"{t.dim()} dimensions whose dimension {t._ragged_idx} is ragged"
        )
    values, offsets = t.values(), t.offsets()
    bounds = offsets.to(device="cpu", dtype=torch.int64)
    begins, lengths = bounds[:-1], bounds.diff()
    if t.lengths() is not None:  # there is space between the sequences
        lengths = t.lengths().to(device="cpu", dtype=torch.int64)
    bad = ((begins < 0) | (lengths < 0) | (begins + lengths > values.shape[0])).nonzero()
    if len(bad):
        n = int(bad[0])
        raise RuntimeError(
            f"{name} must have its sequences within its {values.shape[0]} rows, got sequence {n} "
            f"from row {int(begins[n])} on with length {int(lengths[n])}"
        )
    own = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # bounds in the result
    if not torch.equal(own, bounds) or int(own[-1]) != values.shape[0]:
        offsets = own.to(offsets)

    in_order, order = lengths.sort(descending=True, stable=True)
    live = in_order[in_order > 0]
    order = order[: len(live)]
    # For each row, sequence by sequence with the longest first: its sequence and its step.
    rank = torch.arange(len(live), device="cpu").repeat_interleave(live)
    step = torch.arange(len(rank), device="cpu") - (live.cumsum(0) - live)[rank]
    batch_sizes = step.bincount()  # how many sequences have a step
    packed = (batch_sizes.cumsum(0) - batch_sizes)[step] + rank
    rows, inverse = torch.empty_like(packed), torch.empty_like(packed)
    rows[packed] = begins[order][rank] + step
    inverse[own[order][rank] + step] = packed
    return Jagged(
        values,
        offsets,
        rows.to(values.device),
        inverse.to(values.device),
        order.to(values.device),
        batch_sizes,
        lengths.tolist(),
    )


def rows_of_jagged_starts(starts: Any, jagged: Jagged) -> Tensor:
    """Checks the ``starts`` of a jagged input; returns them in packed order, [S]."""
    if not is_jagged(starts):
        raise TypeError(
            "starts must be a nested tensor [N, j] of layout jagged for such an input, got "
            f"{type(starts).__name__}"
        )
    own = read_jagged("starts", starts, 2)
    if own.lengths != jagged.lengths:
        raise RuntimeError(
            f"starts must have the lengths of the input, {jagged.lengths}, got {own.lengths}"
        )
    if own.values.device != jagged.values.device:
        raise RuntimeError(
            "Input and starts tensors are not at the same device, found input tensor at "
            f"{jagged.values.device} and starts tensor at {own.values.device}"
        )
    return own.values.index_select(0, jagged.rows)

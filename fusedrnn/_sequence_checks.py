"""The checks of what a call says about its sequences: lengths, batch_sizes and starts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._checks import check_storage

__all__ = ["Lengths", "Starts", "as_lengths", "as_starts", "own_batch_sizes", "rows_of_starts"]


class _Array(Protocol):
    """A numpy array, for annotations, because numpy may not be installed."""

    def tolist(self) -> Any: ...


Lengths = Tensor | Sequence[SupportsIndex] | _Array | None
Starts = Tensor | PackedSequence | None


def own_batch_sizes(batch_sizes: Any, rows: int) -> tuple[Tensor, int]:
    """Checks the batch_sizes of a PackedSequence with `rows` rows; returns a copy of them, and N.

    The copy is for backward, which later changes of batch_sizes must not affect, as in torch.nn.
    """
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes must be a Tensor, got {type(batch_sizes).__name__}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise RuntimeError(
            f"batch_sizes must be a 1-D int64 tensor on the CPU, got {batch_sizes.dim()}-D "
            f"{batch_sizes.dtype} on {batch_sizes.device}"
        )
    check_storage("batch_sizes", batch_sizes)
    own = batch_sizes.clone()
    sizes: list[int] = own.tolist()
    if not sizes:
        raise IndexError("batch_sizes must hold at least one step, got none")
    if sizes[-1] < 1 or any(a < b for a, b in pairwise(sizes)):
        raise RuntimeError(f"batch_sizes must be at least 1 and never grow, got {sizes}")
    if sum(sizes) != rows:
        raise RuntimeError(
            f"batch_sizes must sum to the number of rows of the packed data, {rows}, "
            f"got {sum(sizes)}"
        )
    return own, sizes[0]


def as_lengths(lengths: Any, T: int, N: int) -> Tensor:
    """Checks ``lengths`` and returns them as an int64 tensor [N] on the CPU.

    It takes everything that torch.nn.utils.rnn.pack_padded_sequence takes, except numbers that are
    not whole. If grad is enabled the result is a copy, so that later changes of ``lengths``, such
    as those of a data loader that reuses its memory, do not affect backward. While a graph is
    compiled, the values are unknown; the op checks them when it runs.
    """
    if isinstance(lengths, Tensor) and not lengths.is_cpu:
        raise RuntimeError(f"lengths must be on the CPU, got {lengths.dtype} on {lengths.device}")
    if isinstance(lengths, Tensor):
        check_storage("lengths", lengths)
    own: Tensor | None = None
    values: list[int] = []
    if torch.compiler.is_compiling():
        own = _lengths_in_graph(lengths)
    elif isinstance(lengths, Tensor) and lengths.dtype == torch.int64:
        own = lengths.clone() if torch.is_grad_enabled() else lengths  # no backward reads them
        values = own.tolist()
    else:
        values = _whole_numbers(lengths)
    shape = [len(values)] if own is None else list(own.shape)
    if shape != [N]:
        raise RuntimeError(f"lengths must be [N] = [{N}], got {shape}")
    if values and not (min(values) >= 0 and max(values) <= T):
        row, length = next((n, v) for n, v in enumerate(values) if not 0 <= v <= T)
        raise RuntimeError(f"lengths[{row}] must be in [0, T] = [0, {T}], got {length}")
    # The tensor is made after the check, because a number out of range may not fit into int64.
    return torch.tensor(values, dtype=torch.int64, device="cpu") if own is None else own


def _whole_numbers(lengths: Any) -> list[int]:
    """Returns the numbers of a list, an array or a tensor as ints; they must be whole."""
    values = lengths
    if hasattr(lengths, "tolist"):  # numpy's arrays, tensors, and arrays of Python's module array
        values = lengths.tolist()
    elif isinstance(lengths, Sequence) and not isinstance(lengths, (str, bytes)):
        values = list(lengths)
    if not isinstance(values, list):
        raise TypeError(
            "lengths must be a list, an array or a tensor of whole numbers, got "
            f"{type(lengths).__name__}"
        )
    return [v if type(v) is int else _whole_number(v) for v in values]


def _whole_number(length: Any) -> int:
    number = length
    try:
        if hasattr(number, "item"):  # a number of numpy or a tensor
            number = number.item()
        if isinstance(number, float) and number.is_integer():
            return int(number)
        if not isinstance(number, bool):
            return operator.index(number)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"lengths must hold a whole number for each sequence, got {length!r}")


def _lengths_in_graph(lengths: Any) -> Tensor:
    """Does the same while a graph is compiled. Floats are refused, as they may not be whole."""
    if not isinstance(lengths, Tensor):
        if isinstance(lengths, Sequence):
            bad = [v for v in lengths if not isinstance(v, int) or isinstance(v, bool)]
            if bad:
                raise TypeError(f"lengths must hold ints in a compiled graph, got {bad[0]!r}")
            return torch.tensor(list(lengths), dtype=torch.int64, device="cpu")
        lengths = torch.as_tensor(lengths, device="cpu")
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise RuntimeError(f"lengths must be integers in a compiled graph, got {dtype}")
    return lengths if dtype == torch.int64 else lengths.to(torch.int64)


def rows_of_starts(starts: Any, packed: PackedSequence) -> Tensor:
    """Checks the ``starts`` of a PackedSequence, and returns their rows [S]."""
    if not isinstance(starts, PackedSequence):
        raise TypeError(
            "starts must be a PackedSequence for packed input, got "
            f"{type(starts).__name__}; pack it with the same lengths, or give the rows of its data"
            " with batch_sizes to a function of fusedrnn.functional"
        )
    if not torch.compiler.is_compiling():
        own, others = packed.batch_sizes.tolist(), starts.batch_sizes.tolist()
        if own != others:
            raise RuntimeError(
                f"starts must have the batch_sizes of the input, {own}, got {others}"
            )
        order = [packed.sorted_indices, starts.sorted_indices]
        # On a GPU the host would have to wait for the indices, so they are not compared there.
        if all(indices is None or indices.is_cpu for indices in order):
            first, second = ([] if k is None else k.tolist() for k in order)
            unsorted = list(range(own[0] if own else 0))
            if (first or unsorted) != (second or unsorted):
                raise RuntimeError(
                    "starts must have the sequences in the order of the input, sorted_indices "
                    f"{first or None}, got {second or None}"
                )
    return starts.data


def as_starts(starts: Any, letters: str, shape: Sequence[int], x: Tensor) -> Tensor:
    """Checks ``starts`` and returns them.

    If grad is enabled the result is a copy, so that later changes of ``starts``, such as those of a
    rollout buffer that is filled again, do not affect backward.

    Args:
        starts: what the caller gave.
        letters: the sizes of `shape` in letters, for messages.
        shape: the sizes that starts must have.
        x: the input, on whose device starts must be.
    """
    if not isinstance(starts, Tensor):
        raise TypeError(f"starts must be a bool Tensor, got {type(starts).__name__}")
    if starts.is_nested:
        raise RuntimeError(
            f"starts must be a dense tensor [{letters}] = {list(shape)} for such an input, got a "
            "nested one"
        )
    if starts.dtype != torch.bool:
        raise RuntimeError(f"starts must be bool, got {starts.dtype}; give starts.bool()")
    if list(starts.shape) != list(shape):
        raise RuntimeError(f"starts must be [{letters}] = {list(shape)}, got {list(starts.shape)}")
    if starts.device != x.device:
        raise RuntimeError(
            "Input and starts tensors are not at the same device, found input tensor at "
            f"{x.device} and starts tensor at {starts.device}"
        )
    if starts.layout is not torch.strided:
        raise RuntimeError(f"starts must be a dense tensor, got layout {starts.layout}")
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return starts
    check_storage("starts", starts)
    return starts.clone()

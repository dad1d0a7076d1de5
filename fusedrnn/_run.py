"""Checks and runs the call of a stack of layers, for functions and modules alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _ops
from ._autocast import autocast_dtype, cast, cast_weights
from ._checks import (
    as_dense,
    as_lengths,
    check_flags,
    check_kernels,
    check_rank,
    check_state,
    check_storage,
    check_weights,
    letters_of,
    own_batch_sizes,
    weight_names,
)
from ._library import CELLS
from ._options import Batch, Options

__all__ = ["run_layers", "sizes_of"]


def sizes_of(
    cells: Sequence[str], weights: Sequence[Any], num_layers: int, bias: bool, bidirectional: bool
) -> tuple[str, tuple[int, int, int]]:
    """Returns which of `cells` the weights belong to, and (I, H, P), which it reads from them.

    It is the first cell whose parameters have the number and the ranks of the weights, or else the
    first whose parameters have their number.
    """
    check_flags(bias, False, bidirectional)
    if num_layers <= 0:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    directions = 2 if bidirectional else 1
    one, odd = divmod(len(weights), num_layers * directions)
    cell = _cell_of(cells, weights[:one], bias)
    spec = CELLS[cell]
    parameters = spec.parameters_with(bias)
    if odd or one != len(parameters):
        raise RuntimeError(
            f"weights must hold {', '.join(p.name for p in parameters)} for each of {num_layers} "
            f"layers and {directions} directions, {num_layers * directions * len(parameters)} "
            f"tensors, got {len(weights)}"
        )
    first = dict(zip(weight_names(cell, 1, 1, bias), weights, strict=False))
    for (name, w), parameter in zip(first.items(), parameters, strict=True):
        if not isinstance(w, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(w).__name__}")
        if w.dim() != len(parameter.sizes):
            shape = letters_of(cell, parameter)
            raise RuntimeError(f"{name} must be [{shape}], got {list(w.shape)}")
    rows, I = first["weight_ih_l0"].shape
    H = rows // spec.gates
    return cell, (I, H, first["weight_hr_l0"].shape[0] if spec.projects else H)


def _cell_of(cells: Sequence[str], weights: Sequence[Any], bias: bool) -> str:
    """Returns the first of `cells` whose parameters fit these weights of one direction."""
    forms = {cell: [len(p.sizes) for p in CELLS[cell].parameters_with(bias)] for cell in cells}
    ranks = [w.dim() if isinstance(w, Tensor) else None for w in weights]
    for fits in (lambda form: form == ranks, lambda form: len(form) == len(ranks)):
        for cell, form in forms.items():
            if fits(form):
                return cell
    return cells[0]


def run_layers(
    cell: str,
    sizes: tuple[int, int, int],
    input: Any,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bias: bool,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Any,
) -> tuple[Any, Tensor, Tensor | None]:
    """Checks a call and runs its layers. All functions and modules call this.

    The arguments are those of `fusedrnn.functional.lstm`, except that ``sizes`` is (I, H, P), which
    the weights must have, and that ``dropout`` must be 0 outside of training.
    """
    check_flags(bias, batch_first, bidirectional)
    directions = 2 if bidirectional else 1
    given: Any = None  # the input if it is a PackedSequence
    sorted_indices: Tensor | None = None
    if isinstance(input, PackedSequence):
        if batch_sizes is not None:
            raise ValueError("batch_sizes must be None with a PackedSequence, which has its own")
        given = input
        input, batch_sizes, sorted_indices, _ = given
    if not isinstance(input, Tensor):
        raise AttributeError(
            f"input must be a Tensor or a PackedSequence, got {type(input).__name__}"
        )
    if input.layout is not torch.strided or input.is_nested:
        input = as_dense("input", input)
    rank = input.dim()
    if batch_sizes is None:
        if rank != 3 and rank != 2:
            raise ValueError(f"{_kind(cell)}: Expected input to be 2D or 3D, got {rank}D instead")
        if lengths is not None and rank == 2:
            raise ValueError("lengths must be None for unbatched 2-D input, which has one length T")
    else:
        if rank != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {rank}")
        if lengths is not None:
            raise ValueError("lengths must be None with a PackedSequence, which has its own")
    unbatched = rank == 2 and batch_sizes is None
    has_state = h0 is not None or c0 is not None
    has_c = CELLS[cell].has_c
    if has_state:
        check_rank(not unbatched, h0, c0, has_c)
        h0 = None if h0 is None else as_dense("hidden[0]" if has_c else "hidden", h0)
        c0 = None if c0 is None else as_dense("hidden[1]", c0)

    device = input.device
    casts: list[Tensor] | None = None
    autocast = autocast_dtype(device)
    if autocast is not None:
        input, h0, c0 = cast(input, autocast), cast(h0, autocast), cast(c0, autocast)
        casts = cast_weights(weights, autocast)
        if casts is None:
            weights = [cast(w, autocast) for w in weights]
    # torch.nn checks the dtype first, with a ValueError, unless autocast is on.
    mismatch = ValueError if autocast is None else RuntimeError
    check_weights(cell, sizes, num_layers, directions, bias, casts or weights, input, mismatch)
    check_kernels(input)
    I, H, P = sizes
    if input.shape[-1] != I:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {I}, got {input.size(-1)}"
        )

    x = input
    if batch_sizes is not None:
        if not torch.compiler.is_compiling():
            batch_sizes, N = own_batch_sizes(batch_sizes, x.shape[0])
        elif sorted_indices is not None:
            N = sorted_indices.shape[0]
        else:
            N = int(batch_sizes[0]) if h0 is None else h0.shape[1]
    else:
        if unbatched:
            x = x.unsqueeze(1)
            if has_state:
                h0 = None if h0 is None else h0.unsqueeze(1)
                c0 = None if c0 is None else c0.unsqueeze(1)
        elif batch_first:
            x = x.transpose(0, 1)
        T, N, _ = x.shape
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got T = 0")
        if lengths is not None:
            lengths = as_lengths(lengths, T, N)
    if has_state:
        dtype = input.dtype
        rows = num_layers * directions
        if h0 is not None:
            check_state("hidden[0]" if has_c else "hidden", h0, (rows, N, P), dtype, device)
        if c0 is not None:
            check_state("hidden[1]", c0, (rows, N, H), dtype, device)
        if sorted_indices is not None:
            for name, state in (("h_0", h0), ("c_0", c0)):
                if state is not None:
                    check_storage(name, state)
            h0 = None if h0 is None else h0.index_select(1, sorted_indices)
            c0 = None if c0 is None else c0.index_select(1, sorted_indices)

    batch = Batch(batch_sizes, lengths, N)
    options = Options(cell, bidirectional)
    if num_layers == 1:
        y, h_n, c_n = _ops.layer(x, h0, c0, weights, batch, options, casts)
    else:
        y, h_n, c_n = _stack(x, h0, c0, weights, batch, options, casts, num_layers, dropout)

    if given is not None:
        _, batch_sizes, sorted_indices, unsorted_indices = given
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), h_n, c_n
    if unbatched:
        return y.squeeze(1), h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
    return y.transpose(0, 1) if batch_first and batch_sizes is None else y, h_n, c_n


def _stack(
    x: Tensor,
    h0: Tensor | None,  # [L*D, N, P]
    c0: Tensor | None,  # [L*D, N, H]
    weights: Sequence[Tensor],
    batch: Batch,
    options: Options,
    casts: Sequence[Tensor] | None,  # as in `_ops.layer`
    num_layers: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs the layers one after another, with dropout between them; results as in `_ops.layer`."""
    directions = 2 if options.bidirectional else 1

    def of_layer(states: Tensor | None, layer: int) -> Tensor | None:
        # Not split: onnx's converter cannot write its operator for opsets before 18.
        return None if states is None else states.narrow(0, layer * directions, directions)

    k = len(weights) // num_layers
    h_out: list[Tensor] = []
    c_out: list[Tensor] = []
    for layer in range(num_layers):
        if layer > 0 and dropout != 0:
            x = F.dropout(x, dropout, training=True)
        own = slice(layer * k, (layer + 1) * k)
        w, cast_w = weights[own], None if casts is None else casts[own]
        h, c = of_layer(h0, layer), of_layer(c0, layer)
        x, h_n, c_n = _ops.layer(x, h, c, w, batch, options, cast_w)
        h_out.append(h_n)
        if c_n is not None:
            c_out.append(c_n)
    return x, torch.cat(h_out), torch.cat(c_out) if c_out else None


def _kind(cell: str) -> str:
    """The name of torch.nn's class in its messages, which is the first word of the cell's name."""
    return cell.partition("_")[0].upper()

"""Checks and runs the call of a stack of layers, for functions and modules alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _ops
from ._autocast import autocast_dtype, cast, cast_weights
from ._checks import (
    as_dense,
    check_bool,
    check_flags,
    check_kernels,
    check_rank,
    check_state,
    check_storage,
    check_weights,
    letters_of,
    weight_names,
)
from ._jagged import is_jagged, read_jagged, rows_of_jagged_starts
from ._library import CELLS
from ._options import Batch, Options
from ._sequence_checks import as_lengths, as_starts, own_batch_sizes, rows_of_starts

__all__ = ["StatesOfSteps", "run_layers", "sizes_of"]


class StatesOfSteps(NamedTuple):
    """The states of every layer after every step.

    Attributes:
        h: [L, T, N, D*P], the output of each layer in the form of y; rows [L, S, D*P] if packed.
        c: the same for c, [L, T, N, D*H]; None for cells without c.
    """

    h: Tensor
    c: Tensor | None


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
    starts: Any,
    return_states: Any,
) -> tuple[Any, Tensor, Tensor | None, StatesOfSteps | None]:
    """Checks a call and runs its layers. All functions and modules call this.

    The arguments are those of `fusedrnn.functional.lstm`, except that ``sizes`` is (I, H, P), which
    the weights must have, and that ``dropout`` must be 0 outside of training. Returns y, h_n, c_n
    (None for cells without c) and, with ``return_states``, the states of every step.
    """
    check_flags(bias, batch_first, bidirectional)
    if return_states is not False:
        check_bool("return_states", return_states)
    directions = 2 if bidirectional else 1
    given: Any = None  # the input if it is a PackedSequence
    sorted_indices: Tensor | None = None
    if isinstance(input, PackedSequence):
        if batch_sizes is not None:
            raise ValueError("batch_sizes must be None with a PackedSequence, which has its own")
        given = input
        input, batch_sizes, sorted_indices, _ = given
        if starts is not None:
            starts = rows_of_starts(starts, given)
    if not isinstance(input, Tensor):
        raise AttributeError(
            f"input must be a Tensor or a PackedSequence, got {type(input).__name__}"
        )
    if input.layout is not torch.strided or input.is_nested:
        if is_jagged(input):
            if lengths is not None or batch_sizes is not None:
                name = "batch_sizes" if lengths is None else "lengths"
                raise ValueError(f"{name} must be None with a nested tensor, which has its own")
            return _run_jagged(
                *(cell, sizes, input, h0, c0, weights, starts, return_states),
                num_layers=num_layers,
                bias=bias,
                dropout=dropout,
                bidirectional=bidirectional,
            )
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
    if starts is not None:
        starts = _check_starts(starts, input, unbatched, batch_sizes is not None, batch_first)
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

    batch = Batch(batch_sizes, lengths, N, starts)
    options = Options(cell, bidirectional, has_c and return_states)
    states: StatesOfSteps | None = None
    if return_states:
        outputs: list[tuple[Tensor, Tensor | None]] = []  # of each layer, in every step
        width = directions * P
        y, h_n, c_n = _stack(
            x, h0, c0, weights, batch, options, casts, num_layers, dropout, (width, outputs)
        )
        states = _states_of_steps(outputs)
    elif num_layers == 1:
        y, h_n, c_n = _ops.layer(x, h0, c0, weights, batch, options, casts)
    else:
        y, h_n, c_n = _stack(x, h0, c0, weights, batch, options, casts, num_layers, dropout)

    if given is not None:
        _, batch_sizes, sorted_indices, unsorted_indices = given
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), h_n, c_n, states
    if unbatched:
        c_n = None if c_n is None else c_n.squeeze(1)
        return y.squeeze(1), h_n.squeeze(1), c_n, _each(states, lambda t: t.squeeze(2))
    if batch_first and batch_sizes is None:
        return y.transpose(0, 1), h_n, c_n, _each(states, lambda t: t.transpose(1, 2))
    return y, h_n, c_n, states


def _run_jagged(
    cell: str,
    sizes: tuple[int, int, int],
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    starts: Any,
    return_states: bool,
    **options: Any,
) -> tuple[Any, Tensor, Tensor | None, StatesOfSteps | None]:
    """Runs the layers over a nested tensor of layout jagged; y has the same sequences.

    The arguments are those of `run_layers`, with num_layers, bias, dropout and bidirectional among
    the options.
    """
    jagged = read_jagged("input", input, 3)
    if starts is not None:
        starts = as_starts(rows_of_jagged_starts(starts, jagged), "S", jagged.rows.shape, input)
    if h0 is not None or c0 is not None:
        has_c = CELLS[cell].has_c
        check_rank(True, h0, c0, has_c)
        LD = options["num_layers"] * (2 if options["bidirectional"] else 1)
        N = len(jagged.lengths)
        for name, state, width in (("hidden[0]", h0, sizes[2]), ("hidden[1]", c0, sizes[1])):
            if state is not None:  # the other checks are those of a dense call
                shape = (LD, N, width)
                check_state(name if has_c else "hidden", state, shape, state.dtype, state.device)
    options |= {"batch_first": False, "return_states": return_states}
    if len(jagged.order) == 0:  # there is no row, only initial states that become final ones
        x = jagged.values.new_zeros(1, len(jagged.lengths), jagged.values.shape[-1])
        y, h_n, c_n, states = run_layers(
            *(cell, sizes, x, h0, c0, weights),
            batch_sizes=None,
            lengths=[0] * len(jagged.lengths),
            starts=None,
            **options,
        )
        return (
            jagged.nested(y.flatten(0, 1)[:0]),
            h_n,
            c_n,
            _each(states, lambda t: t.flatten(1, 2)[:, :0]),
        )

    def of_live(state: Tensor | None) -> Tensor | None:
        return None if state is None else state.index_select(1, jagged.order)

    y, h_n, c_n, states = run_layers(
        *(cell, sizes, jagged.values.index_select(0, jagged.rows), of_live(h0), of_live(c0)),
        weights,
        batch_sizes=jagged.batch_sizes,
        lengths=None,
        starts=starts,
        **options,
    )
    if h0 is not None and h0.dtype != h_n.dtype:  # under autocast
        h0 = h0.to(h_n.dtype)
        c0 = None if c0 is None else c0.to(h_n.dtype)
    return (
        jagged.nested(jagged.unpacked(y, 0)),
        jagged.all_states(h_n, h0),
        None if c_n is None else jagged.all_states(c_n, c0),
        _each(states, lambda t: jagged.unpacked(t, 1)),
    )


def _check_starts(
    starts: Any, input: Tensor, unbatched: bool, packed: bool, batch_first: bool
) -> Tensor:
    """Checks starts in the form of the input; returns [T, N], or [S] for packed rows."""
    form = "S" if packed else "T" if unbatched else "N, T" if batch_first else "T, N"
    starts = as_starts(starts, form, input.shape[:-1], input)
    if unbatched:
        return starts.unsqueeze(1)
    return starts.transpose(0, 1) if batch_first and not packed else starts


def _states_of_steps(outputs: Sequence[tuple[Tensor, Tensor | None]]) -> StatesOfSteps:
    h = torch.stack([h for h, _ in outputs])
    c = [c for _, c in outputs if c is not None]
    return StatesOfSteps(h, torch.stack(c) if c else None)


def _each(states: StatesOfSteps | None, change: Callable[[Tensor], Tensor]) -> StatesOfSteps | None:
    if states is None:
        return None
    return StatesOfSteps(change(states.h), None if states.c is None else change(states.c))


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
    keep_steps: tuple[int, list[tuple[Tensor, Tensor | None]]] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs the layers one after another, with dropout between them; results as in `_ops.layer`.

    If `keep_steps` is (D*P, outputs), h and c of every step of each layer are added to outputs. The
    layers then return both in one tensor, and y has h alone.
    """
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
        if keep_steps is not None:
            width, outputs = keep_steps
            c_steps = x[..., width:] if options.c_in_y else None
            x = x[..., :width].contiguous()
            outputs.append((x, c_steps))
        h_out.append(h_n)
        if c_n is not None:
            c_out.append(c_n)
    return x, torch.cat(h_out), torch.cat(c_out) if c_out else None


def _kind(cell: str) -> str:
    """The name of torch.nn's class in its messages, which is the first word of the cell's name."""
    return cell.partition("_")[0].upper()

"""Stacks of recurrent layers as functions of input, states and weights.

`lstm`, `gru` and `rnn` are what the modules of the same name compute, without a module around it.
Everything is checked here before a kernel runs; one op runs each layer, both directions in it.

Under ``torch.autocast`` for the input's device, floating input, states and weights are cast to the
autocast dtype, parameters once in a region, and all results have it; inside, sums and the LSTM's c
are float32. As everywhere in autocast, float64 tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from ._autocast import autocast_dtype, cast, cast_weights
from ._checks import (
    Lengths,
    as_dense,
    as_lengths,
    check_flags,
    check_kernels,
    check_rank,
    check_state,
    check_storage,
    check_weights,
    lstm_states,
    own_batch_sizes,
    weight_names,
)
from ._library import CELLS

__all__ = ["gru", "lstm", "rnn"]

Input = TypeVar("Input", Tensor, PackedSequence)

_KINDS = {
    "lstm": "LSTM",
    "lstm_proj": "LSTM",
    "gru": "GRU",
    "gru_reset_before": "GRU",
    "rnn_tanh": "RNN",
    "rnn_relu": "RNN",
}


def lstm(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
) -> tuple[Input, tuple[Tensor, Tensor]]:
    r"""Runs a stack of LSTM layers, with or without projection.

    .. math::
        i_t, f_t, o_t = \sigma(\cdot), \quad g_t = \tanh(\cdot), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    each of :math:`W x_t + b_{ih} + U h_{t-1} + b_{hh}`; with projection
    :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))`. (Hochreiter and Schmidhuber 1997; Gers, Schmidhuber
    and Cummins 2000; projection: Sak, Senior and Beaufays 2014, arXiv:1402.1128.)

    Args:
        input: ``[T, N, I]``; ``[N, T, I]`` with ``batch_first``; ``[T, I]`` for one sequence
            without a batch; a PackedSequence; or its rows ``[S, I]`` with ``batch_sizes``.
        hx: ``(h_0 [L*D, N, P], c_0 [L*D, N, H])``, without N for unbatched input; None for zeros.
        weights: flat, layer by layer and in it direction by direction: ``weight_ih [4H, I]``
            (``[4H, D*P]`` above the first layer), ``weight_hh [4H, P]``, with ``bias`` also
            ``bias_ih [4H]`` and ``bias_hh [4H]``, with projection ``weight_hr [P, H]``; gates in
            the order i, f, g, o.
        num_layers: L.
        bias: whether ``weights`` holds biases.
        dropout: probability of an element of a layer's output being zeroed before the next layer.
        training: whether dropout happens.
        bidirectional: two directions (D = 2), the second from each sequence's own end.
        batch_first: input and output are ``[N, T, ·]``; states are not affected.
        batch_sizes: ``[T]`` int64 on the CPU, live rows of each step, as in a PackedSequence; only
            with its rows.
        lengths: N whole numbers, each in [0, T], any order: steps of each row of a padded
            ``input``. A list or another sequence, a tensor on the CPU or a numpy array, of any
            dtype of numbers (in a compiled graph: of integers). They are copied. Padding is never
            read, outputs beyond a length are zero, final states are those of each row's own last
            step (of length 0: its initial state).

    Returns:
        ``y, (h_n, c_n)``: y ``[T, N, D*P]`` in the form of the input, h_n ``[L*D, N, P]``, c_n
        ``[L*D, N, H]``; P = H without projection. y of a PackedSequence is one.

    Raises:
        ValueError: input neither 2-D nor 3-D, or of another dtype than the weights; ``lengths``
            with ``batch_sizes`` or with unbatched input, either of them with a PackedSequence.
        RuntimeError: sizes, states, weights, ``batch_sizes`` or ``lengths`` that do not fit, more
            than one device, an empty sequence (T = 0).
        TypeError, AttributeError, IndexError: as torch.nn, for arguments of a wrong type.
        NotImplementedError: a dtype or device without kernels.
    """
    cell, sizes = _sizes("lstm", weights, num_layers, bias, bidirectional)
    h0, c0 = lstm_states(hx)
    y, h_n, c_n = run_layers(
        cell,
        sizes,
        input,
        h0,
        c0,
        weights,
        num_layers=num_layers,
        bias=bias,
        dropout=dropout if training else 0.0,
        bidirectional=bidirectional,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
        lengths=lengths,
    )
    assert c_n is not None
    return y, (h_n, c_n)


def gru(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    reset_after: bool = True,
) -> tuple[Input, Tensor]:
    r"""Runs a stack of GRU layers.

    .. math::
        r_t, z_t = \sigma(W x_t + b_{ih} + U h_{t-1} + b_{hh}), \quad
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    with, for ``reset_after=True`` (torch.nn's and cuDNN's),
    :math:`n_t = \tanh(W_n x_t + b_{in} + r_t \odot (U_n h_{t-1} + b_{hn}))`, and for
    ``reset_after=False`` (Cho et al. 2014, arXiv:1406.1078)
    :math:`n_t = \tanh(W_n x_t + b_{in} + U_n (r_t \odot h_{t-1}) + b_{hn})`.

    Weights of the other convention, :math:`h_t = (1 - z_t) \odot h_{t-1} + z_t \odot n_t`, become
    those of this one by negating the rows of z (the second third) in both weights and both biases.

    Args:
        input: as in `lstm`.
        hx: ``h_0 [L*D, N, H]``, without N for unbatched input; None for zeros.
        weights: as in `lstm` without ``weight_hr``, 3H rows each, gates in the order r, z, n.
        num_layers: as in `lstm`.
        bias: as in `lstm`.
        dropout: as in `lstm`.
        training: as in `lstm`.
        bidirectional: as in `lstm`.
        batch_first: as in `lstm`.
        batch_sizes: as in `lstm`.
        lengths: as in `lstm`.
        reset_after: whether r multiplies h after the product with U or before it.

    Returns:
        ``y, h_n``: y ``[T, N, D*H]`` in the form of the input, h_n ``[L*D, N, H]``.

    Raises:
        Exception: as `lstm`.
    """
    family = "gru" if reset_after else "gru_reset_before"
    cell, sizes = _sizes(family, weights, num_layers, bias, bidirectional)
    y, h_n, _ = run_layers(
        cell,
        sizes,
        input,
        hx,
        None,
        weights,
        num_layers=num_layers,
        bias=bias,
        dropout=dropout if training else 0.0,
        bidirectional=bidirectional,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
        lengths=lengths,
    )
    return y, h_n


def rnn(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    nonlinearity: str = "tanh",
) -> tuple[Input, Tensor]:
    r"""Runs a stack of Elman RNN layers (Elman 1990).

    .. math:: h_t = \phi(W x_t + b_{ih} + U h_{t-1} + b_{hh})

    Args:
        input: as in `lstm`.
        hx: ``h_0 [L*D, N, H]``, without N for unbatched input; None for zeros.
        weights: as in `lstm` without ``weight_hr``, H rows each.
        num_layers: as in `lstm`.
        bias: as in `lstm`.
        dropout: as in `lstm`.
        training: as in `lstm`.
        bidirectional: as in `lstm`.
        batch_first: as in `lstm`.
        batch_sizes: as in `lstm`.
        lengths: as in `lstm`.
        nonlinearity: φ, "tanh" or "relu".

    Returns:
        ``y, h_n``: y ``[T, N, D*H]`` in the form of the input, h_n ``[L*D, N, H]``.

    Raises:
        ValueError: an unknown nonlinearity; otherwise as `lstm`.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell, sizes = _sizes(f"rnn_{nonlinearity}", weights, num_layers, bias, bidirectional)
    y, h_n, _ = run_layers(
        cell,
        sizes,
        input,
        hx,
        None,
        weights,
        num_layers=num_layers,
        bias=bias,
        dropout=dropout if training else 0.0,
        bidirectional=bidirectional,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
        lengths=lengths,
    )
    return y, h_n


def _sizes(
    cell: str, weights: Sequence[Any], num_layers: int, bias: bool, bidirectional: bool
) -> tuple[str, tuple[int, int, int]]:
    """Reads cell (with projection or not) and (I, H, P) from the number and shapes of weights."""
    check_flags(bias, False, bidirectional)
    if num_layers <= 0:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    directions = 2 if bidirectional else 1
    one, odd = divmod(len(weights), num_layers * directions)
    if cell == "lstm" and one == (5 if bias else 3):
        cell = "lstm_proj"
    names = weight_names(cell, 1, 1, bias)
    if odd or one != len(names):
        raise RuntimeError(
            f"weights must hold {', '.join(n[:-3] for n in names)} for each of {num_layers} layers "
            f"and {directions} directions, {num_layers * directions * len(names)} tensors, "
            f"got {len(weights)}"
        )
    for name, w in zip(names, weights, strict=False):
        if not isinstance(w, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(w).__name__}")
        if w.dim() != (1 if name.startswith("bias") else 2):
            raise RuntimeError(f"{name} must be a matrix, or a vector for a bias, got {w.dim()}-D")
    rows, I = weights[0].shape
    H = rows // CELLS[cell].gates
    return cell, (I, H, weights[one - 1].shape[0] if CELLS[cell].projects else H)


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
    """Checks a call and runs its layers; the one path of all functions and modules.

    Args beyond those of `lstm`: ``sizes`` = (I, H, P) that the weights must have; ``dropout`` is 0
    outside training.
    """
    check_flags(bias, batch_first, bidirectional)
    directions = 2 if bidirectional else 1
    given: Any = None  # a PackedSequence's four
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
            raise ValueError(f"{_KINDS[cell]}: Expected input to be 2D or 3D, got {rank}D instead")
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
    # torch.nn has a check of its own for the dtype, which autocast turns off.
    mismatch = ValueError if autocast is None else RuntimeError
    check_weights(cell, sizes, num_layers, directions, bias, casts or weights, input, mismatch)
    check_kernels(input)
    I, H, P = sizes
    if input.shape[-1] != I:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {I}, got {input.size(-1)}"
        )

    x = input
    N: int | None
    if batch_sizes is not None:
        if not torch.compiler.is_compiling():
            batch_sizes, N = own_batch_sizes(batch_sizes, x.shape[0])
        elif sorted_indices is not None:
            N = sorted_indices.shape[0]
        else:
            N = None if h0 is None else h0.shape[1]
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
    if has_state and N is not None:
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

    options: dict[str, Any] = {
        "cell": cell,
        "bidirectional": bidirectional,
        "batch_sizes": batch_sizes,
        "lengths": lengths,
        "batch": N,
    }
    if num_layers == 1:
        y, h_n, c_n = ops.layer(x, h0, c0, weights, casts=casts, **options)
    else:
        y, h_n, c_n = _stack(x, h0, c0, weights, casts, num_layers, directions, dropout, options)

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
    casts: Sequence[Tensor] | None,  # as in `ops.layer`
    num_layers: int,
    directions: int,
    dropout: float,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs layers one after another, with dropout between them."""
    none: Sequence[Tensor | None] = [None] * num_layers
    h_in = none if h0 is None else h0.split(directions)
    c_in = none if c0 is None else c0.split(directions)
    k = len(weights) // num_layers
    h_out: list[Tensor] = []
    c_out: list[Tensor] = []
    for layer in range(num_layers):
        if layer > 0 and dropout != 0:
            x = F.dropout(x, dropout, training=True)
        own = slice(layer * k, (layer + 1) * k)
        w, cast_w = weights[own], None if casts is None else casts[own]
        x, h, c = ops.layer(x, h_in[layer], c_in[layer], w, casts=cast_w, **options)
        h_out.append(h)
        if c is not None:
            c_out.append(c)
    return x, torch.cat(h_out), torch.cat(c_out) if c_out else None

"""Stacks of recurrent layers as functions of input, states and weights.

`lstm`, `gru` and `rnn` compute what `FusedLSTM`, `FusedGRU` and `FusedRNN` compute, without a
module. They check all arguments before a kernel runs. One op runs each layer, in both directions if
there are two.

Under ``torch.autocast`` for the input's device, floating-point inputs, states and weights are cast
to the autocast dtype (a parameter once per region), and all results have this dtype. Within a
layer, sums and the c of an LSTM are float32. As always in autocast, float64 tensors are not cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._checks import check_bool, gru_cell, lstm_states
from ._run import run_layers, sizes_of
from ._sequence_checks import Lengths, Starts

__all__ = ["gru", "lstm", "rnn"]

Input = TypeVar("Input", Tensor, PackedSequence)


@overload
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
    peephole: bool = False,
    starts: Starts = None,
    return_states: Literal[False] = False,
) -> tuple[Input, tuple[Tensor, Tensor]]: ...


@overload
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
    peephole: bool = False,
    starts: Starts = None,
    return_states: Literal[True],
) -> tuple[Input, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...


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
    peephole: bool = False,
    starts: Starts = None,
    return_states: bool = False,
) -> Any:
    r"""Runs a stack of LSTM layers, with projection, with peepholes, or with neither.

    .. math::
        i_t, f_t, o_t = \sigma(\cdot), \quad g_t = \tanh(\cdot), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    where each :math:`\cdot` is :math:`W x_t + b_{ih} + U h_{t-1} + b_{hh}` with the gate's own
    weights (Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000). With a
    projection, :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))` (Sak, Senior and Beaufays 2014,
    arXiv:1402.1128). With peepholes, :math:`p_i \odot c_{t-1}` is added to the argument of
    :math:`i_t`, :math:`p_f \odot c_{t-1}` to that of :math:`f_t` and :math:`p_o \odot c_t` to that
    of :math:`o_t` (Gers and Schmidhuber 2000, as in ONNX's LSTM).

    Args:
        input: ``[T, N, I]``; ``[N, T, I]`` with ``batch_first``; ``[T, I]`` for one sequence
            without a batch; a PackedSequence; its data ``[S, I]`` with ``batch_sizes``; or a nested
            tensor ``[N, j, I]`` of layout jagged.
        hx: ``(h_0 [L*D, N, P], c_0 [L*D, N, H])``, without N for unbatched input; None means zeros.
        weights: a flat list, layer by layer and within a layer direction by direction:
            ``weight_ih [4H, I]`` (``[4H, D*P]`` above the first layer), ``weight_hh [4H, P]``, with
            ``bias`` also ``bias_ih [4H]`` and ``bias_hh [4H]``, with a projection
            ``weight_hr [P, H]``, and with ``peephole`` ``weight_ch [3H]``, which is p_i, p_f, p_o.
            The gates are in the order i, f, g, o.
        num_layers: L.
        bias: whether ``weights`` contains biases.
        dropout: the probability that an element of a layer's output is zeroed before the next
            layer.
        training: whether dropout is applied.
        bidirectional: whether there are two directions (D = 2); the second begins at each
            sequence's own end.
        batch_first: whether input and output are ``[N, T, ·]``; this does not change the states.
        batch_sizes: ``[T]`` int64 on the CPU, the number of rows of each step, as in a
            PackedSequence; only with its data as input.
        lengths: the lengths of the N sequences of a padded ``input``, in any order: whole numbers
            in [0, T] in a list or another sequence, in a tensor on the CPU or in a numpy array, of
            any dtype (in a compiled graph of an integer dtype). Changing them after the call does
            not affect backward. Padding is never read, and outputs beyond a length are zero. The
            final state of a sequence is that of its own last step, or its initial state if its
            length is 0.
        peephole: whether ``weights`` contains peepholes; not together with a projection.
        starts: at which steps a new sequence begins, so that one row may hold several, one behind
            the other: bool, ``[T, N]`` (``[N, T]`` with ``batch_first``, ``[T]`` for unbatched
            input, ``[S]`` with ``batch_sizes``), on the device of the input, or for a
            PackedSequence or a nested tensor another one of the same sequences. In the first
            direction h and c are zero before such a step, so ``starts[0]`` makes hx count for
            nothing in that row. In the second direction nothing goes from such a step on to the
            step before it. No gradient crosses a beginning. Beginnings beyond a length count for
            nothing. Changing ``starts`` after the call does not affect backward.
        return_states: whether the states of every layer after every step are returned too.

    Returns:
        ``y, (h_n, c_n)``: y ``[T, N, D*P]`` in the form of the input, h_n ``[L*D, N, P]`` and c_n
        ``[L*D, N, H]``, in the dtype of the input; P = H without a projection. For a PackedSequence
        y is one too. With ``return_states`` ``y, (h_n, c_n), (h, c)``: h ``[L, T, N, D*P]``, the
        output of each layer before dropout, and c ``[L, T, N, D*H]``, both with T and N in the
        order of the input, or ``[L, S, ·]`` in the order of y's data or values if the input is
        packed or nested. They are zero beyond a length.

    Raises:
        ValueError: input neither 2-D nor 3-D, or with another dtype than the weights; num_layers
            below 1; ``lengths`` with ``batch_sizes`` or with unbatched input; either of them with a
            PackedSequence.
        RuntimeError: sizes, states, weights, ``batch_sizes``, ``lengths`` or ``starts`` that do not
            fit; more than one device; T = 0.
        TypeError, AttributeError, IndexError: arguments of a wrong type, as in torch.nn.
        NotImplementedError: a dtype or device without kernels.
    """
    check_bool("peephole", peephole)
    cells = ("lstm_peephole",) if peephole else ("lstm", "lstm_proj", "lstm_peephole")
    cell, sizes = sizes_of(cells, weights, num_layers, bias, bidirectional)
    if cell == "lstm_peephole" and not peephole:
        raise RuntimeError("peephole must be True for weights with weight_ch [3H], got False")
    h0, c0 = lstm_states(hx)
    y, h_n, c_n, states = run_layers(
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
        starts=starts,
        return_states=return_states,
    )
    return (y, (h_n, c_n)) if states is None else (y, (h_n, c_n), tuple(states))


@overload
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
    starts: Starts = None,
    return_states: Literal[False] = False,
) -> tuple[Input, Tensor]: ...


@overload
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
    starts: Starts = None,
    return_states: Literal[True],
) -> tuple[Input, Tensor, Tensor]: ...


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
    starts: Starts = None,
    return_states: bool = False,
) -> Any:
    r"""Runs a stack of GRU layers.

    .. math::
        r_t, z_t = \sigma(W x_t + b_{ih} + U h_{t-1} + b_{hh}), \quad
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    with :math:`n_t = \tanh(W_n x_t + b_{in} + r_t \odot (U_n h_{t-1} + b_{hn}))` for
    ``reset_after=True`` (as in torch.nn and cuDNN), and for ``reset_after=False``
    (Cho et al. 2014, arXiv:1406.1078)
    :math:`n_t = \tanh(W_n x_t + b_{in} + U_n (r_t \odot h_{t-1}) + b_{hn})`.

    To convert weights of the other convention,
    :math:`h_t = (1 - z_t) \odot h_{t-1} + z_t \odot n_t`, negate the rows of z (the second third)
    in both weights and both biases.

    Args:
        input: as in `lstm`.
        hx: ``h_0 [L*D, N, H]``, without N for unbatched input; None means zeros.
        weights: as in `lstm` without ``weight_hr`` and ``weight_ch``, with 3H in place of 4H; the
            gates are in the order r, z, n.
        num_layers: as in `lstm`.
        bias: as in `lstm`.
        dropout: as in `lstm`.
        training: as in `lstm`.
        bidirectional: as in `lstm`.
        batch_first: as in `lstm`.
        batch_sizes: as in `lstm`.
        lengths: as in `lstm`.
        reset_after: whether r multiplies h after the product with U, or before it.
        starts: as in `lstm`.
        return_states: as in `lstm`.

    Returns:
        ``y, h_n``: y ``[T, N, D*H]`` in the form of the input, and h_n ``[L*D, N, H]``. With
        ``return_states`` ``y, h_n, h``: h ``[L, T, N, D*H]`` as in `lstm`.

    Raises:
        Exception: as `lstm`.
    """
    cell, sizes = sizes_of((gru_cell(reset_after),), weights, num_layers, bias, bidirectional)
    y, h_n, _, states = run_layers(
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
        starts=starts,
        return_states=return_states,
    )
    return (y, h_n) if states is None else (y, h_n, states.h)


@overload
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
    starts: Starts = None,
    return_states: Literal[False] = False,
) -> tuple[Input, Tensor]: ...


@overload
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
    starts: Starts = None,
    return_states: Literal[True],
) -> tuple[Input, Tensor, Tensor]: ...


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
    starts: Starts = None,
    return_states: bool = False,
) -> Any:
    r"""Runs a stack of Elman RNN layers (Elman 1990, "Finding structure in time").

    .. math:: h_t = \phi(W x_t + b_{ih} + U h_{t-1} + b_{hh})

    Args:
        input: as in `lstm`.
        hx: ``h_0 [L*D, N, H]``, without N for unbatched input; None means zeros.
        weights: as in `lstm` without ``weight_hr`` and ``weight_ch``, with H in place of 4H.
        num_layers: as in `lstm`.
        bias: as in `lstm`.
        dropout: as in `lstm`.
        training: as in `lstm`.
        bidirectional: as in `lstm`.
        batch_first: as in `lstm`.
        batch_sizes: as in `lstm`.
        lengths: as in `lstm`.
        nonlinearity: φ, "tanh" or "relu".
        starts: as in `lstm`.
        return_states: as in `lstm`.

    Returns:
        ``y, h_n``: y ``[T, N, D*H]`` in the form of the input, and h_n ``[L*D, N, H]``. With
        ``return_states`` ``y, h_n, h``: h ``[L, T, N, D*H]`` as in `lstm`.

    Raises:
        ValueError: an unknown nonlinearity; otherwise as `lstm`.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell, sizes = sizes_of((f"rnn_{nonlinearity}",), weights, num_layers, bias, bidirectional)
    y, h_n, _, states = run_layers(
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
        starts=starts,
        return_states=return_states,
    )
    return (y, h_n) if states is None else (y, h_n, states.h)

"""Stacks of recurrent layers as functions of input, states and weights.

`lstm`, `gru` and `rnn` are what the modules of the same name compute, without a module around it.
Everything is checked here before a kernel runs; one op runs each layer, both directions in it.

Under ``torch.autocast`` for the input's device, floating input, states and weights are cast to the
autocast dtype, parameters once in a region, and all results have it; inside, sums and the LSTM's c
are float32. As everywhere in autocast, float64 tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._checks import Lengths, check_bool, lstm_states
from ._run import run_layers, sizes_of

__all__ = ["gru", "lstm", "rnn"]

Input = TypeVar("Input", Tensor, PackedSequence)


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
) -> tuple[Input, tuple[Tensor, Tensor]]:
    r"""Runs a stack of LSTM layers, with projection, with peepholes, or with neither.

    .. math::
        i_t, f_t, o_t = \sigma(\cdot), \quad g_t = \tanh(\cdot), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    each of :math:`W x_t + b_{ih} + U h_{t-1} + b_{hh}`; with projection
    :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))`. With peepholes :math:`p_i \odot c_{t-1}` is added
    in :math:`i_t`, :math:`p_f \odot c_{t-1}` in :math:`f_t` and :math:`p_o \odot c_t` in
    :math:`o_t`. (Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000; projection:
    Sak, Senior and Beaufays 2014, arXiv:1402.1128; peepholes: Gers and Schmidhuber 2000, as in
    ONNX's LSTM.)

    Args:
        input: ``[T, N, I]``; ``[N, T, I]`` with ``batch_first``; ``[T, I]`` for one sequence
            without a batch; a PackedSequence; or its rows ``[S, I]`` with ``batch_sizes``.
        hx: ``(h_0 [L*D, N, P], c_0 [L*D, N, H])``, without N for unbatched input; None for zeros.
        weights: flat, layer by layer and in it direction by direction: ``weight_ih [4H, I]``
            (``[4H, D*P]`` above the first layer), ``weight_hh [4H, P]``, with ``bias`` also
            ``bias_ih [4H]`` and ``bias_hh [4H]``, with projection ``weight_hr [P, H]``, with
            ``peephole`` ``weight_ch [3H]``, which is p_i, p_f, p_o; gates in the order i, f, g, o.
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
        peephole: whether ``weights`` holds peepholes; not together with a projection.

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
    check_bool("peephole", peephole)
    cells = ("lstm_peephole",) if peephole else ("lstm", "lstm_proj")
    cell, sizes = sizes_of(cells, weights, num_layers, bias, bidirectional)
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
        weights: as in `lstm` without ``weight_hr`` and ``weight_ch``, 3H rows each, gates in the
            order r, z, n.
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
    asked_for = "gru" if reset_after else "gru_reset_before"
    cell, sizes = sizes_of((asked_for,), weights, num_layers, bias, bidirectional)
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
        weights: as in `lstm` without ``weight_hr`` and ``weight_ch``, H rows each.
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
    cell, sizes = sizes_of((f"rnn_{nonlinearity}",), weights, num_layers, bias, bidirectional)
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

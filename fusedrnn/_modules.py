"""The layers that replace torch.nn's, with the same parameters, arguments, results and errors.

They derive from nn.RNNBase and not from nn.LSTM, nn.GRU and nn.RNN, because Dynamo refuses every
instance of these classes and quantize_dynamic replaces them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _fx
from ._checks import Device, DType, check_bool, check_sizes, gru_cell, lstm_states
from ._library import CELLS
from ._module_base import _FusedRNNBase, refuse_keywords
from ._sequence_checks import Lengths, Starts

__all__ = ["FusedGRU", "FusedLSTM", "FusedRNN"]

Input = TypeVar("Input", Tensor, PackedSequence)


class FusedLSTM(_FusedRNNBase):
    r"""Multi-layer LSTM; takes the place of `torch.nn.LSTM`.

    .. math::
        i_t, f_t, o_t = \sigma(\cdot), \quad g_t = \tanh(\cdot), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    where each :math:`\cdot` is :math:`W x_t + b_{ih} + U h_{t-1} + b_{hh}` with the gate's own
    weights. With ``proj_size = P > 0``, :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))`. With
    ``peephole=True``, which torch.nn's LSTM cannot compute, :math:`p_i \odot c_{t-1}` is added to
    the argument of :math:`i_t`, :math:`p_f \odot c_{t-1}` to that of :math:`f_t` and
    :math:`p_o \odot c_t` to that of :math:`o_t`. `fusedrnn.functional.lstm` names the sources.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, the number of layers; each reads the output of the one before.
        bias: whether there are bias_ih and bias_hh.
        batch_first: whether input and output are ``[N, T, ·]`` and not ``[T, N, ·]``; this does
            not change states or unbatched input.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: whether there is a second direction (D = 2), which begins at each sequence's
            end.
        proj_size: P, size of a projected h; 0 for none.
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.
        peephole: whether the gates i, f and o also read c, with one weight for each unit and
            gate; not together with proj_size.

    Attributes:
        weight_ih_l{k}{_reverse}: ``[4H, I]``, or ``[4H, D*P]`` above the first layer;
            gates i, f, g, o.
        weight_hh_l{k}{_reverse}: ``[4H, P]`` (P = H without projection).
        bias_ih_l{k}{_reverse}, bias_hh_l{k}{_reverse}: ``[4H]``.
        weight_hr_l{k}{_reverse}: ``[P, H]``, with projection.
        weight_ch_l{k}{_reverse}: ``[3H]``, with peephole: p_i, p_f, p_o.

    All are drawn from U(−1/√H, 1/√H). With the same seed they are the same numbers as torch.nn's.
    Peepholes are drawn after the others. No cell module has peepholes: a call with T = 1 is a step.

    Raises:
        ValueError: sizes, num_layers, dropout or proj_size out of range; proj_size with peephole.
        TypeError: an argument of a wrong type.
    """

    __constants__ = [*nn.RNNBase.__constants__, "peephole"]  # noqa: RUF012 (torch.nn's form)

    peephole: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: DType = None,
        *,
        peephole: bool = False,
    ) -> None:
        check_bool("peephole", peephole)
        num_layers, proj_size = check_sizes(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size
        )
        if peephole and proj_size:
            raise ValueError(f"proj_size must be 0 with peephole=True, got {proj_size}")
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.peephole = peephole
        if peephole:
            self._add_peepholes(device, dtype)

    def _add_peepholes(self, device: Device, dtype: DType) -> None:
        """Registers weight_ch of each layer and direction, and lists it among the weights."""
        H = self.hidden_size
        peepholes = next(p for p in CELLS["lstm_peephole"].parameters if p.name == "weight_ch")
        for names in self._all_weights:
            name = peepholes.name + names[0].removeprefix("weight_ih")
            weight = nn.Parameter(torch.empty(peepholes.shape(H=H), device=device, dtype=dtype))
            self._draw(weight)
            self.register_parameter(name, weight)
            names.append(name)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        for name in self._flat_weights_names:  # parameters() then yields them in this order
            self._parameters[name] = self._parameters.pop(name)

    def _cell(self) -> str:
        if self.peephole is not False:
            check_bool("peephole", self.peephole)
            if self.proj_size:
                raise ValueError(f"proj_size must be 0 with peephole=True, got {self.proj_size}")
            return "lstm_peephole"
        return "lstm_proj" if self.proj_size else "lstm"

    def reset_parameters(self) -> None:
        """Draws all parameters again: those that torch.nn's LSTM has in its order, then peepholes.

        With the same seed the former are therefore the same numbers as torch.nn's.
        """
        named = sorted(self.named_parameters(), key=lambda entry: "weight_ch" in entry[0])
        for _, parameter in named:
            self._draw(parameter)

    def _draw(self, parameter: Tensor) -> None:
        bound = 1 / math.sqrt(self.hidden_size)  # as torch.nn computes it: a power may round apart
        nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """Returns torch.nn's text, and peephole where it is not the default."""
        return super().extra_repr() + (", peephole=True" if self.peephole else "")

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Returns the sizes that c_0 must have for an input, (L*D, N, H)."""
        rows, N, _ = self.get_expected_hidden_size(input, batch_sizes)
        return rows, N, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Checks input and (h_0, c_0), as the method of torch.nn.LSTM with this name does."""
        self.check_input(input, batch_sizes)
        for k, expected in enumerate((self.get_expected_hidden_size, self.get_expected_cell_size)):
            self.check_hidden_size(
                hidden[k], expected(input, batch_sizes), f"Expected hidden[{k}] size {{}}, got {{}}"
            )

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Permutes the sequences of (h, c)."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Lengths = None,
        starts: Starts = None,
        *,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: None = None,
        starts: Starts = None,
        *,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Lengths = None,
        starts: Starts = None,
        *,
        return_states: Literal[True],
    ) -> tuple[Input, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Lengths = None,
        starts: Starts = None,
        *,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers.

        Args:
            input: ``[T, N, I]``, ``[N, T, I]`` with batch_first, ``[T, I]`` without a batch, a
                PackedSequence, or a nested tensor ``[N, j, I]`` of layout jagged.
            hx: ``(h_0 [L*D, N, P], c_0 [L*D, N, H])``, without N for unbatched input; None means
                zeros.
            lengths: the lengths of the N sequences of a padded input, in any order: whole numbers
                in [0, T] in a list, a tensor on the CPU or a numpy array. See
                `fusedrnn.functional.lstm`.
            starts: at which steps of each row a new sequence begins: bool, ``[T, N]`` (``[N, T]``
                with batch_first, ``[T]`` without a batch), on the device of the input, or for
                packed or nested input one of the same sequences. Before such a step h and c are
                zero, and no gradient crosses it. See `fusedrnn.functional.lstm`.
            return_states: whether the states of every layer after every step are returned too.

        Returns:
            ``y, (h_n, c_n)``: y ``[T, N, D*P]`` in the form of the input; the states as hx. With
            return_states ``y, (h_n, c_n), (h, c)``: h ``[L, T, N, D*P]`` and c ``[L, T, N, D*H]``,
            where T and N stand as in y; ``[L, S, ·]`` in the order of y's data or values if the
            input is packed or nested.

        Raises:
            ValueError: wrong rank or dtype of the input; lengths with unbatched or packed input.
            RuntimeError: sizes, lengths, starts, dtypes or devices that do not fit.
            NotImplementedError: a dtype or device without kernels.
            TypeError, AttributeError, IndexError: arguments of a wrong type, as in torch.nn.
        """
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx, lengths, starts, return_states)) is not None
        ):
            return leaf
        h0, c0 = (None, None) if hx is None else lstm_states(hx)
        y, h_n, c_n, states = self._run(input, h0, c0, lengths, starts, return_states)
        return (y, (h_n, c_n)) if states is None else (y, (h_n, c_n), tuple(states))


class _LayerWithoutC(_FusedRNNBase):
    """The call of a GRU or an RNN, whose state is h alone."""

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Lengths = None,
        starts: Starts = None,
        *,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        lengths: None = None,
        starts: Starts = None,
        *,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: Input,
        hx: Tensor | None = None,
        lengths: Lengths = None,
        starts: Starts = None,
        *,
        return_states: Literal[True],
    ) -> tuple[Input, Tensor, Tensor]: ...

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Lengths = None,
        starts: Starts = None,
        *,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers.

        Args:
            input: as in `FusedLSTM.forward`.
            hx: ``h_0 [L*D, N, H]``, without N for unbatched input; None means zeros.
            lengths: as in `FusedLSTM.forward`.
            starts: as in `FusedLSTM.forward`.
            return_states: as in `FusedLSTM.forward`.

        Returns:
            ``y, h_n``: y ``[T, N, D*H]`` in the form of the input; h_n as hx. With return_states
            ``y, h_n, h``: h ``[L, T, N, D*H]`` as in `FusedLSTM.forward`.

        Raises:
            Exception: as `FusedLSTM.forward`.
        """
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx, lengths, starts, return_states)) is not None
        ):
            return leaf
        y, h_n, _, states = self._run(input, hx, None, lengths, starts, return_states)
        return (y, h_n) if states is None else (y, h_n, states.h)


class FusedGRU(_LayerWithoutC):
    r"""Multi-layer GRU; takes the place of `torch.nn.GRU`.

    .. math::
        r_t, z_t = \sigma(W x_t + b_{ih} + U h_{t-1} + b_{hh}), \quad
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    with :math:`n_t = \tanh(W_n x_t + b_{in} + r_t \odot (U_n h_{t-1} + b_{hn}))`, or for
    ``reset_after=False`` (Cho et al. 2014; Keras and ONNX have both)
    :math:`n_t = \tanh(W_n x_t + b_{in} + U_n (r_t \odot h_{t-1}) + b_{hn})`.
    See `fusedrnn.functional.gru`, also for weights that use the other convention for z.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, the number of layers; each reads the output of the one before.
        bias: whether there are bias_ih and bias_hh.
        batch_first: whether input and output are ``[N, T, ·]``, as in `FusedLSTM`.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: whether there is a second direction (D = 2), which begins at each sequence's
            end.
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.
        reset_after: whether r multiplies h after the product with U, as in torch.nn's GRU, or
            before it.
        kwargs: must be empty; ``proj_size`` is a ValueError, as in torch.nn.

    Attributes:
        weight_ih_l{k}{_reverse}: ``[3H, I]``, above the first layer ``[3H, D*H]``; gates r, z, n.
        weight_hh_l{k}{_reverse}: ``[3H, H]``.
        bias_ih_l{k}{_reverse}, bias_hh_l{k}{_reverse}: ``[3H]``.

    Raises:
        ValueError: sizes, num_layers or dropout out of range.
        TypeError: an argument of a wrong type.
    """

    __constants__ = [*nn.RNNBase.__constants__, "reset_after"]  # noqa: RUF012 (torch.nn's form)

    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: DType = None,
        *,
        reset_after: bool = True,
        **kwargs: Any,
    ) -> None:
        refuse_keywords(type(self).__name__, kwargs)
        check_bool("reset_after", reset_after)
        num_layers, _ = check_sizes(input_size, hidden_size, num_layers, bias, batch_first, dropout)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.reset_after = reset_after

    def _cell(self) -> str:
        return gru_cell(self.reset_after)

    def extra_repr(self) -> str:
        """Returns torch.nn's text, and reset_after where it is not the default."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class FusedRNN(_LayerWithoutC):
    r"""Multi-layer Elman RNN with tanh or ReLU; takes the place of `torch.nn.RNN`.

    .. math:: h_t = \phi(W x_t + b_{ih} + U h_{t-1} + b_{hh})

    See `fusedrnn.functional.rnn` for the source.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, the number of layers; each reads the output of the one before.
        nonlinearity: φ, "tanh" or "relu".
        bias: whether there are bias_ih and bias_hh.
        batch_first: whether input and output are ``[N, T, ·]``, as in `FusedLSTM`.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: whether there is a second direction (D = 2), which begins at each sequence's
            end.
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.
        kwargs: must be empty; ``proj_size`` is a ValueError, as in torch.nn.

    Attributes:
        weight_ih_l{k}{_reverse}: ``[H, I]``, above the first layer ``[H, D*H]``.
        weight_hh_l{k}{_reverse}: ``[H, H]``.
        bias_ih_l{k}{_reverse}, bias_hh_l{k}{_reverse}: ``[H]``.

    Raises:
        ValueError: sizes, num_layers or dropout out of range, an unknown nonlinearity.
        TypeError: an argument of a wrong type.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        refuse_keywords(type(self).__name__, kwargs)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        num_layers, _ = check_sizes(input_size, hidden_size, num_layers, bias, batch_first, dropout)
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity

    def _cell(self) -> str:
        if self.mode not in ("RNN_TANH", "RNN_RELU"):
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return "rnn_tanh" if self.mode == "RNN_TANH" else "rnn_relu"

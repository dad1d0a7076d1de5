"""The layers that replace torch.nn's, with the same parameters, arguments, results and errors.

They derive from nn.RNNBase and not from nn.LSTM, nn.GRU and nn.RNN, because Dynamo refuses every
instance of these classes and quantize_dynamic replaces them.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _fx
from ._checks import Device, DType, Lengths, check_bool, check_sizes, gru_cell, lstm_states
from ._library import CELLS
from ._run import run_layers
from ._torchscript import refuse_script, refuse_trace

__all__ = ["FusedGRU", "FusedLSTM", "FusedRNN"]


class _FusedRNNBase(nn.RNNBase):
    """The base of the three layers: it reads the weights and runs a call.

    It reads the weights as attributes at each call. So pruning, parametrizations, weight_norm,
    functional_call, and weights that are computed or shared work without code of their own.
    """

    __prepare_scriptable__ = refuse_script
    _slow_forward = refuse_trace

    def _cell(self) -> str:
        """Returns the name of the cell, as the ops take it."""
        raise NotImplementedError

    # torch.nn stores a list of the weights, which may be out of date, and weak references by which
    # it notices that. These references prevent torch.utils.swap_tensors. Here both are properties
    # that are computed on access. The setters drop the values that nn.RNNBase assigns, and those
    # that a converted layer of torch.nn still stores.

    @property
    def _flat_weights(self) -> list[Any]:
        """The current weights, in torch's order."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        self.__dict__.pop("_flat_weights", None)

    @property
    def _flat_weight_refs(self) -> list[Any]:
        """Weak references to the current weights."""
        return [None if w is None else weakref.ref(w) for w in self._flat_weights]

    @_flat_weight_refs.setter
    def _flat_weight_refs(self, value: list[Any]) -> None:
        self.__dict__.pop("_flat_weight_refs", None)

    def __getstate__(self) -> dict[str, Any]:
        # nn.RNNBase.__getstate__ expects the two lists in the dictionary.
        return self.__dict__.copy()

    def flatten_parameters(self) -> None:
        """Does nothing, because the kernels arrange the weights themselves."""

    def _run(self, input: Any, h0: Any, c0: Any, lengths: Any) -> tuple[Any, Tensor, Tensor | None]:
        parameters = self._parameters
        weights: list[Any]
        try:
            # These are the weights that getattr finds, without the cost of nn.Module.__getattr__.
            weights = [parameters[name] for name in self._flat_weights_names]
        except KeyError:
            weights = [getattr(self, name) for name in self._flat_weights_names]
        H = self.hidden_size
        return run_layers(
            self._cell(),
            (self.input_size, H, self.proj_size or H),
            input,
            h0,
            c0,
            weights,
            num_layers=self.num_layers,
            bias=self.bias,
            dropout=self.dropout if self.training else 0.0,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            batch_sizes=None,
            lengths=lengths,
        )


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
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Lengths = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, lengths: None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(self, input: Any, hx: Any = None, lengths: Lengths = None) -> Any:
        """Runs the layers.

        Args:
            input: ``[T, N, I]``, ``[N, T, I]`` with batch_first, ``[T, I]`` without a batch, or a
                PackedSequence.
            hx: ``(h_0 [L*D, N, P], c_0 [L*D, N, H])``, without N for unbatched input; None means
                zeros.
            lengths: the lengths of the N sequences of a padded input, in any order: whole numbers
                in [0, T] in a list, a tensor on the CPU or a numpy array. See
                `fusedrnn.functional.lstm`.

        Returns:
            ``y, (h_n, c_n)``: y ``[T, N, D*P]`` in the form of the input; the states as hx.

        Raises:
            ValueError: wrong rank or dtype of the input; lengths with unbatched or packed input.
            RuntimeError: sizes, lengths, dtypes or devices that do not fit.
            NotImplementedError: a dtype or device without kernels.
            TypeError, AttributeError, IndexError: arguments of a wrong type, as in torch.nn.
        """
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx, lengths)) is not None
        ):
            return leaf
        h0, c0 = (None, None) if hx is None else lstm_states(hx)
        y, h_n, c_n = self._run(input, h0, c0, lengths)
        return y, (h_n, c_n)


class FusedGRU(_FusedRNNBase):
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
        _refuse_keywords(type(self).__name__, kwargs)
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

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Any = None, lengths: Lengths = None) -> Any:
        """Runs the layers.

        Args:
            input: as in `FusedLSTM.forward`.
            hx: ``h_0 [L*D, N, H]``, without N for unbatched input; None means zeros.
            lengths: as in `FusedLSTM.forward`.

        Returns:
            ``y, h_n``: y ``[T, N, D*H]`` in the form of the input; h_n as hx.

        Raises:
            Exception: as `FusedLSTM.forward`.
        """
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx, lengths)) is not None
        ):
            return leaf
        y, h_n, _ = self._run(input, hx, None, lengths)
        return y, h_n


class FusedRNN(_FusedRNNBase):
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
        _refuse_keywords(type(self).__name__, kwargs)
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

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Any = None, lengths: Lengths = None) -> Any:
        """Runs the layers; arguments, results and errors are those of `FusedGRU.forward`."""
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx, lengths)) is not None
        ):
            return leaf
        y, h_n, _ = self._run(input, hx, None, lengths)
        return y, h_n


def _refuse_keywords(owner: str, kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in kwargs:
        raise TypeError(f"{owner}.__init__() got an unexpected keyword argument '{name}'")

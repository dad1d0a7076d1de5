"""The cell modules that replace torch.nn's: LSTMCell, GRUCell and RNNCell. Each computes one step.

They derive from torch's RNNCellBase, because other libraries check isinstance with it. They do not
derive from nn.LSTMCell, nn.GRUCell and nn.RNNCell, which quantize_dynamic replaces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from . import _fx, _ops, _reference
from ._autocast import autocast_dtype, cast, cast_weights
from ._checks import Device, DType, as_dense, check_bool, check_kernels, check_weights, gru_cell
from ._library import CELLS
from ._options import Batch, Options, StepOptions
from ._torchscript import refuse_script, refuse_trace

__all__ = ["FusedGRUCell", "FusedLSTMCell", "FusedRNNCell"]


# The records are cached: making one takes 0.2 µs, and a whole step takes 8 µs.
_step_options = functools.lru_cache(maxsize=1000)(StepOptions)

# The parameters of every cell module.
WEIGHT_NAMES = tuple(parameter.name for parameter in CELLS["lstm"].parameters)

# The exceptions that a step raises if its arguments do not fit. All others are passed on:
# torch.utils.checkpoint, for instance, ends a repeated forward with an exception of its own.
_UNFIT = (RuntimeError, TypeError, ValueError, AttributeError)  # NotImplementedError included


class _FusedCell(RNNCellBase):
    """The base of the three cell modules: it checks a call and runs it."""

    __prepare_scriptable__ = refuse_script
    _slow_forward = refuse_trace

    def _run(self, cell: str, input: Any, states: tuple[Any, ...]) -> Sequence[Tensor]:
        """Runs one step.

        Args:
            cell: the name of the cell.
            input: [N, I] or [I].
            states: (), (h,) or (h, c), each [N, H], or [H] for input [I].

        Returns:
            h, then c if the cell has one.
        """
        if _ops.may_step():
            weights = self._weights()
            h = states[0] if states else None
            c = states[1] if len(states) == 2 else None
            if h is not None or not states:
                try:
                    casts = None
                    if _C._is_any_autocast_enabled():
                        input, h, c, weights, casts = self._cast(cell, input, h, c, weights)
                    options = _step_options(self.input_size, self.hidden_size, cell)
                    return _ops.step(input, h, c, weights, options, casts)
                except _UNFIT:
                    pass  # _run_checked raises the error in torch.nn's words
        return self._run_checked(cell, input, states)

    def _run_checked(self, cell: str, input: Any, states: tuple[Any, ...]) -> Sequence[Tensor]:
        """Does the same with all checks, for traced or transformed calls and wrong arguments."""
        if not isinstance(input, Tensor):
            raise AttributeError(f"input must be a Tensor, got {type(input).__name__}")
        input = as_dense("input", input)
        rank = input.dim()
        if rank != 2 and rank != 1:
            raise ValueError(f"{self._name()}: Expected input to be 1D or 2D, got {rank}D instead")
        for k, state in enumerate(states):
            name = f"hx[{k}]" if len(states) > 1 else "hidden"
            if not isinstance(state, Tensor):
                raise AttributeError(f"{name} must be a Tensor, got {type(state).__name__}")
            if state.dim() not in (1, 2):
                raise ValueError(
                    f"{self._name()}: Expected {name} to be 1D or 2D, got {state.dim()}D instead"
                )
        h, c = (*(as_dense(f"hidden{k}", s) for k, s in enumerate(states)), None, None)[:2]
        input, h, c, weights, casts = self._cast(cell, input, h, c, self._weights())
        states = tuple(s for s in (h, c) if s is not None)

        I, H = self.input_size, self.hidden_size
        bias = len(weights) == len(CELLS[cell].parameters)
        # Sizes are checked before dtypes, as in torch.nn.
        if input.shape[-1] != I:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[-1]} expected {I}"
            )
        _check_sizes(input, states, H)
        check_weights(
            cell, (I, H, H), 1, 1, bias, casts or weights, input, RuntimeError, WEIGHT_NAMES
        )
        check_kernels(input)
        _check_kinds(input, states)
        if rank == 1:
            input = input.unsqueeze(0)
            states = tuple(s.unsqueeze(0) for s in states)
        h, c = (*(s.unsqueeze(0) for s in states), None, None)[:2]
        x = input.unsqueeze(0)
        batch, options = Batch(None, None, input.shape[0]), Options(cell)
        if I == 0 or H == 0:  # the engine refuses empty products
            if casts is not None:
                weights = [cast(w, x.dtype) for w in weights]
            _, h, c = _reference.layer(x, h, c, weights, batch, options)
        else:
            _, h, c = _ops.layer(x, h, c, weights, batch, options, casts)
        # [D, N, H] -> [N, H] or [H]
        h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        if rank == 1:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return (h,) if c is None else (h, c)

    def _cast(
        self, cell: str, input: Any, h: Any, c: Any, weights: list[Any]
    ) -> tuple[Any, Any, Any, list[Any], list[Tensor] | None]:
        """Under autocast casts input, h and weights to its dtype, and the c of an LSTM to float32.

        Returns input, h, c, the weights, and the casts of the weights if the region keeps them
        (then the weights themselves are not cast).
        """
        dtype = autocast_dtype(input.device)
        if dtype is None:
            return input, h, c, weights, None
        casts = cast_weights(weights, dtype)
        if casts is None:
            weights = [cast(w, dtype) for w in weights]
        input, h = cast(input, dtype), cast(h, dtype)
        if c is not None:
            c = cast(c, torch.float32)
        elif h is None and CELLS[cell].has_c and input.dtype == dtype:
            sizes = (*input.shape[:-1], self.hidden_size)
            h, c = input.new_zeros(sizes), input.new_zeros(sizes, dtype=torch.float32)
        return input, h, c, weights, casts

    def _weights(self) -> list[Any]:
        """Returns the current weight_ih and weight_hh, then both biases or none."""
        parameters = self._parameters
        weights: list[Any]
        try:
            # These are the weights that getattr finds, without the cost of nn.Module.__getattr__.
            weights = [
                parameters["weight_ih"],
                parameters["weight_hh"],
                parameters["bias_ih"],
                parameters["bias_hh"],
            ]
        except KeyError:
            weights = [getattr(self, name) for name in WEIGHT_NAMES]
        b_ih, b_hh = weights[2], weights[3]
        if b_ih is not None and b_hh is not None:
            return weights
        if b_ih is None and b_hh is None:
            return weights[:2]
        # A cell module of torch.nn may have only one of the biases; the kernels take both or none.
        if b_ih is None:
            weights[2] = torch.zeros_like(b_hh)
        if b_hh is None:
            weights[3] = torch.zeros_like(b_ih)
        return weights

    def _name(self) -> str:
        return type(self).__name__.removeprefix("Fused")


def _check_sizes(input: Tensor, states: tuple[Tensor, ...], H: int) -> None:
    """Checks that rank and sizes of the states fit the input."""
    expected = (*input.shape[:-1], H)
    for k, state in enumerate(states):
        if state.shape != expected:
            if state.dim() != input.dim():
                raise RuntimeError(
                    f"hidden{k} must be {input.dim()}-D as the input is, {list(expected)}, got "
                    f"{list(state.shape)}"
                )
            if state.shape[-1] != H:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.shape[-1]}, expected {H}"
                )
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size "
                f"{state.shape[0]}"
            )


def _check_kinds(input: Tensor, states: tuple[Tensor, ...]) -> None:
    """Checks that device and dtype of the states fit the input."""
    for k, state in enumerate(states):
        if state.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{input.device} and hidden tensor (hidden{k}) at {state.device}"
            )
        # c may be float32 if the input has a 16-bit dtype.
        wide = k == 1 and state.dtype == torch.float32 and input.dtype.itemsize == 2
        if state.dtype != input.dtype and not wide:
            raise RuntimeError(
                f"hidden{k} must have the dtype of the input, {input.dtype}, got {state.dtype}"
            )


class FusedLSTMCell(_FusedCell):
    r"""One step of an LSTM; takes the place of `torch.nn.LSTMCell`.

    .. math::
        i, f, o = \sigma(\cdot), \quad g = \tanh(\cdot), \quad
        c' = f \odot c + i \odot g, \quad h' = o \odot \tanh(c')

    where each :math:`\cdot` is :math:`W x + b_{ih} + U h + b_{hh}` with the gate's own weights. See
    `fusedrnn.functional.lstm` for the sources.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether there are bias_ih and bias_hh; if not, both are None.
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.

    Attributes:
        weight_ih: ``[4H, I]``, gates i, f, g, o.
        weight_hh: ``[4H, H]``.
        bias_ih, bias_hh: ``[4H]``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs one step.

        Args:
            input: ``[N, I]`` or ``[I]``.
            hx: ``(h [N, H], c [N, H])``, without N for input ``[I]``; None means zeros. c may be
                float32 if the input has a 16-bit dtype.

        Returns:
            ``(h', c')`` of the same shapes. h' has the dtype of the input and c' that of c. Under
            autocast h' has its dtype, and c' is float32.

        Raises:
            ValueError: the input or a state is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices that do not fit; not two states.
            NotImplementedError: a dtype or device without kernels.
            TypeError, AttributeError: arguments of a wrong type, as in torch.nn.
        """
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx)) is not None
        ):
            return leaf
        states: tuple[Tensor, ...] = ()
        if hx is not None:
            if not isinstance(hx, (tuple, list)):
                raise TypeError(f"hx must be a tuple (h, c) of tensors, got {type(hx).__name__}")
            if len(hx) != 2:
                raise RuntimeError(f"lstm_cell expects two hidden states in hx, got {len(hx)}")
            states = (hx[0], hx[1])
        h, c = self._run("lstm", input, states)
        return h, c


class FusedGRUCell(_FusedCell):
    r"""One step of a GRU; takes the place of `torch.nn.GRUCell`.

    .. math::
        r, z = \sigma(W x + b_{ih} + U h + b_{hh}), \quad h' = (1 - z) \odot n + z \odot h

    with :math:`n = \tanh(W_n x + b_{in} + r \odot (U_n h + b_{hn}))`, or for
    ``reset_after=False`` :math:`n = \tanh(W_n x + b_{in} + U_n (r \odot h) + b_{hn})`. See
    `fusedrnn.functional.gru` for the sources.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether there are bias_ih and bias_hh; if not, both are None.
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.
        reset_after: whether r multiplies h after the product with U, as in torch.nn's GRUCell, or
            before it.

    Attributes:
        weight_ih: ``[3H, I]``, gates r, z, n.
        weight_hh: ``[3H, H]``.
        bias_ih, bias_hh: ``[3H]``.

    Raises:
        TypeError: reset_after is not a bool.
    """

    __constants__ = [*RNNCellBase.__constants__, "reset_after"]  # noqa: RUF012 (torch.nn's form)

    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: DType = None,
        *,
        reset_after: bool = True,
    ) -> None:
        check_bool("reset_after", reset_after)
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)
        self.reset_after = reset_after

    def extra_repr(self) -> str:
        """Returns torch.nn's text, and reset_after where it is not the default."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step.

        Args:
            input: ``[N, I]`` or ``[I]``.
            hx: ``h [N, H]``, or ``[H]`` for input ``[I]``; None means zeros.

        Returns:
            ``h'`` of the same shape, in the dtype of the input; under autocast in its dtype.

        Raises:
            ValueError: the input or the state is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices that do not fit.
            NotImplementedError: a dtype or device without kernels.
            AttributeError: the input or the state is not a tensor.
        """
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx)) is not None
        ):
            return leaf
        return self._run(gru_cell(self.reset_after), input, () if hx is None else (hx,))[0]


class FusedRNNCell(_FusedCell):
    r"""One step of an Elman RNN with tanh or ReLU; takes the place of `torch.nn.RNNCell`.

    .. math:: h' = \phi(W x + b_{ih} + U h + b_{hh})

    See `fusedrnn.functional.rnn` for the source.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether there are bias_ih and bias_hh; if not, both are None.
        nonlinearity: φ, "tanh" or "relu"; as in torch.nn, another name is a RuntimeError in
            forward.
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.

    Attributes:
        weight_ih: ``[H, I]``.
        weight_hh: ``[H, H]``.
        bias_ih, bias_hh: ``[H]``.
    """

    __constants__ = [*RNNCellBase.__constants__, "nonlinearity"]  # noqa: RUF012 (torch.nn's form)

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step; arguments, result and errors are those of `FusedGRUCell.forward`.

        Raises:
            RuntimeError: also for an unknown nonlinearity.
        """
        if (
            nn.Module.__call__ is not _fx.CALL
            and (leaf := _fx.as_leaf(self, input, hx)) is not None
        ):
            return leaf
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(
                f"Unknown nonlinearity: {self.nonlinearity}. Select from 'tanh' or 'relu'."
            )
        cell = f"rnn_{self.nonlinearity}"
        return self._run(cell, input, () if hx is None else (hx,))[0]

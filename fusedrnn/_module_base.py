"""The base of the layers that replace torch.nn's."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from ._run import StatesOfSteps, run_layers
from ._torchscript import refuse_script, refuse_trace

__all__ = ["_FusedRNNBase", "refuse_keywords"]


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

    def _run(
        self, input: Any, h0: Any, c0: Any, lengths: Any, starts: Any, return_states: Any
    ) -> tuple[Any, Tensor, Tensor | None, StatesOfSteps | None]:
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
            starts=starts,
            return_states=return_states,
        )


def refuse_keywords(owner: str, kwargs: dict[str, Any]) -> None:
    """Refuses the keywords of a constructor that torch.nn refuses."""
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in kwargs:
        raise TypeError(f"{owner}.__init__() got an unexpected keyword argument '{name}'")

"""Layers and a model to convert, and comparisons of them before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: fusedrnn.FusedLSTM,
    nn.GRU: fusedrnn.FusedGRU,
    nn.RNN: fusedrnn.FusedRNN,
    nn.LSTMCell: fusedrnn.FusedLSTMCell,
    nn.GRUCell: fusedrnn.FusedGRUCell,
    nn.RNNCell: fusedrnn.FusedRNNCell,
}

# All layers have I = 3 and H = 5.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(3, 5),
    "lstm-deep": lambda: nn.LSTM(3, 5, 2, batch_first=True, dropout=0.5, bidirectional=True),
    "lstm-projected": lambda: nn.LSTM(3, 5, 2, proj_size=2),
    "lstm-no-bias": lambda: nn.LSTM(3, 5, bias=False),
    "gru": lambda: nn.GRU(3, 5, 2, bidirectional=True),
    "rnn-tanh": lambda: nn.RNN(3, 5),
    "rnn-relu": lambda: nn.RNN(3, 5, 2, nonlinearity="relu"),
    "lstm-cell": lambda: nn.LSTMCell(3, 5),
    "gru-cell": lambda: nn.GRUCell(3, 5, bias=False),
    "rnn-cell-relu": lambda: nn.RNNCell(3, 5, nonlinearity="relu"),
}


class Tagger(nn.Module):
    """A model with a recurrent layer in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)
        self.stack = nn.Sequential(nn.GRU(3, 5, batch_first=True))
        self.levels = nn.ModuleList([nn.LSTM(5, 5, batch_first=True), nn.Identity()])
        self.by_name = nn.ModuleDict({"deep": nn.ModuleDict({"rnn": nn.RNN(5, 4)})})
        self.cell = nn.LSTMCell(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.stack(self.embedding(ids))
        x, _ = self.levels[0](self.levels[1](x))
        _, h_n = self.by_name["deep"]["rnn"](x.transpose(0, 1))  # type: ignore[index, operator]
        h, _ = self.cell(h_n[-1])
        return self.head(h)


RECURRENT = ["stack.0", "levels.0", "by_name.deep.rnn", "cell"]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in the result of a layer or model."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, tuple):
        return [t for v in value for t in tensors(v)]
    return [value]


def sequence_for(module: nn.Module) -> Tensor:
    """An input that any of LAYERS takes."""
    parameter = next(module.parameters())
    shape = (4, 3) if isinstance(module, nn.RNNCellBase) else (6, 4, 3)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def run(module: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and the gradients of x and of all parameters. Dropout always uses one seed."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    module.zero_grad()
    results = tensors(module(x))
    torch.stack([y.square().sum() for y in results]).sum().backward()
    return results, [x.grad, *(p.grad.clone() for p in module.parameters())]  # type: ignore[union-attr, list-item]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def assert_flat_weights(module: nn.Module) -> None:
    """Asserts that `_flat_weights`, which torch.nn's layers compute with, holds the parameters."""
    if isinstance(module, nn.RNNBase):
        assert len(module._flat_weights) == len(module._flat_weights_names)
        for name, weight, reference in zip(
            module._flat_weights_names, module._flat_weights, module._flat_weight_refs, strict=True
        ):
            assert weight is getattr(module, name)
            assert reference is not None
            assert reference() is weight

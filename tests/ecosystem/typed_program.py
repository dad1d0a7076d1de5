"""A program that uses every public name. test_typing.py runs it, and checks it with mypy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fusedrnn
from fusedrnn import (
    FusedGRU,
    FusedGRUCell,
    FusedLSTM,
    FusedLSTMCell,
    FusedRNN,
    FusedRNNCell,
    convert,
    functional,
    patch_torch,
    revert,
    show_config,
    to_torch,
)

State = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    """A model with the annotations that a user would write."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = FusedLSTM(3, hidden, num_layers=2, dropout=0.1, bidirectional=True)
        self.gru = FusedGRU(2 * hidden, hidden, reset_after=False, dtype=torch.float32)
        self.rnn = FusedRNN(hidden, hidden, nonlinearity="relu", device="cpu")

    def forward(self, x: Tensor, lengths: Tensor | list[int] | None = None) -> Tensor:
        y, (h_n, c_n) = self.lstm.forward(x, lengths=lengths)
        assert_type(y, Tensor)
        assert_type(h_n, Tensor)
        assert_type(c_n, Tensor)
        y, h_n = self.gru.forward(y)
        y, h_n = self.rnn.forward(y, h_n)
        return y


def beginnings(x: Tensor, starts: Tensor) -> None:
    lstm, gru = FusedLSTM(3, 4), FusedGRU(3, 4)
    assert_type(lstm.forward(x, None, None, starts), tuple[Tensor, State])
    states = lstm.forward(x, starts=starts, return_states=True)
    assert_type(states, tuple[Tensor, State, State])
    assert_type(gru.forward(x, return_states=True), tuple[Tensor, Tensor, Tensor])
    weights = list(gru.parameters())
    assert_type(functional.gru(x, None, weights, starts=starts), tuple[Tensor, Tensor])
    every = functional.gru(x, None, weights, return_states=True)
    assert_type(every, tuple[Tensor, Tensor, Tensor])


def packed(x: PackedSequence) -> None:
    lstm, gru, rnn = FusedLSTM(3, 4), FusedGRU(3, 4), FusedRNN(3, 4)
    assert_type(lstm.forward(x), tuple[PackedSequence, State])
    assert_type(lstm.forward(x, None), tuple[PackedSequence, State])
    assert_type(gru.forward(x), tuple[PackedSequence, Tensor])
    assert_type(rnn.forward(x), tuple[PackedSequence, Tensor])
    try:
        lstm.forward(x, lengths=[1, 2])  # type: ignore[call-overload]
    except ValueError as error:
        print(error)


def tensors(x: Tensor) -> None:
    lstm, gru, rnn = FusedLSTM(3, 4), FusedGRU(3, 4), FusedRNN(3, 4)
    assert_type(lstm.forward(x), tuple[Tensor, State])
    _, state = lstm.forward(x, lengths=torch.tensor([3, 5]))
    assert_type(lstm.forward(x, state), tuple[Tensor, State])
    assert_type(gru.forward(x, lengths=[3, 5]), tuple[Tensor, Tensor])
    gru.forward(x, lengths=range(5, 3, -1))
    gru.forward(x, lengths=(torch.tensor(3), torch.tensor(5)))
    gru.forward(x, lengths=np.array([3, 5]))
    gru.forward(x, lengths=[np.int32(3), np.int32(5)])
    assert_type(rnn.forward(x), tuple[Tensor, Tensor])
    # As in torch.nn, a call of the module itself is nn.Module.__call__, which has no types.
    again, _ = lstm(x, state)
    assert torch.equal(again, lstm.forward(x, state)[0])
    assert_type(gru.reset_after, bool)
    assert_type(rnn.nonlinearity, str)
    assert_type(lstm.hidden_size, int)
    lstm.flatten_parameters()


def cells(x: Tensor) -> None:
    lstm, gru, rnn = (
        FusedLSTMCell(3, 4),
        FusedGRUCell(3, 4),
        FusedRNNCell(3, 4, nonlinearity="relu"),
    )
    state = lstm.forward(x)
    assert_type(state, State)
    assert_type(lstm.forward(x, state), State)
    assert_type(gru.forward(x, state[0]), Tensor)
    assert_type(rnn.forward(x), Tensor)
    assert_type(gru.reset_after, bool)


def functions(x: Tensor) -> None:
    lstm, gru, rnn = FusedLSTM(3, 4), FusedGRU(3, 4), FusedRNN(3, 4)
    assert_type(functional.lstm(x, None, list(lstm.parameters())), tuple[Tensor, State])
    assert_type(fusedrnn.functional.gru(x, None, list(gru.parameters())), tuple[Tensor, Tensor])
    assert_type(functional.rnn(x, None, tuple(rnn.parameters())), tuple[Tensor, Tensor])
    p = pack_sequence([x[:, 0], x[:3, 1]])
    assert_type(functional.lstm(p, None, list(lstm.parameters())), tuple[PackedSequence, State])
    assert_type(functional.gru(p, None, list(gru.parameters())), tuple[PackedSequence, Tensor])
    assert_type(functional.rnn(p, None, list(rnn.parameters())), tuple[PackedSequence, Tensor])
    functional.gru(x, None, list(gru.parameters()), lengths=np.array([3, 5]))


def conversion(model: Tagger) -> None:
    torchs = nn.LSTM(3, 4)
    assert_type(convert(torchs), nn.LSTM)
    assert_type(revert(torchs), nn.LSTM)
    model.gru.reset_after = True
    # torch.nn's GRU has the same weights, but only with reset_after.
    assert_type(to_torch(model), Tagger)
    with patch_torch() as nothing:
        assert_type(nothing, None)
        nn.GRU(3, 4)


@patch_torch()
def build(size: int) -> nn.Module:
    return nn.GRU(size, 4)


def main() -> None:
    x = torch.randn(5, 2, 3)
    assert Tagger(4)(x, lengths=[5, 2]).shape == (5, 2, 4)
    packed(pack_sequence([x[:, 0], x[:3, 1]]))
    tensors(x)
    beginnings(x, torch.zeros(5, 2, dtype=torch.bool))
    cells(x[0])
    functions(x)
    conversion(Tagger(4))
    assert_type(build(3), nn.Module)
    assert isinstance(build(3), FusedGRU)
    assert_type(fusedrnn.__version__, str)
    show_config()


if __name__ == "__main__":
    main()

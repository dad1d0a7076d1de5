"""Nested tensors of layout jagged as input: the results of a padded batch with lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fusedrnn
from tests.kit.layers import (
    BY_NAME,
    CELLS,
    Cell,
    assert_close,
    flat,
    make_states,
    map_tensors,
    randn,
)

f64 = torch.float64


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def layer_of(cell: Cell, device: torch.device, **options: Any) -> Any:
    return cell.make(3, 5, device=device, dtype=f64, **options)[0]


@pytest.mark.parametrize("lengths", [[4, 0, 7, 2], [3, 3], [1], [0, 5]])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_as_lengths(device: torch.device, cell: Cell, lengths: list[int]) -> None:
    N, T = len(lengths), max(lengths)
    for options in ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True}):
        layer = layer_of(cell, device, **options)
        layer_of_padded = layer_of(cell, device, **options | {"batch_first": False})
        layer_of_padded.load_state_dict(layer.state_dict())
        parts = [randn(n, 3, device=device).requires_grad_() for n in lengths]
        begins = [(torch.rand(n) < 0.3).to(device) for n in lengths]
        hx = map_tensors(lambda s: s.requires_grad_(), make_states(layer, N, f64))
        for given in (hx, None):
            got = layer(nested(parts), given, starts=nested(begins), return_states=True)
            y, last, every = layer_of_padded(
                pad_sequence(parts), given, lengths, pad_sequence(begins), return_states=True
            )
            rows = torch.cat([y[:length, n] for n, length in enumerate(lengths)])
            assert got[0].offsets().tolist()[1:] == torch.tensor(lengths).cumsum(0).tolist()
            assert_close(got[0].values(), rows)
            for a, b in zip(flat(got[1]), flat(last), strict=True):
                assert_close(a, b)
            for a, b in zip(flat(got[2]), flat(every), strict=True):
                assert_close(a, torch.cat([b[:, :k, n] for n, k in enumerate(lengths)], 1))
            inputs = [*parts, *flat(given)]
            weights = [torch.randn_like(t) for t in (rows, *flat(last), *flat(every)[:1])]
            states = flat(got[2])[0]
            expected = torch.cat([flat(every)[0][:, :k, n] for n, k in enumerate(lengths)], 1)
            weights[-1] = torch.randn_like(expected)
            d = torch.autograd.grad(
                [got[0].values(), *flat(got[1]), states], inputs, weights, materialize_grads=True
            )
            wanted = torch.autograd.grad(
                [rows, *flat(last), expected], inputs, weights, materialize_grads=True
            )
            for a, b in zip(d, wanted, strict=True):
                assert_close(a, b)
        assert y.size(0) == T


def test_the_result_fits_the_input(device: torch.device) -> None:
    """It has the ragged size of the input, so torch adds the two."""
    layer = layer_of(BY_NAME["gru"], device)
    x = nested([randn(4, 3, device=device), randn(2, 3, device=device)])
    y, _ = layer(x)
    assert y.shape[:2] == x.shape[:2] and (y[..., :3] + x).shape == x.shape


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_no_rows(device: torch.device, cell: Cell) -> None:
    layer = layer_of(cell, device)
    empty = nested([randn(0, 3, device=device)] * 2)
    hx = make_states(layer, 2, f64)
    y, states, every = layer(empty, hx, return_states=True)
    assert y.is_nested and y.values().shape[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(flat(states), flat(hx), strict=True))
    assert all(s.shape[:2] == (1, 0) for s in flat(every))


def test_space_between_the_sequences(device: torch.device) -> None:
    """torch.nested.narrow makes a tensor that has lengths beside its offsets."""
    layer = layer_of(BY_NAME["lstm"], device)
    padded = randn(3, 6, 3, device=device).requires_grad_()
    lengths = torch.tensor([2, 6, 1], device=device)
    x = torch.nested.narrow(padded, 1, torch.zeros_like(lengths), lengths, layout=torch.jagged)
    assert x.lengths() is not None
    y, _ = layer(x)
    expected, _ = layer(padded.transpose(0, 1), lengths=[2, 6, 1])
    for n, part in enumerate(y.unbind()):
        assert_close(part, expected[: len(part), n])
    assert [len(part) for part in y.unbind()] == [2, 6, 1]


@pytest.mark.parametrize(
    ("offsets", "lengths", "parts"),
    [
        ([2, 4, 7], None, [(2, 4), (4, 7)]),  # rows before the first and after the last sequence
        ([0, 4, 7], None, [(0, 4), (4, 7)]),
        ([0, 4, 9], [3, 2], [(0, 3), (4, 6)]),
        ([0, 4, 9], [0, 5], [(0, 0), (4, 9)]),
    ],
)
def test_rows_of_no_sequence(
    offsets: list[int], lengths: list[int] | None, parts: list[tuple[int, int]]
) -> None:
    """y has the rows of the sequences alone. Gradients reach the values."""
    layer = layer_of(BY_NAME["gru"], torch.device("cpu"))
    values = randn(9, 3).requires_grad_()
    given = None if lengths is None else torch.tensor(lengths)
    x = torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets), given)
    y, _ = layer(x)
    expected = [layer(values[a:b].unsqueeze(1))[0].squeeze(1) for a, b in parts if b > a]
    assert_close(y.values(), torch.cat(expected))
    bounds = torch.tensor([0, *(b - a for a, b in parts)]).cumsum(0)
    assert y.offsets().tolist() == bounds.tolist()
    (d,) = torch.autograd.grad(y.values().sin().sum(), values)
    (wanted,) = torch.autograd.grad(torch.cat(expected).sin().sum(), values)
    assert_close(d, wanted)


def test_one_long_sequence_among_many_short_ones() -> None:
    """Memory is that of the rows: T times N would be 10 GB of indices here."""
    layer = layer_of(BY_NAME["rnn_tanh"], torch.device("cpu"))
    lengths = [50_000] + [1] * 25_000
    x = torch.nested.nested_tensor_from_jagged(
        randn(75_000, 3), torch.tensor([0, *lengths]).cumsum(0)
    )
    with torch.no_grad():
        y, h_n = layer(x)
    assert torch.equal(y.values()[50_000:], h_n[0, 1:])


def test_a_default_device_does_not_matter() -> None:
    layer = layer_of(BY_NAME["gru"], torch.device("cpu"))
    x = nested([randn(4, 3), randn(2, 3)])
    expected, _ = layer(x)
    with torch.device("meta"):
        y, _ = layer(x)
    assert torch.equal(y.values(), expected.values())


class TestErrors:
    layer = fusedrnn.FusedGRU(3, 5)
    x = nested([torch.zeros(4, 3), torch.zeros(2, 3)])

    @pytest.mark.parametrize(
        ("error", "message", "how"),
        [
            (ValueError, "lengths must be None with a nested tensor", {"lengths": [4, 2]}),
            (
                TypeError,
                r"starts must be a nested tensor \[N, j\] of layout jagged",
                {"starts": torch.zeros(4, 2, dtype=torch.bool)},
            ),
            (RuntimeError, r"Expected hidden size \(1, 2, 5\), got", {"hx": torch.zeros(1, 3, 5)}),
            (
                RuntimeError,
                r"starts must have the lengths of the input, \[4, 2\], got \[3, 3\]",
                {"starts": nested([torch.zeros(3, dtype=torch.bool)] * 2)},
            ),
            (
                RuntimeError,
                "starts must be bool",
                {"starts": nested([torch.zeros(4), torch.zeros(2)])},
            ),
        ],
    )
    def test_arguments(self, error: type[Exception], message: str, how: dict[str, Any]) -> None:
        with pytest.raises(error, match=message):
            self.layer(self.x, **how)

    def test_offsets(self) -> None:
        for offsets in ([0, 4, 2, 5], [0, 4, 9]):
            x = torch.nested.nested_tensor_from_jagged(torch.zeros(6, 3), torch.tensor(offsets))
            with pytest.raises(RuntimeError, match="input must have its sequences within its 6"):
                self.layer(x)

    def test_starts_of_a_dense_input(self) -> None:
        starts = nested([torch.zeros(4, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)])
        with pytest.raises(RuntimeError, match="for such an input, got a nested one"):
            self.layer(torch.zeros(4, 2, 3), starts=starts)

    def test_dimensions(self) -> None:
        with pytest.raises(ValueError, match=r"input must be a nested tensor \[N, j, I\] whose"):
            self.layer(nested([torch.zeros(4, 3, 2)]))

    def test_features(self) -> None:
        with pytest.raises(RuntimeError, match=r"input_size. Expected 3, got 4"):
            self.layer(nested([torch.zeros(4, 4)]))

    def test_in_a_graph(self) -> None:
        compiled = torch.compile(self.layer, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="in a compiled graph, got a nested one"):
            compiled(self.x)

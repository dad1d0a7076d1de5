"""`lengths=` on padded input: what it computes, and that padding is never read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from tests.helpers import (
    BY_NAME,
    CELLS,
    Cell,
    assert_close,
    assert_same,
    flat,
    make_states,
    map_tensors,
    on,
    pad,
    ragged,
    randn,
    run,
)

NAN = float("nan")
f64 = torch.float64


def as_padded(y: Any, T: int) -> Tensor:
    y, _ = pad_packed_sequence(y, total_length=T)
    return y


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_as_a_packed_sequence(
    device: torch.device, cell: Cell, num_layers: int, batch_first: bool
) -> None:
    T, lengths = 7, [3, 6, 1, 6, 2]
    for bidirectional in (False, True):
        ours, theirs = cell.make(
            4,
            5,
            device=device,
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            dtype=f64,
        )
        sequences = ragged(lengths, 4)
        packed = pack_sequence(sequences, enforce_sorted=False)
        padded = pad(sequences, T, NAN, batch_first)
        for hx in (None, make_states(theirs, 5, f64)):
            y, states = theirs(packed, hx)
            for given in (lengths, tuple(lengths), torch.tensor(lengths)):
                got = ours(on(device, padded), on(device, hx), lengths=given)
                expected = as_padded(y, T)
                expected = expected.transpose(0, 1) if batch_first else expected
                for a, b in zip(flat(got), [expected, *flat(states)], strict=True):
                    assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradients_and_padding(device: torch.device, cell: Cell) -> None:
    """Any padding gives the bits that another padding gives, and gradient 0 in the padding."""
    T, lengths = 7, [3, 0, 7, 1, 0, 2]
    ours, theirs = cell.make(4, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    sequences = ragged(lengths, 4)
    hx = make_states(theirs, 6, f64)
    beyond = torch.arange(T).unsqueeze(1) >= torch.tensor(lengths)
    runs = []
    for fill in (NAN, float("inf"), 0.0, 1.5):
        result = run(ours, pad(sequences, T, fill), hx, lengths=lengths)
        assert (result["y"][beyond] == 0).all()
        assert (result["d_x"][beyond] == 0).all()
        runs.append(result)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])

    # Row by row, each without padding, with the same weights of the loss.
    total = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    cotangents = [randn(*runs[0][k].shape, seed=1000 + i) for i, k in enumerate(outputs(cell))]
    for n, L in enumerate(lengths):
        row = map_tensors(lambda t, n=n: t[:, n : n + 1], hx)  # type: ignore[misc]
        states = [t.requires_grad_() for t in flat(map_tensors(Tensor.clone, row))]
        if L == 0:
            for name, t, cotangent in zip(("h_n", "c_n"), states, cotangents[1:], strict=False):
                assert torch.equal(runs[0][name][:, n : n + 1], t)
                assert torch.equal(runs[0]["d_" + name[0] + "0"][:, n], cotangent[:, n])
            continue
        x = sequences[n].unsqueeze(1).requires_grad_()
        results = flat(theirs(x, tuple(states) if cell.has_c else states[0]))
        weights = [cotangents[0][:L, n : n + 1], *(c[:, n : n + 1] for c in cotangents[1:])]
        gradients = torch.autograd.grad(results, [x, *states, *theirs.parameters()], weights)
        assert_close(runs[0]["y"][:L, n : n + 1], results[0])
        assert_close(runs[0]["d_x"][:L, n : n + 1], gradients[0])
        for name, got, gradient in zip(("h", "c"), results[1:], gradients[1:], strict=False):
            assert_close(runs[0][f"{name}_n"][:, n : n + 1], got)
            assert_close(runs[0][f"d_{name}0"][:, n : n + 1], gradient)
        for name, gradient in zip(total, gradients[1 + len(states) :], strict=True):
            total[name] += gradient
    for name, gradient in total.items():
        assert_close(runs[0]["d_" + name], gradient)


def outputs(cell: Cell) -> list[str]:
    return ["y", "h_n", "c_n"] if cell.has_c else ["y", "h_n"]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_full_lengths_are_no_lengths(device: torch.device, cell: Cell) -> None:
    ours, _ = cell.make(4, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x, hx = randn(6, 3, 4), make_states(ours, 3, f64)
    assert_same(run(ours, x, hx, lengths=[6, 6, 6]), run(ours, x, hx))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_nothing_lives(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(4, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x, hx = torch.full((3, 2, 4), NAN, dtype=f64), make_states(theirs, 2, f64)
    result = run(ours, x, hx, lengths=[0, 0])
    assert (result["y"] == 0).all()
    assert (result["d_x"] == 0).all()
    assert torch.equal(result["h_n"], flat(hx)[0])
    for name, p in theirs.named_parameters():
        assert torch.equal(result["d_" + name], torch.zeros_like(p)), name


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_no_rows(device: torch.device, cell: Cell) -> None:
    ours, _ = cell.make(4, 5, device=device, dtype=f64)
    for lengths in ([], torch.zeros(0, dtype=torch.int64)):
        y, _ = ours(randn(3, 0, 4, device=device), lengths=lengths)
        assert y.shape == (3, 0, ours.proj_size or 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_lengths_in_other_dtypes(device: torch.device, cell: Cell, dtype: torch.dtype) -> None:
    lengths = [3, 0, 5, 2]
    ours, _ = cell.make(4, 9, device=device, bidirectional=True, dtype=dtype)
    sequences = ragged(lengths, 4, dtype, device=device)
    y, states = ours(pad(sequences, 5, NAN), lengths=lengths)
    assert y.dtype == dtype
    for n, L in enumerate(lengths):
        if L:
            alone, ends = ours(sequences[n].unsqueeze(1))
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(y[:L, n : n + 1], alone, rtol=tolerance, atol=tolerance)
            for a, b in zip(flat(states), flat(ends), strict=True):
                torch.testing.assert_close(a[:, n : n + 1], b, rtol=tolerance, atol=tolerance)


def test_lengths_are_positional_too(device: torch.device) -> None:
    ours, _ = BY_NAME["gru"].make(4, 5, device=device)
    x = torch.randn(3, 2, 4, device=device)
    assert torch.equal(ours(x, None, [1, 3])[0], ours(x, lengths=torch.tensor([1, 3]))[0])


def test_lengths_and_dropout(device: torch.device) -> None:
    """Dropout between layers falls on the padded output: zeros of the padding stay zeros."""
    ours, _ = BY_NAME["lstm"].make(4, 5, device=device, num_layers=2, dropout=0.5, dtype=f64)
    x = pad(ragged([2, 5, 3], 4), 5, NAN)
    first, second = run(ours, x, lengths=[2, 5, 3]), run(ours, x, lengths=[2, 5, 3], seed=1)
    assert not first["y"].isnan().any()
    assert not torch.equal(first["y"], second["y"])
    assert (first["y"][2:, 0] == 0).all()

"""fusedrnn._reference, through which double backward runs, compared with torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from fusedrnn import _ops, _reference
from fusedrnn._library import CELLS as SPECS
from fusedrnn._options import Batch, Options, batch_of
from tests.kit.layers import CELLS, Cell, flat, make_states, pad, ragged, randn

f64 = torch.float64


def call(module: torch.nn.RNNBase, cell: Cell, x: Tensor, hx: object, **kwargs: Tensor) -> tuple:
    """Runs the reference with a module's weights."""
    h0, c0 = [*flat(hx), None, None][:2]
    weights = list(module.parameters())
    options = Options(cell.name, bool(module.bidirectional))
    return _reference.layer(x, h0, c0, weights, batch_of(x, **kwargs), options)


def compare(actual: tuple, expected: list[Tensor]) -> None:
    results = [t for t in actual if t is not None]
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_it_has_every_cell() -> None:
    assert set(_reference.STEPS) == set(SPECS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_plain_and_packed(cell: Cell, bidirectional: bool, bias: bool) -> None:
    _, theirs = cell.make(3, 5, bidirectional=bidirectional, bias=bias, dtype=f64)
    packed = pack_sequence(ragged([6, 4, 4, 1], 3))
    for hx in (None, make_states(theirs, 4, f64)):
        x = randn(6, 4, 3).requires_grad_()
        actual, expected = call(theirs, cell, x, hx), flat(theirs(x, hx))
        compare(actual, expected)
        targets = [x, *theirs.parameters()]
        for got, wanted in zip(
            torch.autograd.grad(sum(t.sin().sum() for t in actual if t is not None), targets),
            torch.autograd.grad(sum(t.sin().sum() for t in expected), targets),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        actual = call(theirs, cell, packed.data, hx, batch_sizes=packed.batch_sizes)
        compare(actual, flat(theirs(packed, hx)))


@pytest.mark.parametrize("lengths", [[3, 0, 6, 1], [6, 6, 6, 6], [0, 0, 0, 0], [0, 2, 0, 0]])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_lengths_row_by_row(cell: Cell, lengths: list[int]) -> None:
    _, theirs = cell.make(3, 5, bidirectional=True, dtype=f64)
    sequences = ragged(lengths, 3)
    hx = make_states(theirs, 4, f64)
    x = pad(sequences, 6, float("nan")).requires_grad_()
    actual = call(theirs, cell, x, hx, lengths=torch.tensor(lengths))
    y, *states = [t for t in actual if t is not None]
    (d_x,) = torch.autograd.grad(y.sin().sum(), x, allow_unused=True)
    assert not d_x.isnan().any()
    for n, L in enumerate(lengths):
        assert (y[L:, n] == 0).all()
        row = [t[:, n : n + 1] for t in flat(hx)]
        wanted = row
        if L > 0:
            alone, *wanted = flat(
                theirs(sequences[n].unsqueeze(1), tuple(row) if cell.has_c else row[0])
            )
            torch.testing.assert_close(y[:L, n : n + 1], alone, rtol=1e-12, atol=1e-12)
        for got, end in zip(states, wanted, strict=True):
            torch.testing.assert_close(got[:, n : n + 1], end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_other_dtypes(cell: Cell, dtype: torch.dtype) -> None:
    """Results are within one rounding of the float64 result, and autocast changes no bit."""
    ours, _ = cell.make(3, 5, bidirectional=True, dtype=dtype)
    x, hx = randn(6, 4, 3, dtype=dtype), make_states(ours, 4, dtype)
    results = [t for t in call(ours, cell, x, hx) if t is not None]
    assert {t.dtype for t in results} == {dtype}
    wide = [t.double() for t in flat(hx)]
    ours.double()
    exact = [t for t in call(ours, cell, x.double(), wide) if t is not None]
    eps = torch.finfo(dtype).eps
    slack = 20 if dtype == torch.float32 else 1
    for got, wanted in zip(results, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=slack * eps, atol=slack * eps)
    ours.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = [t for t in call(ours, cell, x, hx) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.parametrize("kind", ["plain", "packed", "lengths"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_op_agrees(cell: Cell, kind: str) -> None:
    ours, _ = cell.make(4, 19, bidirectional=True, dtype=f64)
    options: dict[str, Tensor] = {}
    x = randn(7, 5, 4)
    if kind == "packed":
        packed = pack_sequence(ragged([7, 5, 5, 2, 1], 4))
        x, options = packed.data, {"batch_sizes": packed.batch_sizes}
    elif kind == "lengths":
        options = {"lengths": torch.tensor([2, 7, 0, 5, 7])}
    hx = make_states(ours, 5, f64)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in flat(hx)), *ours.parameters()]
    results = []
    for layer in (_ops.layer, _reference.layer):
        h0, c0 = [*flat(hx), None][:2]
        batch = batch_of(x, **options)
        outputs = layer(x, h0, c0, list(ours.parameters()), batch, Options(cell.name, True))
        present = [t for t in outputs if t is not None]
        loss = sum((t * randn(*t.shape, seed=k)).sum() for k, t in enumerate(present))
        results.append([*present, *torch.autograd.grad(loss, leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_it_can_be_derived_twice(cell: Cell) -> None:
    """Second derivatives pass gradgradcheck for the smooth cells."""
    if cell.name == "rnn_relu":
        pytest.skip("not smooth")
    ours, _ = cell.make(2, 3, bidirectional=True, dtype=f64)
    h0, c0 = [*flat(make_states(ours, 3, f64)), None][:2]
    leaves = [
        t.detach().requires_grad_()
        for t in (randn(3, 3, 2), h0, c0, *ours.parameters())
        if t is not None
    ]

    def function(*tensors: Tensor) -> list[Tensor]:
        x, h, *rest = tensors
        c = rest.pop(0) if cell.has_c else None
        lengths = torch.tensor([2, 3, 1])
        batch = Batch(None, lengths, x.shape[1])
        results = _reference.layer(x, h, c, rest, batch, Options(cell.name, True))
        return [t for t in results if t is not None]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)

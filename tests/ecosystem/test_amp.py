"""Automatic mixed precision: training under autocast in both 16-bit types, with GradScaler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from tests.kit.layers import CELLS, Cell, error, randn

DTYPES = [torch.bfloat16, torch.float16]


class Regression(nn.Module):
    """A layer, and a linear layer on its last output."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        result: Tensor = self.head(y[-1])
        return result


def regression(cell: Cell) -> Regression:
    layer, _ = cell.make(3, 8, num_layers=2, bidirectional=True)
    return Regression(layer, 8 if cell.projects else 16)


def scaled_gradients(model: nn.Module, dtype: torch.dtype, scaler: Any) -> dict[str, Tensor]:
    x = randn(6, 4, 3, dtype=torch.float32, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
        assert y.dtype == dtype
        loss = y.float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradients_through_autocast_and_scaler(cell: Cell, dtype: torch.dtype) -> None:
    """The gradients are float32, and differ from float64's by errors of the 16-bit type."""
    model = regression(cell)
    exact = copy.deepcopy(model).double()
    exact(randn(6, 4, 3, seed=5).float().double()).square().mean().backward()
    gradients = scaled_gradients(model, dtype, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    limit = 10 * torch.finfo(dtype).eps
    for name, p in exact.named_parameters():
        assert p.grad is not None
        assert gradients[name].dtype == torch.float32
        assert error(gradients[name], p.grad) < limit, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_training(cell: Cell, dtype: torch.dtype) -> None:
    """The first losses equal those in float32 up to the 16-bit type's error, and the loss falls."""
    runs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = regression(cell)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        # The scale is so small that no gradient overflows in float16.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        losses = []
        for step in range(40):
            x = randn(6, 16, 3, dtype=torch.float32, seed=step)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                y = model(x)
            loss = (y.float() - x.sum(0).mean(1, keepdim=True)).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
        runs.append(losses)
    assert runs[1][:5] == pytest.approx(runs[0][:5], rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_scale_that_overflows_skips_the_step(cell: Cell) -> None:
    """float16 gradients beyond 65504 are inf; the scaler finds them and halves its scale."""
    model = regression(cell)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x = randn(6, 4, 3, dtype=torch.float32)
    scales, stepped = [], []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        stepped.append(not all(torch.equal(p, before[n]) for n, p in model.named_parameters()))
        if stepped[-1]:
            break
    assert scales[0] == 2.0**39
    assert not stepped[0]
    assert stepped[-1]
    assert all(p.isfinite().all() for p in model.parameters())


def count(cell: Any, steps: int, dtype: torch.dtype | None) -> Tensor:
    """c of a cell module after `steps` steps. All its gates are 1, so c grows by 1 each step."""
    with torch.no_grad():
        for p in cell.parameters():
            p.zero_()
        cell.bias_ih.fill_(20.0)
        weight = cell.weight_ih
        state = (weight.new_zeros(1, 1), weight.new_zeros(1, 1))
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            for _ in range(steps):
                state = cell(weight.new_zeros(1, 1), state)
    return state[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_counts_beyond_16_bits(dtype: torch.dtype) -> None:
    """c stays float32 between steps: in bfloat16 it would stop at 256, in float16 at 2048."""
    c = count(fusedrnn.FusedLSTMCell(1, 1), 3000, dtype)
    exact = count(nn.LSTMCell(1, 1, dtype=torch.float64), 3000, None)
    assert c.dtype == torch.float32
    assert c.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_c_through_many_steps(dtype: torch.dtype, compiled: bool) -> None:
    """With forget gates near 1, errors in c add up.

    Ours may be twice as large as those of torch.nn's cell module, whose c is float32 too.
    """
    steps = 50 if compiled else 1000
    torch.manual_seed(0)
    theirs = nn.LSTMCell(16, 32)
    with torch.no_grad():
        theirs.bias_hh[32:64] += 5.0
    ours, exact = fusedrnn.FusedLSTMCell(16, 32), nn.LSTMCell(16, 32).double()
    for cell in (ours, exact):
        cell.load_state_dict(theirs.state_dict())
    x = randn(steps, 4, 16, seed=1).float()
    finals = []
    for cell in (ours, theirs, exact):
        run: Any = torch.compile(cell, backend="aot_eager") if cell is ours and compiled else cell
        own = torch.float64 if cell is exact else torch.float32
        state = (torch.zeros(4, 32, dtype=own), torch.zeros(4, 32, dtype=own))
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=cell is not exact):
            for row in x.to(own):
                state = run(row, state)
        finals.append(state[1])
    assert finals[0].dtype == finals[1].dtype == torch.float32
    assert error(finals[0], finals[2]) <= 2 * error(finals[1], finals[2])


@pytest.mark.parametrize("N", [(3,), ()], ids=str)
@pytest.mark.parametrize("c_dtype", [torch.float32, *DTYPES], ids=str)
def test_dtypes_of_c(c_dtype: torch.dtype, N: tuple[int, ...]) -> None:
    """Under autocast c may have any of these dtypes. c_n is float32; c's gradient has c's dtype."""
    cell = fusedrnn.FusedLSTMCell(3, 4)
    x, h = randn(*N, 3, seed=1).float(), randn(*N, 4, seed=2).bfloat16()
    c = randn(*N, 4, seed=3).to(c_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h_n, c_n = cell(x, (h, c))
        fresh = cell(x)
    assert (h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)
    assert [t.dtype for t in fresh] == [torch.bfloat16, torch.float32]
    assert [t.shape for t in fresh] == [t.shape for t in (h_n, c_n)]
    exact = copy.deepcopy(cell).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.bfloat16())
    wide = c.detach().double().requires_grad_()
    h_e, c_e = exact(x.bfloat16().double(), (h.double(), wide))
    grad = randn(*N, 4, seed=4).float()
    (d_c,) = torch.autograd.grad(c_n, c, grad, retain_graph=True)
    (d_e,) = torch.autograd.grad(c_e, wide, grad.double(), retain_graph=True)
    assert d_c.dtype == c_dtype
    # In c_n = f c + i g nothing is rounded to 16 bits; only the inputs of the gates are.
    assert error(c_n, c_e) < 1e-5
    assert error(d_c, d_e) < (1e-5 if c_dtype == torch.float32 else 1e-2)
    both = torch.autograd.grad((h_n.float() * grad).sum() + c_n.sum(), c)[0]
    both_e = torch.autograd.grad((h_e * grad).sum() + c_e.sum(), wide)[0]
    assert error(both, both_e) < 1e-2


def test_c_of_a_16_bit_module() -> None:
    """Without autocast c_n has the dtype of the module, as in torch.nn, or float32 if c has it."""
    cell = fusedrnn.FusedLSTMCell(3, 4, dtype=torch.bfloat16)
    compiled: Any = torch.compile(cell, backend="aot_eager")
    x = randn(2, 3).bfloat16()
    h, c = cell(x)
    assert h.dtype == c.dtype == torch.bfloat16
    for run in (cell, compiled):
        assert run(x, (h, c))[1].dtype == torch.bfloat16
        h_n, c_n = run(x, (h, c.float()))
        assert (h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(c_n.bfloat16(), run(x, (h, c))[1])


def test_second_derivatives_with_a_float32_c() -> None:
    cell, exact = fusedrnn.FusedLSTMCell(3, 4), fusedrnn.FusedLSTMCell(3, 4).double()
    exact.load_state_dict(cell.state_dict())
    results = []
    for module, own in ((cell, torch.float32), (exact, torch.float64)):
        x = randn(2, 3, seed=1).to(own).requires_grad_()
        c = randn(2, 4, seed=3).to(own).requires_grad_()
        h = torch.zeros(2, 4, dtype=torch.bfloat16 if module is cell else own)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=module is cell):
            h_n, c_n = module(x, (h, c))
        leaves = [x, c, *module.parameters()]
        loss = h_n.to(own).sin().sum() + c_n.sin().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        assert [g.dtype for g in first] == [own] * len(leaves)
        results.append(torch.autograd.grad(sum(g.sin().sum() for g in first), leaves))
    for got, wanted in zip(*results, strict=True):
        assert error(got, wanted) < 0.03


def test_a_layer_returns_its_states_in_the_dtype_of_autocast() -> None:
    """torch.nn.LSTM does the same. Inside the call c is float32."""
    ours, theirs = fusedrnn.FusedLSTM(3, 4), nn.LSTM(3, 4)
    x = randn(5, 2, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in (ours, theirs):
            y, hx = layer(x)
            _, again = layer(x, tuple(t.float() for t in hx))
            assert {t.dtype for t in (y, *hx, *again)} == {torch.bfloat16}

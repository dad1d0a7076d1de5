"""Automatic mixed precision: autocast in both 16-bit types, with GradScaler, in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import CELLS, Cell, error, randn

DTYPES = [torch.bfloat16, torch.float16]


class Regression(nn.Module):
    """A layer and a head on the last step."""

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
    """Float32 gradients of float32 weights, within the 16-bit type's error of float64's."""
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
    """The first losses are float32's, within the 16-bit type's error; the loss falls as well."""
    runs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = regression(cell)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        # Small enough that float16 takes every step.
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
    """float16 gradients beyond 65504 are inf, not wrong: the scaler sees them and halves."""
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

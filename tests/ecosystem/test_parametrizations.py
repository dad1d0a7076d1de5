"""Pruning and parametrizations during training. tests/layers/test_state.py checks single calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn
from tests.kit.layers import CELLS, TORCH_CELLS, Cell, assert_same, randn, run


def train(module: Any, steps: int = 4) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        y, _ = module(randn(5, 4, 3, seed=step))
        y.square().mean().backward()
        optimizer.step()


def trained_alike(cell: Cell, change: Callable[[Any], None]) -> Any:
    """Changes and trains our layer and torch.nn's, and compares their results; returns ours."""
    ours, theirs = cell.make(3, 6, num_layers=2, bidirectional=True, dtype=torch.float64)
    for module in (ours, theirs):
        torch.manual_seed(2)
        change(module)
        train(module)
    x = randn(4, 2, 3)
    assert_same(run(ours, x), run(theirs, x), limit=1e-9)
    return ours


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_orthogonal(cell: Cell) -> None:
    """The recurrent weight, as one [G*H, H] matrix, keeps orthogonal columns in training."""
    ours = trained_alike(cell, lambda m: parametrizations.orthogonal(m, "weight_hh_l1_reverse"))
    w = ours.weight_hh_l1_reverse
    torch.testing.assert_close(w.T @ w, torch.eye(w.shape[1], dtype=w.dtype), rtol=0, atol=1e-10)
    x = randn(4, 2, 3)
    y, _ = ours(x)
    assert torch.equal(copy.deepcopy(ours)(x)[0], y)
    parametrize.remove_parametrizations(ours, "weight_hh_l1_reverse")
    assert type(ours) is cell.ours
    assert torch.equal(ours(x)[0], y)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_weight_norm_in_training(cell: Cell) -> None:
    def change(module: nn.Module) -> None:
        for name in ("weight_ih_l0", "weight_hh_l0", "weight_hh_l1"):
            parametrizations.weight_norm(module, name)

    trained_alike(cell, change)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_pruning_in_training(cell: Cell) -> None:
    """Pruned weights stay zero while the others learn: whole units, and the smallest weights."""

    def change(module: nn.Module) -> None:
        prune.ln_structured(module, "weight_hh_l0", amount=2, n=2, dim=1)
        chosen = [(module, name) for name in ("weight_hh_l1", "weight_ih_l0", "weight_hh_l0")]
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.3)

    ours = trained_alike(cell, change)
    zeros = sum(int((getattr(ours, n) == 0).sum()) for n in ("weight_hh_l0", "weight_ih_l0"))
    assert zeros > 0
    for name in ("weight_hh_l1", "weight_ih_l0", "weight_hh_l0"):
        mask = getattr(ours, f"{name}_mask")
        assert torch.equal(getattr(ours, name) == 0, mask == 0)
        assert (getattr(ours, f"{name}_orig").grad[mask == 0] == 0).all()


@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_a_parametrized_state_dict_fits_torch_nn(cell: Cell) -> None:
    ours, theirs = cell.make(3, 6, num_layers=2, dtype=torch.float64)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
    train(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = randn(4, 2, 3)
    torch.testing.assert_close(theirs(x)[0], ours(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name: str) -> None:
    """Cell modules also take orthogonal, normalised and pruned weights."""
    theirs = getattr(nn, name)(3, 6, dtype=torch.float64)
    ours = getattr(fusedrnn, f"Fused{name}")(3, 6, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    for cell in (ours, theirs):
        torch.manual_seed(2)
        parametrizations.orthogonal(cell, "weight_hh")
        parametrizations.weight_norm(cell, "weight_ih")
        prune.l1_unstructured(cell, "bias_ih", 0.5)
    ours.load_state_dict(theirs.state_dict())
    x = randn(4, 3)
    assert_same(run(ours, x), run(theirs, x))

"""torch.optim.swa_utils: averages of fused layers equal those of torch.nn's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.kit.layers import CELLS, Cell, randn

AVERAGES = {"mean": None, "ema": get_ema_multi_avg_fn(0.9)}


class Normalised(nn.Module):
    """A layer and batch normalisation of its last output, for update_bn."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        result: Tensor = self.norm(y[-1])
        return result


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_averaged_model(cell: Cell, average: str) -> None:
    batches = [randn(5, 4, 3, seed=step) for step in range(6)]
    results = []
    for layer in cell.make(3, 8, num_layers=2, dtype=torch.float64):
        model = Normalised(layer, 4 if cell.projects else 8).double()
        averaged: Any = AveragedModel(model, multi_avg_fn=AVERAGES[average])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
        for x in batches:
            optimizer.zero_grad()
            model(x).sigmoid().square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            schedule.step()
        update_bn(batches, averaged)
        assert type(averaged.module.layer) is type(layer)
        assert not torch.equal(averaged.module.layer.weight_hh_l0, layer.weight_hh_l0)
        assert averaged.module.norm.num_batches_tracked == len(batches)
        averaged.eval()
        results.append({"y": averaged(batches[0]), **averaged.module.state_dict()})
    ours, theirs = results
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-11, atol=1e-12, msg=name)

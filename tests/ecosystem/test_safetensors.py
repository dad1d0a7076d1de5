"""safetensors: a fused layer and the torch.nn layer with the same weights make the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.kit.layers import CELLS, TORCH_CELLS, Cell, flat, randn

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

OPTIONS = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}


def outputs(module: nn.Module) -> list[torch.Tensor]:
    return flat(module.eval()(randn(4, 2, 3, seed=1)))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_saved_layer_is_read_back(cell: Cell, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    ours, theirs = cell.make(3, 5, **OPTIONS)
    safetensors.save_model(ours, path)
    other, _ = cell.make(3, 5, **OPTIONS)
    assert not torch.equal(outputs(other)[0], outputs(ours)[0])
    assert safetensors.load_model(other, path) == (set(), [])
    assert all(map(torch.equal, outputs(other), outputs(ours)))
    assert safetensors.load_model(theirs, path) == (set(), [])
    torch.testing.assert_close(outputs(theirs), outputs(ours), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_the_file_equals_that_of_torch_nn(cell: Cell, tmp_path: Path) -> None:
    ours, theirs = cell.make(3, 5, **OPTIONS)
    for name, module in (("ours", ours), ("theirs", theirs)):
        safetensors.save_model(module, tmp_path / name)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_shared_weights(cell: Cell, tmp_path: Path) -> None:
    """Shared weights are stored once, and a model that shares them keeps sharing them."""
    path = tmp_path / "layer.safetensors"

    def make() -> Any:
        module, _ = cell.make(3, 5, **OPTIONS)
        module.weight_hh_l1 = module.weight_hh_l0
        return module

    module, other = make(), make()
    safetensors.save_model(module, path)
    assert len(safetensors.load_file(path)) == len(module.state_dict()) - 1
    assert safetensors.load_model(other, path) == (set(), [])
    assert other.weight_hh_l1 is other.weight_hh_l0
    assert all(map(torch.equal, outputs(other), outputs(module)))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    lstm = CELLS[0]
    safetensors.save_model(lstm.make(3, 5)[0], path)
    with pytest.raises(RuntimeError, match="weight_ih_l1"):
        safetensors.load_model(lstm.make(3, 5, num_layers=2)[0], path)
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        safetensors.load_model(lstm.make(3, 6)[0], path)

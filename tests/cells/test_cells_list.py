"""Every place in Python that lists the cells has the cells of the list in C++."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fusedrnn import _reference, ops
from fusedrnn._library import LIBRARY
from tests.kit import numpy_reference
from tests.kit.arguments import make_arguments
from tests.kit.build import native
from tests.kit.layers import BY_NAME, CELL_MODULES, CELLS, FUNCTIONS, Cell


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A set to which every call of `ops.layer` and `ops.step` adds the cell that it runs."""
    names: set[str] = set()
    layer, step = ops.layer, ops.step

    def recording(*args: Any, cell: str, **kwargs: Any) -> Any:
        names.add(cell)
        return layer(*args, cell=cell, **kwargs)

    def recording_step(*args: Any) -> Any:
        names.add(inspect.signature(step).bind(*args).arguments["cell"])
        return step(*args)

    monkeypatch.setattr(ops, "layer", recording)
    monkeypatch.setattr(ops, "step", recording_step)
    return names


def test_lists() -> None:
    wanted = list(LIBRARY.cells)
    assert native().cells() == wanted
    assert list(_reference.STEPS) == wanted
    assert list(numpy_reference.STEPS) == wanted
    assert list(BY_NAME) == wanted
    assert list(FUNCTIONS) == wanted


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_layer_and_the_function_run_the_cell(seen: set[str], cell: Cell) -> None:
    layer, _ = cell.make(4, 6)
    layer(torch.randn(2, 3, 4, dtype=layer.weight_ih_l0.dtype))
    assert seen == {cell.name}
    seen.clear()
    call = make_arguments(cell.name, D=1, requires_grad=False)
    FUNCTIONS[cell.name](call.x, call.h0 if call.c0 is None else (call.h0, call.c0), call.weights)
    assert seen == {cell.name}


@pytest.mark.parametrize("cell", CELL_MODULES)
def test_the_module_of_one_step_runs_the_cell(seen: set[str], cell: str) -> None:
    CELL_MODULES[cell](4, 6)(torch.randn(3, 4))
    assert seen == {cell}


@pytest.mark.parametrize("cell", LIBRARY.cells)
def test_constants(cell: str) -> None:
    """The op agrees with the cell's constants in the library: T=5, N=3, H=6, P=3 or 6, D=2."""
    spec = LIBRARY.cells[cell]
    call = make_arguments(cell, requires_grad=False)
    y, _, c_n, reserve = torch.ops.fusedrnn.forward(*call.op_arguments())
    assert spec.name == cell
    assert spec.has_c == (c_n.numel() > 0)
    P = 3 if spec.projects else 6
    assert y.shape == (5, 3, 2 * P)
    saved = 3 if spec.saves_h else 5 * 3 * spec.saved
    assert reserve.numel() == 2 * (saved * 6 + 5 * 3 * ((spec.has_c + (spec.stages > 1)) * 6 + P))

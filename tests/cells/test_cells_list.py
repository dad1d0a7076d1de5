"""Every place in Python that lists the cells has the cells of the list in C++."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedrnn import _ops, _reference
from fusedrnn._library import LIBRARY
from tests.kit import numpy_reference
from tests.kit.arguments import CELLS_AND_FORMS, make_arguments
from tests.kit.build import native
from tests.kit.layers import BY_NAME, CELL_MODULES, CELLS, FUNCTIONS, Cell


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A set to which every call of `ops.layer` and `ops.step` adds the cell that it runs."""
    names: set[str] = set()

    def record(name: str, run: Callable[..., Any]) -> None:
        def recording(*args: Any) -> Any:
            names.add(inspect.signature(run).bind(*args).arguments["options"].cell)
            return run(*args)

        monkeypatch.setattr(_ops, name, recording)

    record("layer", _ops.layer)
    record("step", _ops.step)
    return names


def test_lists() -> None:
    wanted = list(LIBRARY.cells)
    assert native().cells() == wanted
    assert list(_reference.STEPS) == wanted
    # A cell may be without a step in numpy and without a public layer.
    for others in (numpy_reference.STEPS, BY_NAME, FUNCTIONS):
        assert [cell for cell in wanted if cell in others] == list(others)


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


def test_parameters() -> None:
    more = {"lstm_proj": ["weight_hr:P,H"], "lstm_peephole": ["weight_ch:3*H"]}
    for cell, spec in LIBRARY.cells.items():
        said = [f"{p.name}:{','.join(p.sizes)}" for p in spec.parameters]
        assert said[:4] == ["weight_ih:G*H,I", "weight_hh:G*H,P", "bias_ih:G*H", "bias_hh:G*H"]
        assert said[4:] == more.get(cell, []), cell
        call = make_arguments(cell, D=1, requires_grad=False)
        P = 3 if spec.projects else 6
        for p, weight in zip(spec.parameters, call.weights, strict=True):
            assert p.shape(G=spec.gates, H=6, I=4, P=P) == weight.shape


@pytest.mark.parametrize("H", [6, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_fake_reserve_is_as_large_as_the_real_one(
    cell: str, form: str, dtype: torch.dtype, H: int
) -> None:
    """Both where bfloat16 is multiplied in pairs and where it is not; P is 6 or 5."""
    call = make_arguments(
        cell, form, H=2 * H if LIBRARY.cells[cell].projects else H, dtype=dtype, D=2
    )
    real = torch.ops.fusedrnn.forward(*call.op_arguments())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(t: Any) -> Any:
            return mode.from_tensor(t) if isinstance(t, torch.Tensor) else t

        arguments = [
            [fake(w) for w in a] if isinstance(a, list) else fake(a) for a in call.op_arguments()
        ]
        fakes = torch.ops.fusedrnn.forward(*arguments)
    for got, wanted in zip(fakes, real, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype


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

"""The list of cells in C++ is that of every place in Python which names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn
from fusedrnn import _ops, _reference
from fusedrnn import functional as F
from fusedrnn._library import LIBRARY
from tests import numpy_reference
from tests.calls import CELLS_AND_FORMS, make_call
from tests.helpers import BY_NAME
from tests.native.build import native


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The cells that layers and steps were run with since."""
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
    assert list(numpy_reference.GATES) == wanted
    assert list(BY_NAME) == wanted
    assert {cell: spec.gates for cell, spec in LIBRARY.cells.items()} == numpy_reference.GATES


def test_modules_run_every_cell(seen: set[str]) -> None:
    x = torch.randn(2, 3, 4)
    for module in (
        fusedrnn.FusedLSTM(4, 6),
        fusedrnn.FusedLSTM(4, 6, proj_size=2),
        fusedrnn.FusedGRU(4, 6),
        fusedrnn.FusedGRU(4, 6, reset_after=False),
        fusedrnn.FusedRNN(4, 6),
        fusedrnn.FusedRNN(4, 6, nonlinearity="relu"),
    ):
        module(x)
    assert seen == LIBRARY.cells.keys()


def test_functions_run_every_cell(seen: set[str]) -> None:
    for cell in LIBRARY.cells:
        call = make_call(cell, D=1, requires_grad=False)
        hx = call.h0 if call.c0 is None else (call.h0, call.c0)
        if cell.startswith("lstm"):
            F.lstm(call.x, hx, call.weights)
        elif cell.startswith("gru"):
            F.gru(call.x, hx, call.weights, reset_after=cell == "gru")
        else:
            F.rnn(call.x, hx, call.weights, nonlinearity=cell.removeprefix("rnn_"))
    assert seen == LIBRARY.cells.keys()


def test_cells_run_every_cell_but_the_projected(seen: set[str]) -> None:
    x = torch.randn(3, 4)
    for module in (
        fusedrnn.FusedLSTMCell(4, 6),
        fusedrnn.FusedGRUCell(4, 6),
        fusedrnn.FusedGRUCell(4, 6, reset_after=False),
        fusedrnn.FusedRNNCell(4, 6),
        fusedrnn.FusedRNNCell(4, 6, nonlinearity="relu"),
    ):
        module(x)
    assert seen == LIBRARY.cells.keys() - {"lstm_proj"}


def test_parameters() -> None:
    four = "weight_ih:G*H,I;weight_hh:G*H,P;bias_ih:G*H;bias_hh:G*H"
    for cell, spec in LIBRARY.cells.items():
        said = ";".join(f"{p.name}:{','.join(p.sizes)}" for p in spec.parameters)
        assert said == (f"{four};weight_hr:P,H" if spec.projects else four), cell
        call = make_call(cell, D=1, requires_grad=False)
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
    call = make_call(cell, form, H=2 * H if cell == "lstm_proj" else H, dtype=dtype, D=2)
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
    """What the library says of a cell is what its op does: T=5, N=3, H=6, P=3 or 6, D=2."""
    spec = LIBRARY.cells[cell]
    call = make_call(cell, requires_grad=False)
    _, _, c_n, reserve = torch.ops.fusedrnn.forward(*call.op_arguments())
    assert spec.name == cell
    assert spec.has_c == (c_n.numel() > 0)
    assert spec.projects == (len(call.weights) == 10)
    P = 3 if spec.projects else 6
    saved = 3 if spec.saves_h else 5 * 3 * spec.saved
    assert reserve.numel() == 2 * (saved * 6 + 5 * 3 * ((spec.has_c + (spec.stages > 1)) * 6 + P))

"""Layers on every device. On a GPU they run in every regime and with larger sizes.

Gradients, lengths, cells, modules and precision have their own tests, on every device too.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import _ops, _reference
from fusedrnn._errors import refuses_regime
from fusedrnn._selftest_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    REGIME,
    TF32,
    Precision,
    float32_products,
)
from fusedrnn.selftest import REGIMES
from tests.kit import emulated_kernels
from tests.kit.arguments import CELLS_AND_FORMS, make_arguments
from tests.kit.layers import (
    BY_NAME,
    CELLS,
    DEVICES,
    TORCH_CELLS,
    Cell,
    error,
    make_states,
    on,
    ragged,
    randn,
    run,
)

PRECISIONS = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)


def places() -> list[Any]:
    """Device, regime, H and precision of `test_layer`. A GPU has more of each than the CPU."""
    found: list[tuple[str, str, int, Precision]] = [("cpu", "", 24, p) for p in PRECISIONS]
    if "cuda" in DEVICES:
        tf32 = [TF32] if torch.cuda.get_device_capability() >= (8, 0) else []
        grid = itertools.product(REGIMES, (24, 256, 1024), (*PRECISIONS, *tf32))
        # float64 has no resident kernel.
        found += [("cuda", *g) for g in grid if g[0] != "resident" or g[2] != FLOAT64]
    return [pytest.param(*f, id="-".join((*map(str, f[:3]), f[3].name))) for f in found]


@pytest.mark.parametrize(("where", "regime", "H", "precision"), places())
@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_layer(
    monkeypatch: pytest.MonkeyPatch,
    cell: str,
    form: str,
    where: str,
    regime: str,
    H: int,
    precision: Precision,
) -> None:
    """Compares outputs and gradients with the reference in float64 on the CPU."""
    if regime == "resident" and BY_NAME[cell].projects:
        pytest.skip("a projection has no resident kernel")
    monkeypatch.setenv(REGIME, regime)
    call = make_arguments(cell, form, T=7, N=10, H=H, dtype=precision.dtype)
    wide = call.with_leaves([t.detach().double().requires_grad_() for t in call.leaves])
    call = call.with_leaves([t.detach().to(where).requires_grad_() for t in call.leaves])
    results: list[list[Tensor]] = []
    for c, layer in ((call, _ops.layer), (wide, _reference.layer)):
        with float32_products(precision.tf32):
            try:
                outputs = c.run(layer)
                grads = [randn(*o.shape, seed=k).to(o) for k, o in enumerate(outputs)]
                gradients = torch.autograd.grad(outputs, c.leaves, grads)
            except RuntimeError as problem:
                if H == 24 or not refuses_regime(problem):
                    raise
                pytest.skip(str(problem))
        # With many units, rounding moves some values across the kink of relu.
        alone = cell == "rnn_relu" and H > 24 and precision != FLOAT64
        results.append([*outputs, *([] if alone else gradients)])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == precision.dtype and got.device.type == torch.device(where).type
        assert error(got.cpu(), wanted) <= precision.limit * precision.eps


@pytest.mark.parametrize("cell", BY_NAME)
def test_limits_let_correct_kernels_pass(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """Runs a size and precisions that are otherwise run on a GPU only."""
    monkeypatch.setattr(_ops, "layer", emulated_kernels.layer)
    for precision in (FLOAT32, FLOAT16, BFLOAT16, TF32):
        test_layer(monkeypatch, cell, "packed", "cpu", "", 256, precision)


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_module_compared_with_torch_nn(device: torch.device, cell: Cell, form: str) -> None:
    """Two layers with two directions on the device, compared with torch.nn on the CPU."""
    ours, theirs = cell.make(5, 8, num_layers=2, bidirectional=True, dtype=torch.float64)
    x: Any = randn(6, 4, 5)
    if form == "packed":
        x = pack_sequence(ragged((3, 6, 1, 6), 5), enforce_sorted=False)
    hx = make_states(ours, 4, torch.float64)
    expected = run(theirs, x, hx)
    actual = run(ours.to(device), on(device, x), on(device, hx))
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert error(actual[name], wanted) <= 1e-11, name


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradcheck(device: torch.device, cell: Cell) -> None:
    layer, _ = cell.make(2, 3, bidirectional=True, dtype=torch.float64)
    layer.to(device)
    x = randn(3, 2, 2).to(device).requires_grad_()
    parameters = list(layer.parameters())

    def outputs(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x, lengths=[3, 1])[0]

    assert torch.autograd.gradcheck(outputs, (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_cells(device: torch.device, name: str) -> None:
    theirs = getattr(torch.nn, f"{name}Cell")(4, 6, dtype=torch.float64)
    ours = getattr(fusedrnn, f"Fused{name}Cell")(4, 6, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = randn(3, 4)
    hx = _states(name)
    expected = run(theirs, x, hx)
    actual = run(ours.to(device), x.to(device), on(device, hx))
    for key, wanted in expected.items():
        assert error(actual[key], wanted) <= 1e-12, key


def _states(name: str) -> Any:
    h, c = randn(3, 6), randn(3, 6)
    return (h, c) if name == "LSTM" else h


def test_same_bits_again(device: torch.device) -> None:
    layer = fusedrnn.FusedLSTM(16, 64, bidirectional=True, device=device)
    x = torch.randn(30, 12, 16, device=device)
    first = run(layer, x)
    assert all(torch.equal(t, first[name]) for name, t in run(layer, x).items())


def test_autocast(device: torch.device) -> None:
    layer = fusedrnn.FusedGRU(4, 6, device=device)
    x = torch.randn(5, 2, 4, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, h_n = layer(x)
    assert y.dtype == h_n.dtype == torch.bfloat16
    assert error(y.cpu(), layer(x)[0].detach().cpu()) <= BFLOAT16.limit * BFLOAT16.eps


def test_compile_without_a_break(device: torch.device) -> None:
    layer = fusedrnn.FusedLSTM(4, 6, device=device)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 4, device=device)
    expected, actual = run(layer, x), run(compiled, x)
    for name, got in actual.items():
        assert torch.equal(got, expected[name.replace("_orig_mod.", "")]), name

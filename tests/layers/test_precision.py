"""Precision: the error budget of each dtype, published results, autocast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from tests.kit import parity_table
from tests.kit.layers import CELLS, Cell, flat, make_states, ragged, randn, run
from tests.kit.parity_table import CASES, DRAWS, Case

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DRAWS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_error_budget(device: torch.device, cell: Cell, dtype: torch.dtype, case: Case) -> None:
    if device.type != "cpu" and cell.name == "rnn_relu" and dtype != torch.float32:
        pytest.skip("in 16 bits relu's gradient jumps where h, rounded, changes sides")
    measured = parity_table.measure(cell, dtype, case, device)
    if device.type == "cpu":
        parity_table.MEASURED.extend(measured)
    wrong = [str(m) for m in measured if not m.ours <= m.budget]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_lstm_step(device: torch.device, dtype: torch.dtype) -> None:
    golden = GOLDEN["lstm_one_step"]
    order = "ifco"  # the file's names of torch's gates i, f, g, o
    w_ih, w_hh, b = (
        torch.tensor([[golden[name][gate]] for gate in order], dtype=dtype)
        for name in ("w_x", "w_h", "b")
    )
    x, h, c = (torch.tensor([[golden[k]]], dtype=dtype, device=device) for k in ("x0", "h0", "c0"))
    expected = golden["expected_4_digits"]
    module = fusedrnn.FusedLSTM(1, 1, dtype=dtype, device=device)
    cell = fusedrnn.FusedLSTMCell(1, 1, dtype=dtype, device=device)
    with torch.no_grad():
        for m, suffix in ((module, "_l0"), (cell, "")):
            getattr(m, "weight_ih" + suffix).copy_(w_ih)
            getattr(m, "weight_hh" + suffix).copy_(w_hh)
            getattr(m, "bias_ih" + suffix).copy_(b.flatten())
            getattr(m, "bias_hh" + suffix).zero_()
    _, (h_n, c_n) = module(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
    for h1, c1 in ((h_n, c_n), cell(x, (h, c))):
        assert round(c1.item(), 4) == expected["c"]
        assert round(h1.item(), 4) == expected["h"]
        assert round(torch.tanh(c1).item(), 4) == expected["tanh_c"]


def test_golden_rnn_training_step(device: torch.device) -> None:
    golden = GOLDEN["rnn_bptt_two_steps"]
    rnn = fusedrnn.FusedRNN(1, 1, dtype=torch.float64, device=device)
    head = nn.Linear(1, 1, dtype=torch.float64, device=device)
    named = {
        "theta_xh": rnn.weight_ih_l0,
        "theta_hh": rnn.weight_hh_l0,
        "b_h": rnn.bias_ih_l0,
        "theta_hy": head.weight,
        "b_y": head.bias,
    }
    with torch.no_grad():
        rnn.bias_hh_l0.zero_()
        for name, p in named.items():
            p.fill_(golden.get(name, 0.0))
    x = torch.tensor(golden["x"], dtype=torch.float64, device=device).view(2, 1, 1)
    h0 = torch.full((1, 1, 1), golden["h0"], dtype=torch.float64, device=device)

    def loss() -> tuple[Tensor, Tensor]:
        y_hat = head(rnn(x, h0)[0][-1])
        return y_hat, (golden["y"] - y_hat).square().sum() / 2

    y_hat, value = loss()
    value.backward()
    # The expected values of the file were computed in float32.
    assert y_hat.item() == pytest.approx(golden["y_hat"], rel=1e-6)
    assert value.item() == pytest.approx(golden["loss"], rel=1e-6)
    for name, p in named.items():
        assert p.grad is not None
        assert p.grad.item() == pytest.approx(golden["grad"][name], rel=1e-6), name
    torch.optim.SGD(named.values(), lr=0.1).step()
    for name, p in named.items():
        assert p.item() == pytest.approx(golden["after_step"][name], rel=1e-6), name
    assert round(loss()[1].item(), 2) == golden["after_step"]["loss_2_digits"]


def dtypes(result: Any) -> set[torch.dtype]:
    return {t.dtype for t in flat(result)}


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_autocast(
    device: torch.device, cell: Cell, given: torch.dtype, wanted: torch.dtype
) -> None:
    """The results have the autocast dtype for any 16- or 32-bit dtypes of weights and input."""
    ours, _ = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=given)
    low, _ = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=wanted)
    low.load_state_dict(ours.state_dict())
    for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = randn(4, 2, 3, dtype=x_dtype, device=device).requires_grad_()
        hx = make_states(ours, 2, torch.float32)
        with torch.autocast(device.type, dtype=wanted):
            results = flat(ours(x, hx))
        assert dtypes(results) == {wanted}
        lower = tuple(t.to(wanted) for t in flat(hx))
        expected = flat(low(x.to(wanted), lower if cell.has_c else lower[0]))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        gradients = torch.autograd.grad(
            sum(t.float().sin().sum() for t in results), [x, *ours.parameters()]
        )
        assert gradients[0].dtype == x_dtype
        assert {g.dtype for g in gradients[1:]} == {given}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_autocast_leaves_float64(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 5, device=device, dtype=torch.float64)
    x = randn(4, 2, 3, device=device)
    plain = run(ours, x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert dtypes(ours(x)) == dtypes(theirs(x.cpu())) == {torch.float64}
        again = run(ours, x)
        with pytest.raises(RuntimeError, match=r"input dtype \(torch.bfloat16\) does not match"):
            ours(x.float())
    assert all(torch.equal(plain[k], again[k]) for k in plain)


def test_autocast_of_another_device_or_off(device: torch.device) -> None:
    ours, _ = CELLS[0].make(3, 5, device=device)
    x = torch.randn(4, 2, 3, device=device)
    with torch.autocast(device.type, enabled=False):
        assert dtypes(ours(x)) == {torch.float32}
    with torch.autocast(device.type), torch.autocast(device.type, enabled=False):
        assert dtypes(ours(x)) == {torch.float32}
    default = torch.get_autocast_dtype(device.type)
    packed = nn.utils.rnn.pack_sequence(ragged((3, 2), 3, torch.float32, device))
    with torch.autocast(device.type):
        assert dtypes(ours(x)) == {default}
        assert dtypes(ours(x, lengths=[1, 4])) == {default}
        assert dtypes(ours(packed)) == {default}


@pytest.mark.parametrize(
    "cell", [fusedrnn.FusedLSTMCell, fusedrnn.FusedGRUCell, fusedrnn.FusedRNNCell]
)
def test_autocast_of_cells(device: torch.device, cell: type[nn.Module]) -> None:
    module: Any = cell(3, 5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = module(torch.randn(2, 3, device=device))
        again = module(torch.randn(2, 3, device=device), result)
    # c of an LSTM stays float32 between steps.
    expected = [torch.bfloat16, torch.float32][: len(flat(result))]
    assert [t.dtype for t in flat(result)] == [t.dtype for t in flat(again)] == expected
    sum(t.float().sum() for t in flat(result)).backward()  # type: ignore[union-attr]
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_c_is_float32_inside(device: torch.device, dtype: torch.dtype) -> None:
    """An LSTM that counts, with i = f = o ≈ 1 and small g. c in 16 bits would stop growing."""
    T = 2000
    module = fusedrnn.FusedLSTM(1, 1, dtype=dtype, device=device)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.zero_()
        module.bias_hh_l0.zero_()
        module.bias_ih_l0.copy_(torch.tensor([30.0, 30.0, 0.01, 30.0]))
        _, (_, c_n) = module(torch.zeros(T, 1, 1, dtype=dtype, device=device))
    assert c_n.item() == pytest.approx(T * 0.01, rel=0.01)

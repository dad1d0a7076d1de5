"""Our cell modules, compared with torch.nn's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

import fusedrnn
from fusedrnn._library import CELLS
from tests.kit.layers import assert_close, assert_same, error, flat, on, randn, run

f64 = torch.float64

PAIRS = {
    "lstm": (fusedrnn.FusedLSTMCell, nn.LSTMCell, {}),
    "gru": (fusedrnn.FusedGRUCell, nn.GRUCell, {}),
    "rnn_tanh": (fusedrnn.FusedRNNCell, nn.RNNCell, {}),
    "rnn_relu": (fusedrnn.FusedRNNCell, nn.RNNCell, {"nonlinearity": "relu"}),
}
each = pytest.mark.parametrize("name", PAIRS)


def make(device: torch.device, name: str, I: int = 3, H: int = 5, **kwargs: Any) -> tuple[Any, Any]:
    """Our cell module, on the device, and torch.nn's with the same weights, on the CPU."""
    ours, theirs, options = PAIRS[name]
    a, b = (m(I, H, **{"dtype": f64, **options, **kwargs}) for m in (ours, theirs))
    a.load_state_dict(b.state_dict())
    return a.to(device), b


def states(name: str, *shape: int, dtype: torch.dtype = f64) -> Any:
    if not CELLS[name].has_c:
        return randn(*shape, dtype=dtype)
    return randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(4,), (), (0,), (1,)], ids=str)
@each
def test_outputs_and_gradients(
    device: torch.device, name: str, batch: tuple[int, ...], bias: bool
) -> None:
    ours, theirs = make(device, name, bias=bias)
    x = randn(*batch, 3)
    for hx in (None, states(name, *batch, 5)):
        assert_same(run(ours, x, hx), run(theirs, x, hx))
        actual, expected = ours(on(device, x), on(device, hx)), theirs(x, hx)
        for got, wanted in zip(flat(actual), flat(expected), strict=True):
            assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
        assert type(actual) is type(expected)


@pytest.mark.parametrize(("I", "H"), [(1, 1), (7, 1), (1, 13), (37, 67), (200, 129)])
@each
def test_sizes(device: torch.device, name: str, I: int, H: int) -> None:
    ours, theirs = make(device, name, I, H)
    x, hx = randn(6, I), states(name, 6, H)
    assert_same(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize(("I", "H"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("bias", [True, False])
@each
def test_sizes_of_zero(device: torch.device, name: str, bias: bool, I: int, H: int) -> None:
    """With I = 0 only h and the biases count; with H = 0 results are empty. Both have gradients."""
    ours, theirs = make(device, name, I, H, bias=bias)
    for batch in ((4,), (), (0,)):
        for hx in (None, states(name, *batch, H)):
            assert_same(run(ours, randn(*batch, I), hx), run(theirs, randn(*batch, I), hx))


@pytest.mark.parametrize(("I", "H"), [(0, 5), (3, 0)])
@each
def test_sizes_of_zero_elsewhere(device: torch.device, name: str, I: int, H: int) -> None:
    """Sizes of zero work in 16 bits, compiled, and in second derivatives."""
    ours, theirs = make(device, name, I, H, dtype=torch.bfloat16)
    x = torch.ones(2, I, dtype=torch.bfloat16)
    for got, wanted in zip(flat(ours(x.to(device))), flat(theirs(x)), strict=True):
        torch.testing.assert_close(got.cpu(), wanted)
    ours, _ = make(device, name, I, H)
    v = randn(2, I, device=device).requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(flat(compiled(v)), flat(ours(v)), strict=True):
        assert_close(got, wanted)
    assert torch.autograd.gradgradcheck(lambda v: flat(ours(v)), [v])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each
def test_other_dtypes(device: torch.device, name: str, dtype: torch.dtype) -> None:
    ours, theirs = make(device, name, 7, 11, dtype=dtype)
    x, hx = randn(6, 7, dtype=dtype), states(name, 6, 11, dtype=dtype)
    actual, expected = run(ours, x, hx), run(theirs, x, hx)
    theirs.double()
    wide = tuple(t.double() for t in flat(hx))
    exact = run(theirs, x.double(), wide if CELLS[name].has_c else wide[0])
    for k, value in exact.items():
        assert actual[k].dtype == dtype
        limit = 2 * error(expected[k], value) + torch.finfo(dtype).eps
        assert error(actual[k], value) <= limit, k


@each
def test_a_sequence_is_the_layer(device: torch.device, name: str) -> None:
    """A loop over a cell module gives the results and gradients of the layer."""
    ours, _ = make(device, name)
    options = {"nonlinearity": "relu"} if name == "rnn_relu" else {}
    layer_type = {"l": fusedrnn.FusedLSTM, "g": fusedrnn.FusedGRU, "r": fusedrnn.FusedRNN}[name[0]]
    layer = layer_type(3, 5, dtype=f64, device=device, **options)
    layer.load_state_dict({k + "_l0": v for k, v in ours.state_dict().items()})
    x = randn(7, 4, 3, device=device)
    hx, y = None, []
    for x_t in x:
        hx = ours(x_t, hx)
        y.append(flat(hx)[0])
    expected = layer(x)[0]
    assert_close(torch.stack(y), expected)
    a = torch.autograd.grad(torch.stack(y).sin().sum(), list(ours.parameters()))
    b = torch.autograd.grad(expected.sin().sum(), list(layer.parameters()))
    for got, wanted in zip(a, b, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize(("I", "H"), [(3, 5), (0, 5), (3, 0)])
def test_reset_before(device: torch.device, I: int, H: int) -> None:
    ours = fusedrnn.FusedGRUCell(I, H, dtype=f64, device=device, reset_after=False)
    x, h = (randn(4, size, device=device).requires_grad_() for size in (I, H))
    W_r, W_z, W_n = ours.weight_ih.chunk(3)
    U_r, U_z, U_n = ours.weight_hh.chunk(3)
    b_r, b_z, b_n = ours.bias_ih.chunk(3)
    c_r, c_z, c_n = ours.bias_hh.chunk(3)
    r = torch.sigmoid(x @ W_r.T + b_r + h @ U_r.T + c_r)
    z = torch.sigmoid(x @ W_z.T + b_z + h @ U_z.T + c_z)
    n = torch.tanh(x @ W_n.T + b_n + (r * h) @ U_n.T + c_n)
    expected = (1 - z) * n + z * h
    actual = ours(x, h)
    assert_close(actual, expected)
    targets = [x, h, *ours.parameters()]
    for got, wanted in zip(
        torch.autograd.grad(actual.sin().sum(), targets),
        torch.autograd.grad(expected.sin().sum(), targets),
        strict=True,
    ):
        assert_close(got, wanted)
    assert repr(ours) == f"FusedGRUCell({I}, {H}, reset_after=False)"
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        fusedrnn.FusedGRUCell(3, 5, reset_after=0)  # type: ignore[arg-type]


@each
def test_strided(device: torch.device, name: str) -> None:
    ours, theirs = make(device, name)
    x = randn(3, 8, device=device).t()[::2]
    h = [randn(5, 4, device=device).t(), randn(4, 10, device=device)[:, ::2]]
    hx = tuple(h) if CELLS[name].has_c else h[0]
    assert_same(run(ours, x, hx), run(theirs, x, hx))
    expected = theirs(x.cpu(), on(torch.device("cpu"), hx))
    for got, wanted in zip(flat(ours(x, hx)), flat(expected), strict=True):
        assert_close(got, wanted)


@each
def test_changing_results_in_place(device: torch.device, name: str) -> None:
    ours, theirs = make(device, name)
    x = randn(4, 3)
    doubled = flat(ours(x.to(device)))
    for t in doubled:
        t.mul_(2)
    expected = [t * 2 for t in flat(theirs(x))]
    for got, wanted in zip(
        torch.autograd.grad(sum(t.sum() for t in doubled), list(ours.parameters())),
        torch.autograd.grad(sum(t.sum() for t in expected), list(theirs.parameters())),
        strict=True,
    ):
        assert_close(got, wanted)


@each
def test_nan_stays_in_its_row(device: torch.device, name: str) -> None:
    ours, _ = make(device, name, 3, 20)
    x, hx = randn(5, 3), states(name, 5, 20)
    clean = run(ours, x, hx)
    x[1, 1] = float("nan")
    dirty = run(ours, x, hx)
    for k in ("h_n", "c_n", "d_x", "d_h0", "d_c0"):
        if k in clean:
            assert torch.equal(dirty[k][[0, 2, 3, 4]], clean[k][[0, 2, 3, 4]]), k
    assert dirty["h_n"][1].isnan().all()


@each
def test_state_dict_init_repr_and_copies(name: str) -> None:
    ours_type, theirs_type, options = PAIRS[name]
    for bias in (True, False):
        torch.manual_seed(3)
        ours = ours_type(3, 5, bias, **options)
        torch.manual_seed(3)
        theirs = theirs_type(3, 5, bias, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert ours.bias_ih is None if not bias else isinstance(ours.bias_ih, nn.Parameter)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
        assert repr(ours) == repr(theirs).replace(theirs_type.__name__, ours_type.__name__)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3)
        expected = flat(ours(x))[0]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(flat(other(x))[0], expected)
    assert isinstance(ours, RNNCellBase)
    assert not isinstance(ours, (nn.LSTMCell, nn.GRUCell, nn.RNNCell))


@each
def test_one_bias_without_the_other(device: torch.device, name: str) -> None:
    ours, theirs = make(device, name)
    for missing in ("bias_hh", "bias_ih"):
        x = randn(4, 3)
        gradients = []
        for cell in (copy.deepcopy(ours), copy.deepcopy(theirs)):
            setattr(cell, missing, None)
            results = flat(cell(x.to(cell.weight_ih.device)))
            loss = sum(t.sin().sum() for t in results)
            gradients.append([*results, *torch.autograd.grad(loss, list(cell.parameters()))])
        for got, wanted in zip(*gradients, strict=True):
            assert_close(got, wanted)


@each
def test_weights_that_are_computed(device: torch.device, name: str) -> None:
    ours, theirs = make(device, name)
    gradients: list[Tensor] = []
    for cell in (ours, theirs):
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
        where = cell.weight_ih.device
        results = flat(cell(randn(4, 3, seed=4, device=where), on(where, states_from(name))))
        leaves = dict(cell.named_parameters())
        gradients.append(
            torch.autograd.grad(sum(t.sin().sum() for t in results), list(leaves.values()))
        )
    for got, wanted in zip(*gradients, strict=True):
        assert_close(got, wanted)


def states_from(name: str) -> Any:
    h = randn(4, 5, seed=5)
    return (h, randn(4, 5, seed=6)) if CELLS[name].has_c else h

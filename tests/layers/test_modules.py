"""The layers, compared with torch.nn in float64: outputs and all gradients for all options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fusedrnn
from tests.kit.layers import (
    BY_NAME,
    CELLS,
    TORCH_CELLS,
    Cell,
    assert_close,
    assert_same,
    device_of,
    error,
    flat,
    make_states,
    on,
    options,
    ragged,
    randn,
    run,
)

FORMS = ["time major", "batch first", "unbatched", "packed", "packed unsorted"]
f64 = torch.float64


def input_of(form: str, T: int, N: int, I: int, dtype: torch.dtype = f64) -> Any:
    """Makes an input in one of FORMS, with N sequences of up to T steps."""
    if form == "unbatched":
        return randn(T, I, dtype=dtype)
    if form.startswith("packed"):
        lengths = [max(1, T - (3 * n) % T) for n in range(N)]
        if form == "packed":
            lengths.sort(reverse=True)
        return pack_sequence(ragged(lengths, I, dtype), enforce_sorted=form == "packed")
    return randn(*((N, T) if form == "batch first" else (T, N)), I, dtype=dtype)


def constructor(form: str) -> dict[str, Any]:
    return {"dtype": f64, "batch_first": form == "batch first"}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_grid(
    device: torch.device, cell: Cell, form: str, num_layers: int, bidirectional: bool
) -> None:
    for bias, states in ((True, True), (True, False), (False, True), (False, False)):
        kind = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
        ours, theirs = cell.make(3, 5, device=device, **kind, **constructor(form))
        x = input_of(form, 6, 4, 3)
        hx = make_states(ours, None if form == "unbatched" else 4, f64) if states else None
        assert_same(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_results_have_the_form_of_torch_nn(device: torch.device, cell: Cell, form: str) -> None:
    ours, theirs = cell.make(
        3, 5, device=device, num_layers=2, bidirectional=True, **constructor(form)
    )
    single = cell.make(3, 5, device=device, **constructor(form))
    x = input_of(form, 6, 4, 3)
    for a, b in ((ours, theirs), single):
        actual, expected = a(on(device, x)), b(x)
        assert type(actual) is type(expected) is tuple
        assert type(actual[1]) is type(expected[1])
        for got, wanted in zip(flat(actual), flat(expected), strict=True):
            assert got.shape == wanted.shape
            assert got.stride() == wanted.stride()
            assert got.dtype == wanted.dtype
        if isinstance(x, PackedSequence):
            assert isinstance(actual[0], PackedSequence)
            for part in ("batch_sizes", "sorted_indices", "unsorted_indices"):
                got, wanted = getattr(actual[0], part), getattr(expected[0], part)
                assert (got is None) == (wanted is None)
                assert got is None or torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize(
    ("T", "N", "I", "H"),
    [
        (1, 3, 4, 7),
        (1, 1, 1, 2),
        (4, 1, 3, 5),
        (7, 2, 1, 3),
        (3, 13, 11, 17),
        (5, 3, 31, 67),
        (2, 70, 5, 33),
        (150, 2, 3, 11),
        (3, 2, 259, 131),
    ],
)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_sizes(device: torch.device, cell: Cell, T: int, N: int, I: int, H: int) -> None:
    ours, theirs = cell.make(I, H, device=device, bidirectional=True, dtype=f64)
    x, hx = randn(T, N, I), make_states(ours, N, f64)
    assert_same(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("cell", [c for c in CELLS if not c.projects], ids=str)
def test_one_unit(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 1, device=device, num_layers=2, dtype=f64)
    x, hx = randn(5, 4, 3), make_states(ours, 4, f64)
    assert_same(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("form", ["time major", "packed unsorted"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_threads(cell: Cell, form: str, threads: int) -> None:
    ours, theirs = cell.make(9, 40, bidirectional=True, **constructor(form))
    x, hx = input_of(form, 12, 24, 9), make_states(ours, 24, f64)
    expected = run(theirs, x, hx)
    torch.set_num_threads(threads)
    actual = run(ours, x, hx)
    assert_same(actual, expected)
    again = run(ours, x, hx)
    assert all(torch.equal(actual[k], again[k]) for k in actual)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_empty_batch(device: torch.device, cell: Cell, batch_first: bool) -> None:
    kind = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "dtype": f64}
    ours, theirs = cell.make(3, 5, device=device, **kind)
    x = randn(*((0, 4) if batch_first else (4, 0)), 3)
    for hx in (None, make_states(theirs, 0, f64)):
        assert_same(run(ours, x, hx), run(theirs, x, hx))
        results = flat(ours(on(device, x), on(device, hx)))
        for got, wanted in zip(results, flat(theirs(x, hx)), strict=True):
            assert got.stride() == wanted.stride()


@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_dropout_has_the_masks_of_torch_nn(cell: Cell, form: str, dropout: float) -> None:
    if cell not in TORCH_CELLS and form.startswith("packed"):
        pytest.skip("the naive partner has no dropout on packed input")
    ours, theirs = cell.make(
        3, 5, num_layers=3, bidirectional=True, dropout=dropout, **constructor(form)
    )
    x = input_of(form, 6, 4, 3)
    actual, state = run(ours, x, seed=5), torch.get_rng_state()
    assert_same(actual, run(theirs, x, seed=5))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(actual["y"], run(ours, x, seed=6)["y"]) or dropout == 1
    ours.eval(), theirs.eval()
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_dropout_masks_in_other_dtypes(cell: Cell, dtype: torch.dtype) -> None:
    # The second layer sees only the output of the first after dropout. With W = 1 and U = 0 a wrong
    # mask changes a result by a large part of the largest value.
    ours, theirs = cell.make(3, 5, num_layers=2, dropout=0.5, dtype=dtype)
    x = randn(6, 40, 3, dtype=dtype)
    for module in (ours, theirs):
        with torch.no_grad():
            module.weight_ih_l1.fill_(1)
            module.weight_hh_l1.fill_(0)
    y = run(theirs, x, seed=3)["y"]
    assert error(run(ours, x, seed=3)["y"], y) < 0.02
    assert error(run(ours, x, seed=4)["y"], y) > 0.2


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_strided_tensors(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    LD, P = 4, ours.proj_size or 5
    inputs = {
        "steps": randn(12, 4, 3, device=device)[::2],
        "features": randn(6, 4, 7, device=device)[..., 1::2],
        "transposed": randn(3, 4, 6, device=device).permute(2, 1, 0),
        "expanded rows": randn(6, 1, 3, device=device).expand(6, 4, 3),
        "expanded steps": randn(1, 4, 3, device=device).expand(6, 4, 3),
        "offset": randn(6 * 4 * 3 + 1, device=device)[1:].view(6, 4, 3),
    }
    h = randn(5, 4, LD, device=device)[:P].permute(2, 1, 0)
    hx = (h, randn(LD, 8, 10, device=device)[:, ::2, ::2]) if cell.has_c else h

    def strided(module: nn.Module, x: Tensor) -> list[Tensor]:
        results = flat(module(x.requires_grad_(), on(device_of(module), hx)))
        return [*results, *torch.autograd.grad(results[0].cos().sum(), x)]

    for module in (ours, theirs):
        # The weights become transposed views.
        for name, p in list(module.named_parameters()):
            if p.dim() == 2:
                setattr(module, name, nn.Parameter(p.detach().t().contiguous().t()))
    for name, x in inputs.items():
        for got, wanted in zip(strided(ours, x), strided(theirs, x.detach().cpu()), strict=True):
            assert_close(got, wanted, msg=name)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_which_gradients_are_wanted(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 5, device=device, bidirectional=True, dtype=f64)
    for wanted in ("x", "hx", "weight_hh_l0", "bias_ih_l0_reverse"):
        gradients = []
        for module in (ours, theirs):
            torch.manual_seed(1)
            x = randn(4, 2, 3, device=device_of(module))
            hx = make_states(module, 2, f64)
            for p in module.parameters():
                p.requires_grad_(False)
            target = {"x": x, "hx": flat(hx)[-1]}.get(wanted)
            if target is None:
                target = getattr(module, wanted)
            target.requires_grad_()
            y = flat(module(x, hx))
            gradients.append(torch.autograd.grad(sum(t.sin().sum() for t in y), target)[0])
        assert_close(*gradients)


@pytest.mark.parametrize("which", ["y", "h_n", "c_n"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradient_of_one_output(device: torch.device, cell: Cell, which: str) -> None:
    if which == "c_n" and not cell.has_c:
        pytest.skip("no c")
    k = ["y", "h_n", "c_n"].index(which)
    ours, theirs = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x = randn(4, 2, 3).requires_grad_()
    a, b = (
        torch.autograd.grad(
            flat(m(x.to(device_of(m))))[k].sin().sum(), [x, *m.parameters()], allow_unused=True
        )
        for m in (ours, theirs)
    )
    for got, wanted in zip(a, b, strict=True):
        wanted = torch.zeros_like(got) if wanted is None else wanted
        assert_close(got, wanted)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_backward_in_eval_and_without_grad(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 5, device=device, dtype=f64)
    ours.eval(), theirs.eval()
    x = randn(4, 2, 3)
    assert_same(run(ours, x), run(theirs, x))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = ours(x.to(device))[0]
        assert not y.requires_grad
        assert_close(y, theirs(x)[0].detach())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_backward_twice(device: torch.device, cell: Cell) -> None:
    ours, _ = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x = randn(4, 2, 3, device=device).requires_grad_()
    loss = sum(t.sin().sum() for t in flat(ours(x)))
    targets = [x, *ours.parameters()]
    first = torch.autograd.grad(loss, targets, retain_graph=True)
    second = torch.autograd.grad(loss, targets)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_changing_results_in_place_is_right_or_an_error(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 5, device=device, dtype=f64)
    x = randn(4, 2, 3)
    for k in range(3 if cell.has_c else 2):
        expected = flat(theirs(x))
        loss = sum(o.mul(2).sum() if i == k else o.sum() for i, o in enumerate(expected))
        wanted = torch.autograd.grad(loss, list(theirs.parameters()))
        results = flat(ours(x.to(device)))
        results[k].mul_(2)
        try:
            got = torch.autograd.grad(sum(o.sum() for o in results), list(ours.parameters()))
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)  # noqa: PT017
            continue
        for a, b in zip(got, wanted, strict=True):
            assert_close(a, b)


def test_one_tensor_as_both_states(device: torch.device) -> None:
    ours, theirs = BY_NAME["lstm"].make(3, 5, device=device, dtype=f64)
    gradients = []
    for module in (ours, theirs):
        x, z = (randn(*sizes, seed=1, device=device_of(module)) for sizes in ((4, 2, 3), (1, 2, 5)))
        y = module(x, (z.requires_grad_(), z))[0]
        gradients.append(torch.autograd.grad(y.sin().sum(), z)[0])
    assert_close(*gradients)


def test_states_as_a_list(device: torch.device) -> None:
    ours, theirs = BY_NAME["lstm"].make(3, 5, device=device, dtype=f64)
    x, hx = randn(4, 2, 3), list(make_states(theirs, 2, f64))
    results = flat(ours(x.to(device), [t.to(device) for t in hx]))
    for got, wanted in zip(results, flat(theirs(x, hx)), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_states_of_a_packed_batch_are_in_the_callers_order(
    device: torch.device, cell: Cell
) -> None:
    ours, theirs = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    lengths = [2, 6, 1, 4]
    padded = nn.utils.rnn.pad_sequence(ragged(lengths, 3))
    x = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)
    hx = make_states(ours, 4, f64)
    assert_same(run(ours, x, hx), run(theirs, x, hx))
    states = flat(ours(on(device, x), hx)[1])
    for n, T in enumerate(lengths):
        alone = flat(ours(padded[:T, n : n + 1].to(device), tuple_of_row(hx, n))[1])
        for state, one in zip(states, alone, strict=True):
            assert_close(state[:, n : n + 1], one)


def tuple_of_row(hx: Any, n: int) -> Any:
    row = [t[:, n : n + 1] for t in flat(hx)]
    return tuple(row) if isinstance(hx, tuple) else row[0]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_nan_stays_in_its_row(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 20, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x, hx = randn(6, 5, 3), make_states(ours, 5, f64)
    clean = run(ours, x, hx)
    x[2, 1] = float("nan")
    dirty, expected = run(ours, x, hx), run(theirs, x, hx)
    others = [0, 2, 3, 4]
    for name in ("y", "h_n", "c_n", "d_x", "d_h0", "d_c0"):
        if name in clean:
            assert torch.equal(dirty[name][:, others], clean[name][:, others]), name
    for name, wanted in expected.items():
        torch.testing.assert_close(
            dirty[name], wanted, rtol=1e-11, atol=1e-12, equal_nan=True, msg=f"{name} differs"
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_nan_and_inf_go_through_as_in_torch(device: torch.device, cell: Cell, value: float) -> None:
    # float32 is used, since its kernels compute exp themselves.
    ours, theirs = cell.make(3, 5, device=device)
    x = randn(4, 2, 3, dtype=torch.float32)
    x[1, 0, 1] = value
    with torch.no_grad():
        for got, wanted in zip(flat(ours(x.to(device))), flat(theirs(x)), strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_subclass_and_the_checks_that_others_call() -> None:
    class Mine(fusedrnn.FusedLSTM):
        pass

    ours, theirs = Mine(3, 5, proj_size=2), nn.LSTM(3, 5, proj_size=2)
    x = torch.randn(4, 2, 3)
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    batch_sizes = torch.tensor([3, 1])
    assert ours.get_expected_cell_size(x, batch_sizes) == (1, 3, 5)
    good = (torch.zeros(1, 2, 2), torch.zeros(1, 2, 5))
    ours.check_forward_args(x, good, None)
    for bad in ((good[1], good[1]), (good[0], good[0])):
        with pytest.raises(RuntimeError) as a:
            ours.check_forward_args(x, bad, None)
        with pytest.raises(RuntimeError) as b:
            theirs.check_forward_args(x, bad, None)
        assert str(a.value) == str(b.value)
    order = torch.tensor([1, 0])
    for got, wanted in zip(
        ours.permute_hidden(good, order), theirs.permute_hidden(good, order), strict=True
    ):
        assert torch.equal(got, wanted)
    assert ours.permute_hidden(good, None) is good
    gru = fusedrnn.FusedGRU(3, 5)
    assert torch.equal(gru.permute_hidden(good[1], order), good[1].flip(1))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        gru.check_forward_args(x, good[0], None)


def test_the_other_convention_for_z(device: torch.device) -> None:
    """h_t = (1 − z) h_{t−1} + z n becomes our formula if the rows of z are negated."""
    H = 5
    ours = fusedrnn.FusedGRU(3, H, dtype=f64, device=device)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in other.parameters():
            p[H : 2 * H].neg_()
    x, h = randn(4, 2, 3, device=device), randn(2, H, device=device)
    W_r, W_z, W_n = other.weight_ih_l0.chunk(3)
    U_r, U_z, U_n = other.weight_hh_l0.chunk(3)
    b_r, b_z, b_n = other.bias_ih_l0.chunk(3)
    c_r, c_z, c_n = other.bias_hh_l0.chunk(3)
    y, _ = ours(x, h.unsqueeze(0))
    for t in range(4):
        r = torch.sigmoid(x[t] @ W_r.T + b_r + h @ U_r.T + c_r)
        z = torch.sigmoid(x[t] @ W_z.T + b_z + h @ U_z.T + c_z)
        n = torch.tanh(x[t] @ W_n.T + b_n + r * (h @ U_n.T + c_n))
        h = (1 - z) * h + z * n
        assert_close(y[t], h)


def test_every_combination_is_in_the_grid() -> None:
    assert len(list(options(a=(1, 2), b=(3, 4, 5)))) == 6
    assert {c.name for c in CELLS} == set(fusedrnn._library.CELLS)

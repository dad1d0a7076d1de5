"""`starts=`: sequences that begin inside a row, and `return_states=`: the states of every step."""

from __future__ import annotations

import io
import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import functional as F
from tests.kit.layers import (
    BY_NAME,
    CELLS,
    Cell,
    assert_close,
    flat,
    make_states,
    map_tensors,
    on,
    randn,
    run,
)

NAN = float("nan")
f64 = torch.float64
each_cell = pytest.mark.parametrize("cell", CELLS, ids=str)


def layer_of(cell: Cell, I: int = 4, H: int = 6, **options: Any) -> Any:
    return cell.make(I, H, **{"dtype": f64, **options})[0]


def some_starts(T: int, N: int, probability: float = 0.25) -> Tensor:
    return torch.rand(T, N) < probability


def of_states(result: Any) -> list[Tensor]:
    """h and c of every step, of a result with return_states."""
    return flat(result[2])


@each_cell
def test_no_beginning_changes_no_bit(device: torch.device, cell: Cell) -> None:
    layer = layer_of(cell, device=device, num_layers=2, bidirectional=True)
    x, hx = randn(7, 3, 4), make_states(layer, 3, f64)
    for how in ({}, {"lengths": [7, 0, 4]}):
        plain = run(layer, x, hx, **how)
        zeros = run(layer, x, hx, **how, starts=torch.zeros(7, 3, dtype=torch.bool, device=device))
        assert all(torch.equal(plain[name], zeros[name]) for name in plain)


@each_cell
def test_a_beginning_at_every_step(device: torch.device, cell: Cell) -> None:
    """Every step is a sequence of its own, in both directions."""
    layer = layer_of(cell, device=device, bidirectional=True)
    x = randn(5, 3, 4, device=device)
    y = layer(x, make_states(layer, 3, f64), starts=torch.ones(5, 3, dtype=torch.bool).to(device))[
        0
    ]
    alone = layer(x.reshape(1, 15, 4))[0]
    # The reverse direction takes its initial state before the last step.
    P = y.size(-1) // 2
    assert_close(y[..., :P], alone.view(5, 3, 2 * P)[..., :P])
    assert_close(y[:-1, :, P:], alone.view(5, 3, 2 * P)[:-1, :, P:])


@st.composite
def cut_rows(draw: Any) -> tuple[list[int], list[list[int]]]:
    """Lengths of rows, and for each row the steps at which a sequence begins."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    begins = [
        sorted(draw(st.sets(st.integers(0, length - 1)))) if length else [] for length in lengths
    ]
    return lengths, begins


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16])
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(rows=cut_rows(), name=st.sampled_from(sorted(BY_NAME)), two=st.booleans())
def test_pieces_equal_the_whole(
    rows: tuple[list[int], list[list[int]]], name: str, two: bool, dtype: torch.dtype
) -> None:
    """Bit for bit on the CPU, where each piece is computed by rows and from packed weights."""
    lengths, begins = rows
    torch.manual_seed(0)
    layer = layer_of(BY_NAME[name], 4, 6, bidirectional=two, dtype=dtype)
    T, N = max(lengths), len(lengths)
    x, hx = randn(T, N, 4, dtype=dtype), make_states(layer, N, dtype)
    starts = torch.zeros(T, N, dtype=torch.bool)
    for n, steps in enumerate(begins):
        starts[steps, n] = True
    # What stands beyond a length counts for nothing.
    starts |= torch.arange(T)[:, None] >= torch.tensor(lengths)
    y, states = layer(x, hx, lengths, starts)
    P = flat(states)[0].size(-1)
    for n, (length, steps) in enumerate(zip(lengths, begins, strict=True)):
        if not length:
            for state, initial in zip(flat(states), flat(hx), strict=True):
                assert torch.equal(state[:, n], initial[:, n])
            continue
        cuts = [*sorted({0, *steps}), length]
        for a, b in itertools.pairwise(cuts):
            own = map_tensors(lambda s: s[:, n : n + 1].clone(), hx)  # noqa: B023
            for state in flat(own):
                if a in steps:  # it begins with zeros rather than with hx
                    state[0].zero_()
                if b < length and two:
                    state[1].zero_()
            y_piece, last = layer(x[a:b, n : n + 1], own)
            assert torch.equal(y[a:b, n], y_piece[:, 0])
            for state, piece in zip(flat(states), flat(last), strict=True):
                if b == length:
                    assert torch.equal(state[0, n], piece[0, 0])
                if a == 0 and two:
                    assert torch.equal(state[1, n], piece[1, 0])
        assert not y[length:, n].any()
        assert y[:length, n].size(-1) == P * (1 + two)


@each_cell
def test_nothing_crosses_a_beginning(device: torch.device, cell: Cell) -> None:
    """A NaN before a beginning, in x, in hx or in a gradient, does not reach the other side."""
    layer = layer_of(cell, device=device, bidirectional=True)
    starts = torch.zeros(8, 2, dtype=torch.bool, device=device)
    starts[3, 0] = starts[0, 0] = True
    clean = randn(8, 2, 4, device=device)
    hx = make_states(layer, 2, f64)
    poisoned = clean.clone()
    poisoned[:3, 0] = NAN
    bad_hx = map_tensors(
        lambda s: s.index_put((torch.tensor(0), torch.tensor(0)), s.new_tensor(NAN)), hx
    )
    for x in (clean, poisoned):
        x.requires_grad_()
    y, expected = layer(poisoned, bad_hx, starts=starts)[0], layer(clean, hx, starts=starts)[0]
    assert torch.equal(y[3:], expected[3:]) and torch.equal(y[:, 1], expected[:, 1])
    assert y[:3, 0].isnan().all()
    weight = randn(*y.shape, device=device)
    bad_weight = weight.clone()
    bad_weight[:3, 0] = NAN
    (d_x,) = torch.autograd.grad(y, poisoned, bad_weight)
    (d_expected,) = torch.autograd.grad(expected, clean, weight)
    assert torch.equal(d_x[3:], d_expected[3:]) and torch.equal(d_x[:, 1], d_expected[:, 1])
    assert d_x[:3, 0].isnan().all()


@each_cell
def test_the_initial_state_counts_for_nothing_before_a_beginning(
    device: torch.device, cell: Cell
) -> None:
    layer = layer_of(cell, device=device)
    starts = torch.zeros(6, 3, dtype=torch.bool, device=device)
    starts[0, 1] = True
    hx = map_tensors(lambda s: s.requires_grad_(), make_states(layer, 3, f64))
    x = randn(6, 3, 4, device=device)
    y, states = layer(x, hx, starts=starts)
    assert torch.equal(y[:, 1], layer(x)[0][:, 1])
    for d in torch.autograd.grad([y.sum(), *(s.sum() for s in flat(states))], flat(hx)):
        assert not d[:, 1].any() and d[:, 0].all() and d[:, 2].all()


@pytest.mark.parametrize("batch_first", [False, True])
@each_cell
def test_forms_of_input(device: torch.device, cell: Cell, batch_first: bool) -> None:
    """Batched, unbatched, strided, padded and packed input give the same numbers."""
    options = {"num_layers": 2, "bidirectional": True, "device": device}
    layer = layer_of(cell, **options)
    T, lengths = 9, [4, 9, 1, 6]
    x, starts = randn(T, 4, 4, device=device), some_starts(T, 4).to(device)
    hx = make_states(layer, 4, f64)
    expected = layer(x, hx, lengths, starts, return_states=True)
    whole = layer(x, hx, starts=starts, return_states=True)
    layer.batch_first = batch_first

    def form(t: Tensor) -> Tensor:
        return t.transpose(0, 1) if batch_first else t

    def same(got: Any, wanted: Any, dim: int = 1) -> None:
        assert_close(form(got[0]) if dim == 1 else got[0], wanted[0])
        for a, b in zip([*flat(got[1])], flat(wanted[1]), strict=True):
            assert_close(a, b)
        for a, b in zip(of_states(got), of_states(wanted), strict=True):
            assert_close(a.transpose(1, 2) if batch_first and dim == 1 else a, b)

    same(layer(form(x), hx, starts=form(starts), return_states=True), whole)
    strided = torch.stack([starts, ~starts], -1)[..., 0]
    same(layer(form(x), hx, lengths, form(strided), return_states=True), expected)

    one = layer(
        x[:, 1], map_tensors(lambda s: s[:, 1], hx), starts=starts[:, 1], return_states=True
    )
    same(
        one,
        [map_tensors(lambda t: t[:, 1], part) for part in whole[:2]]
        + [map_tensors(lambda t: t[:, :, 1], whole[2])],
        dim=0,
    )

    packed, begins = (
        pack_padded_sequence(form(t), lengths, batch_first=batch_first, enforce_sorted=False)
        for t in (x, starts)
    )
    y, states, rows = layer(packed, hx, starts=begins, return_states=True)
    for a, b in zip(flat(states), flat(expected[1]), strict=True):
        assert_close(a, b)
    for t, b in zip(
        [y.data, *(r[1] for r in flat(rows))],
        [expected[0], *(s[1] for s in of_states(expected))],
        strict=True,
    ):
        padded, _ = pad_packed_sequence(PackedSequence(t, *y[1:]), total_length=T)
        assert_close(padded, b)


@each_cell
def test_states_of_every_step(device: torch.device, cell: Cell) -> None:
    """They are those of a run step by step, and a run may go on from any of them."""
    layer = layer_of(cell, device=device, num_layers=2)
    x, hx = randn(6, 3, 4, device=device), make_states(layer, 3, f64)
    y, last, states = layer(x, hx, return_states=True)
    plain = layer(x, hx)
    assert torch.equal(y, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(flat(last), flat(plain[1]), strict=True))
    now = hx
    for t in range(6):
        _, now = layer(x[t : t + 1], now)
        for every, state in zip(flat(states), flat(now), strict=True):
            assert_close(every[:, t], state)
    rest, end = layer(x[4:], map_tensors(lambda s: s[:, 3].contiguous(), states))
    assert_close(rest, y[4:])
    for a, b in zip(flat(end), flat(last), strict=True):
        assert_close(a, b)
    assert torch.equal(flat(states)[0][-1], y)


@each_cell
def test_gradients_through_the_states_of_every_step(device: torch.device, cell: Cell) -> None:
    layer = layer_of(cell, 2, 3, device=device, num_layers=2, bidirectional=True)
    x = randn(4, 2, 2, device=device).requires_grad_()
    hx = map_tensors(lambda s: s.requires_grad_(), make_states(layer, 2, f64))
    starts = some_starts(4, 2).to(device)

    def call(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        own = states if cell.has_c else states[0]
        return tuple(flat(layer(x, own, [4, 2], starts, return_states=True)))

    torch.autograd.gradcheck(call, (x, *flat(hx)))
    torch.autograd.gradgradcheck(call, (x, *flat(hx)), fast_mode=True)


def test_states_are_those_before_dropout(device: torch.device) -> None:
    layer = layer_of(BY_NAME["lstm"], device=device, num_layers=2, dropout=0.5)
    x = randn(5, 3, 4, device=device)
    torch.manual_seed(3)
    y, _, (h, c) = layer(x, return_states=True)
    torch.manual_seed(3)
    assert torch.equal(y, layer(x)[0])
    assert h[0].all() and torch.equal(h[1], y) and c.shape == (2, 5, 3, 6)


@each_cell
def test_no_rows_and_one_step(device: torch.device, cell: Cell) -> None:
    layer = layer_of(cell, device=device)
    for T, N in ((1, 3), (4, 0)):
        starts = torch.ones(T, N, dtype=torch.bool, device=device)
        y, states, steps = layer(
            randn(T, N, 4, device=device),
            make_states(layer, N, f64),
            None,
            starts,
            return_states=True,
        )
        assert y.shape[:2] == (T, N)
        assert all(s.shape[:3] == (1, T, N) for s in flat(steps))
        for s, every in zip(flat(states), flat(steps), strict=True):
            assert T > 1 or torch.equal(s, every[:, 0])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_autocast_and_other_dtypes(device: torch.device, name: str) -> None:
    layer = layer_of(BY_NAME[name], 8, 16, device=device, dtype=torch.float32)
    x, starts = randn(20, 5, 8, dtype=torch.float32, device=device), some_starts(20, 5).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        got = flat(layer(x, starts=starts, return_states=True))
    expected = flat(layer(x, starts=starts, return_states=True))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16 and a.isfinite().all()
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_functions_take_the_same(device: torch.device) -> None:
    for cell, function in (("lstm", F.lstm), ("gru", F.gru), ("rnn_tanh", F.rnn)):
        layer = layer_of(BY_NAME[cell], device=device)
        x, starts = randn(5, 2, 4, device=device), some_starts(5, 2).to(device)
        expected = flat(layer(x, None, None, starts, return_states=True))
        weights = list(layer.parameters())
        got = function(x, None, weights, starts=starts, return_states=True)  # type: ignore[operator]
        assert all(torch.equal(a, b) for a, b in zip(flat(got), expected, strict=True))
        rows = function(  # type: ignore[operator]
            x.flatten(0, 1),
            None,
            weights,
            batch_sizes=torch.tensor([2] * 5),
            starts=starts.view(-1),
        )
        assert torch.equal(rows[0].view(5, 2, -1), expected[0])


def test_starts_that_change_after_the_call(device: torch.device) -> None:
    """A rollout buffer may be filled again before backward."""
    layer = layer_of(BY_NAME["gru"], device=device)
    x, starts = randn(8, 3, 4, device=device).requires_grad_(), some_starts(8, 3).to(device)
    own = starts.clone()
    (expected,) = torch.autograd.grad(layer(x, starts=own)[0].sum(), x)
    y = layer(x, starts=starts)[0]
    starts.data.logical_not_()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_learned_initial_states() -> None:
    """As docs/index.md shows. Rows that begin anew at step 0 give them no gradient."""
    layer = layer_of(BY_NAME["lstm"])
    h_0, c_0 = (nn.Parameter(randn(1, 1, 6)) for _ in "hc")
    x = randn(7, 3, 4)
    hx = (h_0.expand(-1, 3, -1), c_0.expand(-1, 3, -1))
    layer(x, hx)[0].sum().backward()
    assert h_0.grad is not None and h_0.grad.all() and c_0.grad is not None and c_0.grad.all()

    # To begin every piece with them, the pieces are sequences of their own.
    pieces = [x[:4, 0], x[4:, 0], x[:, 1]]
    packed = nn.utils.rnn.pack_sequence(pieces, enforce_sorted=False)
    y, _ = layer(packed, (h_0.expand(-1, 3, -1), c_0.expand(-1, 3, -1)))
    y = nn.utils.rnn.unpack_sequence(y)
    again = layer(x[4:, :1], (h_0, c_0))[0]
    assert_close(y[1], again[:, 0])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_compiled(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = layer_of(BY_NAME[name], num_layers=2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T, N in ((6, 3), (9, 4)):
        x, starts = randn(T, N, 4), some_starts(T, N)
        for how in ({}, {"lengths": torch.full((N,), T - 1)}):
            given = {**how, "starts": starts, "return_states": True}
            expected, got = run(layer, x, **given), run(compiled, x, **given)
            for name_of, wanted in expected.items():
                torch.testing.assert_close(
                    got[
                        name_of.replace("d_", "d__orig_mod.")
                        if name_of.startswith("d_") and name_of not in ("d_x",)
                        else name_of
                    ],
                    wanted,
                )


def test_exported_and_loaded() -> None:
    layer = layer_of(BY_NAME["lstm"])
    x, starts = randn(6, 3, 4), some_starts(6, 3)
    program = torch.export.export(layer, (x,), {"starts": starts, "return_states": True})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = ~starts
    got = loaded(x, starts=other, return_states=True)
    expected = layer(x, starts=other, return_states=True)
    assert all(torch.equal(a, b) for a, b in zip(flat(got), flat(expected), strict=True))


def test_torch_func_grad() -> None:
    layer = layer_of(BY_NAME["gru"])
    x, starts = randn(6, 3, 4), some_starts(6, 3)
    d = torch.func.grad(lambda x: layer(x, starts=starts)[0].sum())(x)
    x.requires_grad_()
    assert_close(d, torch.autograd.grad(layer(x, starts=starts)[0].sum(), x)[0])


class TestErrors:
    layer = fusedrnn.FusedLSTM(4, 6)
    batch = torch.zeros(5, 2, 4)

    def raises(self, error: type[Exception], message: str, *args: Any, **how: Any) -> None:
        with pytest.raises(error, match=message):
            self.layer(*args, **how)

    @pytest.mark.parametrize("starts", [[[True]], True, "all"])
    def test_no_tensor(self, starts: Any) -> None:
        self.raises(TypeError, "starts must be a bool Tensor, got", self.batch, starts=starts)

    def test_dtype(self) -> None:
        message = r"starts must be bool, got torch.float32; give starts.bool\(\)"
        self.raises(RuntimeError, message, self.batch, starts=torch.zeros(5, 2))

    @pytest.mark.parametrize("shape", [(2, 5), (5, 2, 1), (10,), (5, 3)])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        starts = torch.zeros(*shape, dtype=torch.bool)
        self.raises(
            RuntimeError, r"starts must be \[T, N\] = \[5, 2\], got", self.batch, None, None, starts
        )

    def test_shape_of_other_forms(self) -> None:
        starts = torch.zeros(5, 2, dtype=torch.bool)
        self.raises(
            RuntimeError, r"starts must be \[T\] = \[5\], got", self.batch[:, 0], starts=starts
        )
        first = fusedrnn.FusedGRU(4, 6, batch_first=True)
        with pytest.raises(RuntimeError, match=r"starts must be \[N, T\] = \[2, 5\], got \[5, 2\]"):
            first(self.batch.transpose(0, 1), starts=starts)

    def test_device(self) -> None:
        message = "Input and starts tensors are not at the same device"
        starts = torch.zeros(5, 2, dtype=torch.bool, device="meta")
        self.raises(RuntimeError, message, self.batch, starts=starts)

    def test_layout(self) -> None:
        starts = torch.zeros(5, 2, dtype=torch.bool).to_sparse()
        self.raises(RuntimeError, "starts must be a dense tensor", self.batch, starts=starts)

    def test_packed(self) -> None:
        starts = torch.zeros(5, 2, dtype=torch.bool)
        packed = pack_padded_sequence(self.batch, [3, 5], enforce_sorted=False)
        self.raises(
            TypeError, "starts must be a PackedSequence for packed input", packed, starts=starts
        )
        other = pack_padded_sequence(starts, [4, 5], enforce_sorted=False)
        self.raises(
            RuntimeError, "starts must have the batch_sizes of the input", packed, starts=other
        )
        other = pack_padded_sequence(starts, [5, 3], enforce_sorted=False)
        self.raises(
            RuntimeError, "starts must have the sequences in the order", packed, starts=other
        )
        sorted_ones = pack_padded_sequence(starts, [5, 3])
        self.raises(RuntimeError, "got None", packed, starts=sorted_ones)

    def test_return_states(self) -> None:
        message = "return_states should be of type bool, got: int"
        self.raises(TypeError, message, self.batch, return_states=1)


def test_traced_by_fx(device: torch.device) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer_of(BY_NAME["gru"], device=device)

        def forward(self, x: Tensor, starts: Tensor) -> Any:
            return self.rnn(x, starts=starts)

    model = Model()
    x, starts = randn(5, 3, 4, device=device), some_starts(5, 3).to(device)
    graph = torch.fx.symbolic_trace(model)
    got, expected = graph(x, starts), model(x, starts)
    assert all(torch.equal(a, b) for a, b in zip(flat(got), flat(expected), strict=True))
    assert on(device, starts) is starts

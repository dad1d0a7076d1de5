"""fusedrnn.functional computes the same as the modules, and has its own errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedrnn import _run, functional
from fusedrnn._library import CELLS as SPECS
from fusedrnn._library import CellParameter, CudaLibrary
from tests.kit.layers import (
    BY_NAME,
    CELLS,
    FUNCTIONS,
    Cell,
    assert_close,
    flat,
    make_states,
    pad,
    ragged,
    randn,
)

f64 = torch.float64


def arguments(module: torch.nn.RNNBase) -> dict[str, Any]:
    """The keyword arguments with which a function computes the same as a module."""
    names = ("num_layers", "bias", "dropout", "training", "bidirectional", "batch_first")
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_as_the_module(
    device: torch.device, cell: Cell, batch_first: bool, bias: bool
) -> None:
    ours, _ = cell.make(
        3,
        5,
        device=device,
        num_layers=2,
        bidirectional=True,
        batch_first=batch_first,
        bias=bias,
        dropout=0.5,
        dtype=f64,
    )
    function, kwargs = FUNCTIONS[cell.name], arguments(ours)
    weights = list(ours.parameters())
    lengths = [4, 2, 0]
    padded = pad(ragged(lengths, 3, device=device), 4, float("nan"), batch_first)
    packed = torch.nn.utils.rnn.pack_sequence(ragged([4, 2, 1], 3, device=device))
    hx, unbatched = make_states(ours, 3, f64), make_states(ours, None, f64)

    def seeded(call: Any, *args: Any, **more: Any) -> list[Tensor]:
        torch.manual_seed(2)
        return flat(call(*args, **more))

    for x, states, more in (
        (randn(3, 4, 3, device=device) if batch_first else randn(4, 3, 3, device=device), hx, {}),
        (randn(4, 3, 3, device=device), None, {}),
        (randn(4, 3, device=device), unbatched, {}),
        (padded, hx, {"lengths": lengths}),
    ):
        expected = seeded(ours, x, states, **more)
        actual = seeded(function, x, states, weights, **kwargs, **more)
        for got, wanted in zip(actual, expected, strict=True):
            assert torch.equal(got, wanted)
            assert got.stride() == wanted.stride()
    expected = seeded(ours, packed, hx)
    sizes = {"batch_sizes": packed.batch_sizes}
    actual = seeded(function, packed.data, hx, weights, **kwargs, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_packed_sequence_comes_back_as_one(cell: Cell, sort: bool) -> None:
    ours, _ = cell.make(3, 5, num_layers=2, bidirectional=True, batch_first=True, dtype=f64)
    function, kwargs = FUNCTIONS[cell.name], arguments(ours)
    lengths = [4, 2, 1] if sort else [2, 4, 1]
    packed = torch.nn.utils.rnn.pack_sequence(ragged(lengths, 3), enforce_sorted=sort)
    hx = make_states(ours, 3, f64)
    y, states = function(packed, hx, list(ours.parameters()), **kwargs)
    expected, expected_states = ours(packed, hx)
    assert type(y) is type(packed)
    for got, wanted in zip(y, expected, strict=True):
        assert got is wanted or torch.equal(got, wanted)
    assert y.batch_sizes is packed.batch_sizes
    for got, wanted in zip(flat(states), flat(expected_states), strict=True):
        assert torch.equal(got, wanted)


def test_weights_may_be_any_tensors(device: torch.device) -> None:
    """Computed weights get gradients, and so does a weight that is used twice."""
    ours, _ = BY_NAME["gru"].make(5, 5, device=device, dtype=f64)
    scale = torch.tensor(0.5, dtype=f64, device=device, requires_grad=True)
    shared = randn(15, 5, device=device).requires_grad_()
    biases = [ours.bias_ih_l0, ours.bias_hh_l0]
    x = randn(4, 2, 5, device=device)

    def loss(w_ih: Tensor, w_hh: Tensor) -> Tensor:
        return functional.gru(x, None, [w_ih, w_hh, *biases])[0].sin().sum()

    d_scale, d_shared = torch.autograd.grad(loss(shared * scale, shared), (scale, shared))
    a, b = shared.detach().requires_grad_(), shared.detach().requires_grad_()
    d_a, d_b = torch.autograd.grad(loss(a * scale, b), (a, b))
    assert_close(d_shared, d_a + d_b)
    assert_close(d_scale, (d_a / scale * shared).sum())


def weights_of(name: str, **kwargs: Any) -> list[Any]:
    return list(BY_NAME[name].make(3, 8, **kwargs)[0].parameters())


def replaced(weights: list[Any], index: int, value: Any) -> list[Any]:
    return [value if k == index else w for k, w in enumerate(weights)]


x = torch.ones(4, 2, 3)
lstm, proj = weights_of("lstm"), weights_of("lstm_proj")
gru, rnn = weights_of("gru"), weights_of("rnn_tanh")
h = torch.ones(1, 2, 8)
packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 2])

MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "too few weights": (
        lambda: functional.lstm(x, None, lstm[:3]),
        RuntimeError,
        r"weights must hold weight_ih, weight_hh, bias_ih, bias_hh .* 4 tensors, got 3",
    ),
    "no weights": (lambda: functional.gru(x, None, []), RuntimeError, "got 0"),
    "bias=False with biases": (
        lambda: functional.gru(x, None, gru, bias=False),
        RuntimeError,
        "weights must hold weight_ih, weight_hh for each of 1 layers and 1 directions",
    ),
    "weights of one layer for two": (
        lambda: functional.rnn(x, None, rnn, num_layers=2),
        RuntimeError,
        r"each of 2 layers and 1 directions, 8 tensors, got 4",
    ),
    "weight_hr for a GRU": (
        lambda: functional.gru(x, None, [*gru, gru[0]]),
        RuntimeError,
        "4 tensors, got 5",
    ),
    "num_layers": (
        lambda: functional.lstm(x, None, lstm, num_layers=0),
        ValueError,
        "num_layers must be greater than zero, got 0",
    ),
    "weight_hh": (
        lambda: functional.lstm(x, None, replaced(lstm, 1, torch.ones(32, 4))),
        RuntimeError,
        r"weight_hh_l0 must be \[4H, H\] = \[32, 8\], got \[32, 4\]",
    ),
    "weight_hh with projection": (
        lambda: functional.lstm(x, None, replaced(proj, 1, torch.ones(32, 8))),
        RuntimeError,
        r"weight_hh_l0 must be \[4H, P\] = \[32, 4\], got \[32, 8\]",
    ),
    "weight_hr": (
        lambda: functional.lstm(x, None, replaced(proj, 4, torch.ones(4, 9))),
        RuntimeError,
        r"weight_hr_l0 must be \[P, H\] = \[4, 8\], got \[4, 9\]",
    ),
    "bias_ih": (
        lambda: functional.gru(x, None, replaced(gru, 2, torch.ones(8))),
        RuntimeError,
        r"bias_ih_l0 must be \[3H\] = \[24\], got \[8\]",
    ),
    "rows that G does not divide": (
        lambda: functional.lstm(x, None, replaced(lstm, 0, torch.ones(33, 3))),
        RuntimeError,
        r"weight_ih_l0 must be \[4H, I\] = \[32, 3\], got \[33, 3\]",
    ),
    "a vector as a matrix": (
        lambda: functional.rnn(x, None, replaced(rnn, 1, torch.ones(8))),
        RuntimeError,
        r"weight_hh_l0 must be \[H, H\], got \[8\]",
    ),
    "None as a weight": (
        lambda: functional.rnn(x, None, replaced(rnn, 3, None)),
        TypeError,
        "bias_hh_l0 must be a Tensor, got NoneType",
    ),
    "dtype of a weight": (
        lambda: functional.rnn(x, None, replaced(rnn, 1, rnn[1].double())),
        RuntimeError,
        "weight_hh_l0 must have the dtype of the input, torch.float32, got torch.float64",
    ),
    "device of a weight": (
        lambda: functional.rnn(x, None, replaced(rnn, 1, rnn[1].to("meta"))),
        RuntimeError,
        "found input tensor at cpu and parameter tensor weight_hh_l0 at meta",
    ),
    "nonlinearity": (
        lambda: functional.rnn(x, None, rnn, nonlinearity="selu"),
        ValueError,
        "Unknown nonlinearity 'selu'. Select from 'tanh' or 'relu'.",
    ),
    "batch_sizes type": (
        lambda: functional.gru(x[0], None, gru, batch_sizes=[1, 1]),  # type: ignore[arg-type]
        TypeError,
        "batch_sizes must be a Tensor, got list",
    ),
    "batch_sizes sum": (
        lambda: functional.gru(x[0], None, gru, batch_sizes=torch.tensor([2, 1])),
        RuntimeError,
        "batch_sizes must sum to the number of rows of the packed data, 2, got 3",
    ),
    "batch_sizes grow": (
        lambda: functional.gru(x[:3, 0], None, gru, batch_sizes=torch.tensor([1, 2])),
        RuntimeError,
        r"batch_sizes must be at least 1 and never grow, got \[1, 2\]",
    ),
    "batch_sizes with 3-D input": (
        lambda: functional.gru(x, None, gru, batch_sizes=torch.tensor([2, 2, 2, 2])),
        RuntimeError,
        "input must have 2 dimensions, got 3",
    ),
    "bidirectional": (
        lambda: functional.gru(x, None, gru, bidirectional="yes"),  # type: ignore[arg-type]
        TypeError,
        "bidirectional should be of type bool, got: str",
    ),
    "bias": (
        lambda: functional.rnn(x, None, rnn, bias=1),  # type: ignore[arg-type]
        TypeError,
        "bias should be of type bool, got: int",
    ),
    "batch_first": (
        lambda: functional.lstm(x, None, lstm, batch_first=None),  # type: ignore[arg-type]
        TypeError,
        "batch_first should be of type bool, got: NoneType",
    ),
    "batch_sizes of a PackedSequence": (
        lambda: functional.gru(packed, None, gru, batch_sizes=packed.batch_sizes),
        ValueError,
        "batch_sizes must be None with a PackedSequence, which has its own",
    ),
    "lengths of a PackedSequence": (
        lambda: functional.gru(packed, None, gru, lengths=[4, 2]),
        ValueError,
        "lengths must be None with a PackedSequence, which has its own",
    ),
    "batch_sizes and lengths": (
        lambda: functional.gru(x[0], None, gru, batch_sizes=torch.tensor([2]), lengths=[1, 1]),
        ValueError,
        "lengths must be None with a PackedSequence",
    ),
    "states of a packed batch": (
        lambda: functional.gru(x[0], torch.ones(1, 3, 8), gru, batch_sizes=torch.tensor([2])),
        RuntimeError,
        r"Expected hidden size \(1, 2, 8\), got \[1, 3, 8\]",
    ),
    "lengths unbatched": (
        lambda: functional.gru(x[:, 0], None, gru, lengths=[4]),
        ValueError,
        "lengths must be None for unbatched 2-D input",
    ),
    "lengths type": (
        lambda: functional.gru(x, None, gru, lengths="44"),  # type: ignore[arg-type]
        TypeError,
        "lengths must be a list, an array or a tensor of whole numbers, got str",
    ),
    "one length": (
        lambda: functional.gru(x, None, gru, lengths=4),  # type: ignore[arg-type]
        TypeError,
        "lengths must be a list, an array or a tensor of whole numbers, got int",
    ),
    "lengths of fractions": (
        lambda: functional.gru(x, None, gru, lengths=[4.0, 2.5]),  # type: ignore[list-item]
        TypeError,
        "lengths must hold a whole number for each sequence, got 2.5",
    ),
    "lengths of text": (
        lambda: functional.gru(x, None, gru, lengths=["4", "2"]),  # type: ignore[list-item]
        TypeError,
        "lengths must hold a whole number for each sequence, got '4'",
    ),
    "lengths of nothing": (
        lambda: functional.gru(x, None, gru, lengths=[4, None]),  # type: ignore[list-item]
        TypeError,
        "lengths must hold a whole number for each sequence, got None",
    ),
    "lengths of lists": (
        lambda: functional.gru(x, None, gru, lengths=[[4], [2]]),  # type: ignore[list-item]
        TypeError,
        r"lengths must hold a whole number for each sequence, got \[4\]",
    ),
    "lengths of tensors of two": (
        lambda: functional.gru(x, None, gru, lengths=[torch.tensor([1, 2])] * 2),
        TypeError,
        r"lengths must hold a whole number for each sequence, got tensor\(\[1, 2\]\)",
    ),
    "lengths of bools": (
        lambda: functional.gru(x, None, gru, lengths=[True, 2]),
        TypeError,
        "lengths must hold a whole number for each sequence, got True",
    ),
    "lengths bool": (
        lambda: functional.gru(x, None, gru, lengths=torch.tensor([True, False])),
        TypeError,
        "lengths must hold a whole number for each sequence, got True",
    ),
    "lengths with fractions": (
        lambda: functional.gru(x, None, gru, lengths=torch.tensor([1.0, 2.5])),
        TypeError,
        "lengths must hold a whole number for each sequence, got 2.5",
    ),
    "lengths nan": (
        lambda: functional.gru(x, None, gru, lengths=torch.tensor([1.0, float("nan")])),
        TypeError,
        "lengths must hold a whole number for each sequence, got nan",
    ),
    "lengths beyond int64": (
        lambda: functional.gru(x, None, gru, lengths=[2**70, 1]),
        RuntimeError,
        rf"lengths\[0\] must be in \[0, T\] = \[0, 4\], got {2**70}",
    ),
    "lengths on another device": (
        lambda: functional.gru(x, None, gru, lengths=torch.tensor([1, 2], device="meta")),
        RuntimeError,
        "lengths must be on the CPU, got torch.int64 on meta",
    ),
    "number of lengths": (
        lambda: functional.gru(x, None, gru, lengths=[1, 2, 3]),
        RuntimeError,
        r"lengths must be \[N\] = \[2\], got \[3\]",
    ),
    "lengths 2-D": (
        lambda: functional.gru(x, None, gru, lengths=torch.ones(2, 1, dtype=torch.int64)),
        RuntimeError,
        r"lengths must be \[N\] = \[2\], got \[2, 1\]",
    ),
    "lengths beyond T": (
        lambda: functional.gru(x, None, gru, lengths=[4, 5]),
        RuntimeError,
        r"lengths\[1\] must be in \[0, T\] = \[0, 4\], got 5",
    ),
    "lengths below 0": (
        lambda: functional.gru(x, None, gru, lengths=torch.tensor([-1, 2])),
        RuntimeError,
        r"lengths\[0\] must be in \[0, T\] = \[0, 4\], got -1",
    ),
    "dtype without kernels": (
        lambda: functional.rnn(x.to(torch.complex64), None, [w.to(torch.complex64) for w in rnn]),
        NotImplementedError,
        "input must be float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    "dropout out of range": (
        lambda: functional.rnn(
            x, None, weights_of("rnn_tanh", num_layers=2), num_layers=2, dropout=2.0, training=True
        ),
        ValueError,
        "dropout",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert caught.type is kind


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that claims to be on another device stands for one on a GPU."""
    missing = CudaLibrary(None, "torch computes on the CPU only")
    monkeypatch.setattr("fusedrnn._library.CUDA", missing)
    monkeypatch.setattr("fusedrnn._checks.CUDA", missing)

    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda", 0)

    def elsewhere(t: Tensor) -> Tensor:
        return t.detach().as_subclass(Elsewhere)

    with pytest.raises(NotImplementedError, match=r"on cuda:0, but the CUDA library .* CPU"):
        functional.gru(elsewhere(x), None, [elsewhere(w) for w in gru])
    with pytest.raises(RuntimeError, match=r"found input tensor at cuda:0 and parameter tensor"):
        functional.gru(elsewhere(x), None, gru)
    with pytest.raises(RuntimeError, match=r"found input tensor at cpu and hidden tensor"):
        functional.gru(x, elsewhere(h), gru)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_meta_computes_shapes(cell: Cell) -> None:
    ours, _ = cell.make(3, 8, num_layers=2, bidirectional=True)
    expected = flat(ours(x))
    ours.to("meta")
    actual = flat(ours(x.to("meta")))
    for got, wanted in zip(actual, expected, strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_cells_of_as_many_weights_are_told_by_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peephole has as many as a projection, and is a vector."""
    lstm = SPECS["lstm"]
    peephole = CellParameter("weight_ch", ("3*H",))
    assert peephole.shape(G=4, H=5, I=2, P=5) == (15,)
    parameters = (*lstm.parameters, peephole)
    cells = ("lstm", "lstm_proj", "lstm_peephole")
    monkeypatch.setitem(
        SPECS, cells[-1], dataclasses.replace(lstm, name=cells[-1], parameters=parameters)
    )
    four = [torch.zeros(20, 2), torch.zeros(20, 5), torch.zeros(20), torch.zeros(20)]
    for last, wanted, P in ((torch.zeros(3, 5), "lstm_proj", 3), (torch.zeros(15), cells[2], 5)):
        assert _run.sizes_of(cells, [*four, last], 1, True, False) == (wanted, (2, 5, P))
    assert _run.sizes_of(cells, four, 1, True, False) == ("lstm", (2, 5, 5))

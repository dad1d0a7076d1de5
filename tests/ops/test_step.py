"""The ops of one step compute the same as a layer's, and calls that use a layer's ops instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusedrnn import _ops
from fusedrnn._library import CELLS
from tests.kit.layers import CELL_MODULES, flat, randn

STEP, STEP_BACKWARD = torch.ops.fusedrnn._step, torch.ops.fusedrnn._step_backward
ERRORS = (RuntimeError, NotImplementedError)
f64 = torch.float64

each = pytest.mark.parametrize("cell", CELL_MODULES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which each call appends "step" or "layer", by the op that it runs."""
    words: list[str] = []

    def record(name: str, run: Callable[..., Any]) -> None:
        def recording(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            words.append(name)
            return result

        monkeypatch.setattr(_ops, name, recording)

    record("layer", _ops.layer)
    record("step", _ops.step)
    return words


def make(cell: str, N: tuple[int, ...] = (3,), dtype: torch.dtype = f64) -> tuple[Any, ...]:
    """A cell module with I = 4 and H = 6, an input, and hx."""
    module = CELL_MODULES[cell](4, 6, dtype=dtype)
    x, h, c = (randn(*N, size, dtype=dtype, seed=size + k) for k, size in enumerate((4, 6, 6)))
    return module, x, (h, c) if CELLS[cell].has_c else h


def leaves_of(module: Any, x: Tensor, hx: Any) -> list[Tensor]:
    return [t.requires_grad_() for t in (x, *flat(hx))] + list(module.parameters())


def through_layer(module: Any, x: Tensor, hx: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(_ops, "may_step", lambda: False)
        return module(x, hx)


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [(3,), (1,), (), (0,)], ids=str)
@each
def test_the_same_as_a_layer(
    cell: str, N: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients have the same bits, also for a loss of one output alone."""
    module, x, hx = make(cell, N, dtype)
    for states in (hx, None):
        a, b = flat(module(x, states)), flat(through_layer(module, x, states, monkeypatch))
        assert [t.shape for t in a] == [t.shape for t in b]
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
        with torch.no_grad():
            assert all(torch.equal(s, t) for s, t in zip(flat(module(x, states)), b, strict=True))
    leaves = leaves_of(module, x, hx)
    for wanted in (leaves, leaves[:1], leaves[1:2], leaves[-4:], leaves[-1:]):
        a, b = flat(module(x, hx)), flat(through_layer(module, x, hx, monkeypatch))
        for which in (slice(None), slice(0, 1), slice(-1, None)):
            got, expected = (
                torch.autograd.grad([t.sin().sum() for t in y[which]], wanted, retain_graph=True)
                for y in (a, b)
            )
            assert all(torch.equal(s, t) for s, t in zip(got, expected, strict=True))


@each
def test_eager_calls_are_steps(cell: str, calls: list[str]) -> None:
    module, x, hx = make(cell)
    module(x, hx), module(x), module(x[0])
    with torch.no_grad():
        module(x, hx)
    with torch.inference_mode():
        module(x, hx)
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        module(x.float(), tuple(t.float() for t in hx) if CELLS[cell].has_c else hx.float())
        module(x.float())
    assert calls == ["step"] * 7


@each
def test_calls_that_use_the_ops_of_a_layer(cell: str, calls: list[str]) -> None:
    module, x, hx = make(cell, dtype=torch.float32)
    expected = flat(module(x, hx))
    calls.clear()
    torch.func.grad(lambda x: flat(module(x, hx))[0].sum())(x)
    traced = make_fx(lambda x: flat(module(x, hx))[0])(x)
    assert torch.equal(traced(x), expected[0])
    meta = CELL_MODULES[cell](4, 6, device="meta")
    assert flat(meta(x.to("meta")))[0].shape == (3, 6)
    with FakeTensorMode() as mode:
        assert flat(CELL_MODULES[cell](4, 6)(mode.from_tensor(x)))[0].shape == (3, 6)
    with torch.autograd.forward_ad.dual_level():
        module(x, hx)
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode AD"):
            module(dual, hx)
    assert set(calls) == {"layer"}


@pytest.mark.parametrize("N", [(2,), ()], ids=str)
@each
def test_second_derivatives(cell: str, N: tuple[int, ...]) -> None:
    module, x, hx = make(cell, N)
    leaves = leaves_of(module, x, hx)

    def run(x: Tensor, *rest: Tensor) -> Any:
        count = 2 if CELLS[cell].has_c else 1
        named = dict(zip(dict(module.named_parameters()), rest[count:], strict=True))
        states = tuple(rest[:2]) if CELLS[cell].has_c else rest[0]
        return torch.func.functional_call(module, named, (x, states))

    assert torch.autograd.gradcheck(run, leaves)
    if cell != "rnn_relu":
        assert torch.autograd.gradgradcheck(run, leaves)


@each
def test_saved_tensors_go_through_hooks(cell: str) -> None:
    """Checkpointing and offloading use these hooks to get the tensors that backward needs."""
    module, x, hx = make(cell)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = flat(module(x, hx))[0]
    states = 2 if CELLS[cell].has_c else 1
    assert len(packed) == 1 + states + 1 + 4
    expected = torch.autograd.grad(flat(module(x, hx))[0].sum(), list(module.parameters()))
    for a, b in zip(torch.autograd.grad(y.sum(), list(module.parameters())), expected, strict=True):
        assert torch.equal(a, b)


@each
def test_checkpointing(cell: str) -> None:
    """torch ends the repeated forward inside the step, by an exception."""
    module, x, hx = make(cell)
    leaves = leaves_of(module, x, hx)
    expected = torch.autograd.grad(flat(module(x, hx))[0].sum(), leaves)
    y = torch.utils.checkpoint.checkpoint(module, x, hx, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(flat(y)[0].sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_backward_under_autocast() -> None:
    module, x, hx = make("lstm", dtype=torch.float32)
    leaves = leaves_of(module, x, hx)
    expected = torch.autograd.grad(module(x, hx)[0].sum(), leaves)
    y = module(x, hx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- The ops, called directly with wrong arguments -----------------------------------------------


def arguments(cell: str = "lstm") -> dict[str, Any]:
    """N=3, I=4, H=6."""
    module, x, hx = make("lstm" if CELLS[cell].projects else cell)
    h, c = (*flat(hx), None)[:2]
    weights = [w.detach() for w in module.parameters()]
    sizes = {"input_size": 4, "hidden_size": 6, "cell": cell}
    return {"x": x, "h": h, "c": c, "weights": weights, **sizes, "keep": True}


def backward_arguments(cell: str = "lstm") -> dict[str, Any]:
    given = arguments(cell)
    reserve = STEP(**given)[-1]
    grads = {"grad_h": given.pop("h"), "grad_c": given.pop("c"), "reserve": reserve}
    del given["keep"]
    return given | grads | {"need_x": True, "need_state": True, "need_weights": True}


def no(_: Any) -> None:
    return None


SHARED: list[tuple[str, Callable[[Any], Any], str]] = [
    ("x", lambda x: x[0, 0], r"x must be \[N, I\] or \[I\], got \[\]"),
    ("x", lambda x: x[None], r"x must be \[N, I\] or \[I\], got \[1, 3, 4\]"),
    ("x", lambda x: x[:, :3], r"weight_ih must be \[G\*H, I\] = \[24, 3\], got \[24, 4\]"),
    ("x", lambda x: x[:, :0], "x must have I > 0 features"),
    ("x", Tensor.float, "weight_ih must be float32, got float64"),
    ("x", Tensor.long, "x must be float64, float32, bfloat16 or float16"),
    ("x", lambda x: x.to("meta"), "no fake impl or Meta kernel|must be on the CPU"),
    ("cell", lambda _: "lsmt", "cell must be one of lstm, lstm_proj, gru, .*, got 'lsmt'"),
    ("cell", lambda _: "lstm_proj", "cell must be one without projection, got lstm_proj"),
    ("cell", lambda _: "gru", "weight_hh must be|must be absent"),
    ("weights", lambda w: w[:3], "weights of lstm must be 2 or 4 per direction, got 3"),
    ("weights", lambda w: [], "weights of lstm must be 2 or 4 per direction, got 0"),
    ("weights", lambda w: [w[0], w[1][:, :5], *w[2:]], r"weight_hh must be .* = \[24, 6\], got"),
    ("weights", lambda w: [*w[:3], w[3][1:]], r"bias_hh must be .* = \[24\], got \[23\]"),
    ("input_size", lambda _: 5, "x must have I = 5 features, got 4"),
    (
        "hidden_size",
        lambda _: 1 << 62,
        "weight_ih must have rows for H = 4611686018427387904, got 6",
    ),
]
FORWARD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("h", no, "h and c must both be there, or neither"),
    ("c", no, "h and c must both be there, or neither"),
    ("h", lambda h: h[:2], r"h must be \[N, H\] = \[3, 6\], got \[2, 6\]"),
    ("h", lambda h: h[0], r"h must be \[N, H\] = \[3, 6\], got \[6\]"),
    ("c", lambda c: c[:, :5], r"c must be \[N, H\] = \[3, 6\], got \[3, 5\]"),
    ("c", Tensor.float, "c must be float64, got float32"),
]
BACKWARD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("reserve", lambda r: r[:-1], r"reserve must be .* = \[108\], got \[107\]"),
    ("reserve", Tensor.float, "reserve must be float64, got float32"),
    ("grad_h", lambda g: g[0], r"grad_h must be \[N, H\] = \[3, 6\], got \[6\]"),
    ("grad_c", lambda g: g[:, 1:], r"grad_c must be \[N, H\] = \[3, 6\], got \[3, 5\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), SHARED + FORWARD)
def test_step_with_wrong_arguments(name: str, change: Callable[[Any], Any], message: str) -> None:
    given = arguments()
    STEP(**given)  # the unchanged arguments are right
    with pytest.raises(ERRORS, match=message):
        STEP(**given | {name: change(given[name])})


@pytest.mark.parametrize(("name", "change", "message"), SHARED + BACKWARD)
def test_step_backward_with_wrong_arguments(
    name: str, change: Callable[[Any], Any], message: str
) -> None:
    given = backward_arguments()
    STEP_BACKWARD(**given)
    with pytest.raises(ERRORS, match=message):
        STEP_BACKWARD(**given | {name: change(given[name])})


@pytest.mark.parametrize("cell", [name for name in CELL_MODULES if not CELLS[name].has_c])
def test_a_cell_state_for_a_cell_without_one(cell: str) -> None:
    c = torch.zeros(3, 6, dtype=f64)
    with pytest.raises(ERRORS, match=r"c must be absent: .* has no cell state"):
        STEP(**arguments(cell) | {"c": c})
    with pytest.raises(ERRORS, match=r"grad_c must be absent: .* has no cell state"):
        STEP_BACKWARD(**backward_arguments(cell) | {"grad_c": c})


def test_every_cell_with_the_weights_of_a_torch_cell_is_here() -> None:
    """Projections and peepholes are options of the layer alone."""
    theirs = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    specs = CELLS.items()
    assert list(CELL_MODULES) == [
        name for name, spec in specs if {p.name for p in spec.parameters} == theirs
    ]

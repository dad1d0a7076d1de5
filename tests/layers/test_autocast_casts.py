"""Casts of weights under autocast: each weight is cast once a region, from its present values."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import fusedrnn
from fusedrnn import _autocast
from tests.kit.layers import error, flat, randn

KINDS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: fusedrnn.FusedLSTM(4, 6, num_layers=2, bidirectional=True, proj_size=2),
    "GRU": lambda: fusedrnn.FusedGRU(4, 6),
    "LSTMCell": lambda: fusedrnn.FusedLSTMCell(4, 6),
    "GRUCell": lambda: fusedrnn.FusedGRUCell(4, 6),
    "RNNCell": lambda: fusedrnn.FusedRNNCell(4, 6),
}
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which every call of cast_weights appends its result."""
    results: list[Any] = []
    right = _autocast._from_region

    def recording(*args: Any) -> Any:
        results.append(right(*args))
        return results[-1]

    monkeypatch.setattr(_autocast, "_from_region", recording)
    return results


def make(kind: str) -> tuple[Any, Tensor]:
    return KINDS[kind](), randn(*((2, 4) if "Cell" in kind else (3, 2, 4)), seed=1).float()


def region(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return torch.autocast("cpu", dtype=dtype, **options)


def fresh(module: Any, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The results in an autocast region without a cache of casts."""
    with torch.no_grad(), region(dtype, cache_enabled=False):
        return flat(module(x))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@each
def test_once_in_a_region(kind: str, mode: Any, made: list[Any]) -> None:
    module, x = make(kind)
    expected = fresh(module, x)
    assert not made
    with mode(), region():
        for _ in range(3):
            assert equal(flat(module(x)), expected)
    first, *others = made
    assert len(first) == len(list(module.parameters()))
    for casts in others:
        assert all(a is b for a, b in zip(casts, first, strict=True))
    with mode(), region():
        module(x)
    assert not any(a is b for a, b in zip(made[-1], first, strict=True))


def test_nothing_is_kept_after_the_region(made: list[Any]) -> None:
    module, x = make("GRU")
    with torch.no_grad(), region():
        with region():
            module(x)
        gone = weakref.ref(made.pop()[0])
        gc.collect()
        assert gone() is not None  # torch's cache lives until the outermost region ends
    gc.collect()
    assert gone() is None
    weight = weakref.ref(module.weight_ih_l0)
    del module
    gc.collect()
    assert weight() is None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda p: p.mul_(2),
    "copied": lambda p: p.copy_(3 * p),
    "other data": lambda p: setattr(p, "data", p.data * 2),
    "of the same memory": lambda p: setattr(p, "data", p.data.t().contiguous().t() * 2),
    "set": lambda p: p.set_((p * 2).detach()),
}


@pytest.mark.parametrize("change", CHANGES)
@each
def test_changes_within_a_region_are_seen(kind: str, change: str) -> None:
    module, x = make(kind)
    with region():
        before = flat(module(x))
        with torch.no_grad():
            for p in module.parameters():
                CHANGES[change](p)
        after = flat(module(x))
    assert equal(after, fresh(module, x))
    assert not equal(after, before)


def test_the_same_memory_the_other_way_round() -> None:
    """Neither the version nor the address of the weight shows this change."""
    module = fusedrnn.FusedRNN(4, 4)
    x = randn(3, 2, 4).float()
    with torch.no_grad(), region():
        module(x)
        module.weight_hh_l0.data = module.weight_hh_l0.data.t()
        after = flat(module(x))
    assert equal(after, fresh(module, x))


def test_other_data_where_old_data_lay() -> None:
    """Before the next call other values may lie in the memory of the weights that were cast."""
    module = fusedrnn.FusedLSTM(4, 64)
    x = randn(3, 2, 4).float()
    with torch.no_grad(), region():
        for _ in range(10):
            module(x)
            for _ in range(2):
                for p in module.parameters():
                    p.data = torch.randn(p.shape)
            assert equal(flat(module(x)), fresh(module, x))


@each
def test_another_parameter_and_an_optimizer(kind: str) -> None:
    module, x = make(kind)
    name, weight = next(iter(module.named_parameters()))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    with region():
        loss = sum((t.float().sum() for t in flat(module(x))), torch.zeros(()))
        loss.backward()
        optimizer.step()
        assert equal(flat(module(x)), fresh(module, x))
        setattr(module, name, nn.Parameter(weight.detach() * 3))
        assert equal(flat(module(x)), fresh(module, x))
        named = {k: p.detach() * 2 for k, p in module.named_parameters()}
        called = flat(torch.func.functional_call(module, named, (x,)))
    module.load_state_dict(named)
    assert equal(called, fresh(module, x))


@each
def test_writes_through_data_between_regions(kind: str) -> None:
    """Old optimizers write in this way, which does not change the version of a weight."""
    module, x = make(kind)
    with torch.no_grad(), region():
        module(x)
    for p in module.parameters():
        p.data.mul_(2)
    with torch.no_grad(), region():
        assert equal(flat(module(x)), fresh(module, x))


@each
def test_regions_in_regions(kind: str) -> None:
    module, x = make(kind)
    bf16, f16 = fresh(module, x), fresh(module, x, torch.float16)
    with torch.no_grad(), region():
        assert equal(flat(module(x)), bf16)
        with region(torch.float16):
            assert equal(flat(module(x)), f16)
        with region(enabled=False):
            assert flat(module(x))[0].dtype == torch.float32
        with region(cache_enabled=False):
            assert equal(flat(module(x)), bf16)
        assert equal(flat(module(x)), bf16)


@each
def test_without_grad_first(kind: str, made: list[Any]) -> None:
    """A cast that was made without grad is used in training too."""
    module, x = make(kind)
    parameters = list(module.parameters())
    with region(cache_enabled=False):
        expected = torch.autograd.grad(flat(module(x))[0].float().sum(), parameters)
    for mode in (torch.no_grad, torch.inference_mode):
        with region():
            with mode():
                module(x)
            got = torch.autograd.grad(flat(module(x))[0].float().sum(), parameters)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.float32
            assert error(a, b) < 0.01
    assert made[0][0] is made[1][0] and made[2][0] is made[3][0]


@each
def test_gradients_through_many_steps(kind: str) -> None:
    """The gradients are exact for the rounded weights, and are summed in float32."""
    module, _ = make(kind)
    x = randn(30, 2, 4, seed=3).float()
    exact = KINDS[kind]().double()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), module.parameters(), strict=True):
            p.copy_(q.bfloat16())
    gradients = []
    for run, enabled in ((module, True), (exact, False)):
        loss, hx = torch.zeros(()), None
        with region(enabled=enabled):
            for row in x if enabled else x.bfloat16().double():
                out = run(row if "Cell" in kind else row[None], hx)
                hx = out if "Cell" in kind else out[1]
                loss = loss + flat(out)[0].double().sum()
        gradients.append(torch.autograd.grad(loss, list(run.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 0.02


def test_second_derivatives() -> None:
    module, exact = fusedrnn.FusedGRU(3, 4), fusedrnn.FusedGRU(3, 4).double()
    exact.load_state_dict(module.state_dict())
    results = []
    for run in (module, exact):
        x = randn(5, 2, 3, seed=1).to(run.weight_ih_l0.dtype).requires_grad_()
        with region(enabled=run is module):
            y = [run(x)[0] for _ in range(2)][1]
        leaves = [x, *run.parameters()]
        first = torch.autograd.grad(y.to(x.dtype).sin().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.sin().sum() for g in first), leaves))
    for got, wanted in zip(*results, strict=True):
        assert error(got, wanted) < 0.05


def test_weights_that_are_no_parameters(made: list[Any]) -> None:
    """Weights that are computed anew for each call are cast each time, and keep their graph."""
    module, x = make("GRU")
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with region():
        y = [flat(module(x))[0] for _ in range(2)][1]
    assert made == [None, None]
    y.float().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_one_bias_without_the_other() -> None:
    module, x = make("GRUCell")
    module.bias_hh = None
    with torch.no_grad(), region():
        assert equal([flat(module(x))[0] for _ in range(2)][1:], fresh(module, x))


def test_frozen_weights_are_kept(made: list[Any]) -> None:
    module, x = make("GRUCell")
    module.requires_grad_(False)
    with region():
        module(x), module(x)
    assert made[0][0] is made[1][0]


def test_threads() -> None:
    """All threads share torch's cache of casts, and a thread that leaves its region empties it."""
    module, x = make("LSTM")
    expected, wrong = fresh(module, x), []

    def run() -> None:
        for _ in range(50):
            with torch.no_grad(), region():
                if not all(equal(flat(module(x)), expected) for _ in range(3)):
                    wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_saved_tensors_hooks_see_no_mark() -> None:
    module, x = make("GRUCell")
    packed: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
        region(),
    ):
        module(x)
    assert all(t.numel() for t in packed)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_compiled_and_checkpointed(kind: str) -> None:
    module, x = make(kind)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    parameters = list(module.parameters())
    with region():
        eager = flat(module(x))[0]
        again = flat(compiled(x))[0]
        stored = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert torch.equal(eager, again)
    expected = torch.autograd.grad(eager.float().sum(), parameters)
    for y in (again, flat(stored)[0]):
        for a, b in zip(torch.autograd.grad(y.float().sum(), parameters), expected, strict=True):
            assert error(a, b) < 0.01

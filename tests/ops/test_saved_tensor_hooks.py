"""Hooks for saved tensors may return them to backward in any memory, as with torch.nn."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fusedrnn
from fusedrnn import _ops
from fusedrnn._library import CELLS
from tests.kit.arguments import CELLS_AND_FORMS, make_arguments, other_memory
from tests.kit.layers import CELL_MODULES, flat

f64 = torch.float64
# Functions from a saved tensor to the tensor that its hook returns.
UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    kind: lambda t, k=k: other_memory(t)[k] if t.dim() else t  # type: ignore[misc]
    for k, kind in enumerate(("strided", "late", "unaligned"))
}
Gradients = Sequence[Tensor]


def given_back(unpack: Callable[[Tensor], Tensor]) -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda t: t.detach().clone(), unpack)


def derive(outputs: Sequence[Tensor], leaves: Sequence[Tensor], higher: bool) -> Gradients:
    loss = torch.stack([o.square().sum() for o in outputs if o.requires_grad]).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=higher)
    if not higher:
        return first
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)


def layer_gradients(
    cell: str, form: str, higher: bool, context: AbstractContextManager[Any]
) -> Gradients:
    torch.manual_seed(0)
    call = make_arguments(cell, form)
    with context:
        outputs = call.run(_ops.layer)
    return derive(outputs, call.leaves, higher)


def step_gradients(name: str, higher: bool, context: AbstractContextManager[Any]) -> Gradients:
    torch.manual_seed(0)
    cell: nn.Module = CELL_MODULES[name](4, 6, dtype=f64)
    x, h, c = (torch.randn(3, n, dtype=f64, requires_grad=True) for n in (4, 6, 6))
    states = (h, c) if CELLS[name].has_c else (h,)
    with context:
        outputs = cell(x, states if CELLS[name].has_c else h)
    outputs = outputs if CELLS[name].has_c else (outputs,)
    return derive(outputs, [x, *states, *cell.parameters()], higher)


def assert_same(got: Gradients, wanted: Gradients) -> None:
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unpack", UNPACK)
@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_a_layer(cell: str, form: str, unpack: str) -> None:
    for higher in (False, True):
        wanted = layer_gradients(cell, form, higher, nullcontext())
        assert_same(layer_gradients(cell, form, higher, given_back(UNPACK[unpack])), wanted)


@pytest.mark.parametrize("unpack", UNPACK)
@pytest.mark.parametrize("name", CELL_MODULES)
def test_a_step(name: str, unpack: str) -> None:
    for higher in (False, True):
        wanted = step_gradients(name, higher, nullcontext())
        assert_same(step_gradients(name, higher, given_back(UNPACK[unpack])), wanted)


def test_save_on_cpu() -> None:
    for higher in (False, True):
        wanted = layer_gradients("lstm", "lengths", higher, nullcontext())
        assert_same(layer_gradients("lstm", "lengths", higher, save_on_cpu()), wanted)
        wanted = step_gradients("lstm", higher, nullcontext())
        assert_same(step_gradients("lstm", higher, save_on_cpu()), wanted)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
def test_weights_changed_where_torch_allows_it(kind: str) -> None:
    """allow_mutation_on_saved_tensors has such hooks, which copy tensors before they change."""
    module = getattr(fusedrnn, f"Fused{kind}")(4, 6, dtype=f64)
    x = torch.randn(3, 4, dtype=f64)

    def gradients(factor: float) -> Gradients:
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss = flat(module(x))[0].square().sum()
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(factor)
            return torch.autograd.grad(loss, list(module.parameters()))

    for a, b in zip(gradients(1), gradients(2), strict=True):
        assert torch.equal(a, b)


def test_a_dtype_that_was_changed() -> None:
    """A hook that compresses a tensor must return it in its original dtype."""
    message = "reserve must be float64, got float32; it is what forward kept, which a hook"
    for gradients in (
        lambda hook: layer_gradients("gru", "plain", False, hook),
        lambda hook: step_gradients("gru", False, hook),
    ):
        with pytest.raises(RuntimeError, match=message):
            gradients(given_back(lambda t: t.float() if t.dim() == 1 and len(t) > 24 else t))


@pytest.mark.parametrize("higher", [False, True])
def test_another_device(higher: bool) -> None:
    def to_meta(t: Tensor) -> Tensor:
        return t.to("meta")

    for gradients in (
        lambda hook: layer_gradients("gru", "plain", higher, hook),
        lambda hook: step_gradients("gru", higher, hook),
    ):
        with pytest.raises(RuntimeError, match=r"fusedrnn: .*(must be on|on one device)") as raised:
            gradients(given_back(to_meta))
        assert raised.type is RuntimeError


@pytest.mark.parametrize("kind", ["layer", "step"])
@pytest.mark.parametrize(
    "flags",
    [
        {"use_reentrant": True},
        {"use_reentrant": True, "preserve_rng_state": False},
        {"use_reentrant": False},
        {"use_reentrant": False, "preserve_rng_state": False},
        {"use_reentrant": False, "determinism_check": "none"},
        {"use_reentrant": False, "debug": True},
    ],
    ids=str,
)
def test_checkpoint(flags: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest cannot format the records that debug=True logs.
    monkeypatch.setattr(logging.getLogger("LoggingTensor"), "propagate", False)
    layer = fusedrnn.FusedLSTM(4, 6, 2, dropout=0.5, bidirectional=True, dtype=f64)
    cell = fusedrnn.FusedLSTMCell(4, 6, dtype=f64)
    x = torch.randn(5, 3, 4, dtype=f64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        if kind == "step":
            return sum(h + c for h, c in (cell(row) for row in x))  # type: ignore[return-value]
        y, (h_n, c_n) = layer(x)
        return y + h_n.sum() + c_n.sum()

    keeps_masks = flags.get("preserve_rng_state", True)
    if not keeps_masks:
        layer.eval()
    parameters = [*(cell if kind == "step" else layer).parameters()]

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        torch.manual_seed(3)
        for t in (x, *parameters):
            t.grad = None
        run(x).square().sum().backward()
        return [x.grad, *(p.grad for p in parameters)]

    wanted = gradients(run)
    for stop_early in (False, True):
        with warnings.catch_warnings(), set_checkpoint_early_stop(stop_early):
            warnings.simplefilter("ignore")
            got = gradients(lambda x: checkpoint(run, x, **flags))
        for g, w in zip(got, wanted, strict=True):
            assert g is not None and w is not None and torch.equal(g, w)

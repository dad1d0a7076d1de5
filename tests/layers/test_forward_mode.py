"""Forward-mode AD raises our error, wherever a tangent comes from. No tangent is lost silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fusedrnn
from fusedrnn._errors import NO_FORWARD_MODE
from tests.kit.layers import CELLS, flat, randn

MODULES: dict[str, Callable[[], Any]] = {
    **{str(cell): lambda cell=cell: cell.make(3, 4)[0] for cell in CELLS},
    "LSTMCell": lambda: fusedrnn.FusedLSTMCell(3, 4),
    "GRUCell": lambda: fusedrnn.FusedGRUCell(3, 4),
    "RNNCell": lambda: fusedrnn.FusedRNNCell(3, 4),
}
each = pytest.mark.parametrize("name", MODULES)
frozen_or_not = pytest.mark.parametrize("trainable", [True, False])


def make(name: str, trainable: bool, device: torch.device) -> tuple[Any, Tensor, Any]:
    """A module, an input for it and its initial states."""
    module = MODULES[name]().to(device).requires_grad_(trainable)
    x = randn(*((2, 3) if "Cell" in name else (5, 2, 3)), dtype=torch.float32, device=device)
    with torch.no_grad():
        states = module(x) if "Cell" in name else module(x)[1]
    return module, x, states


def refused() -> Any:
    return pytest.raises(NotImplementedError, match=f"^{re.escape(NO_FORWARD_MODE)}$")


def dual(t: Tensor) -> Tensor:
    return forward_ad.make_dual(t, torch.ones_like(t))


@frozen_or_not
@each
def test_duals(device: torch.device, name: str, trainable: bool) -> None:
    module, x, states = make(name, trainable, device)
    weights = {k: v.detach() for k, v in module.named_parameters()}
    for grad in (torch.enable_grad, torch.no_grad):
        with grad(), forward_ad.dual_level():
            with refused():
                module(dual(x))
            for k, t in enumerate(flat(states)):
                one = [dual(s) if k == i else s for i, s in enumerate(flat(states))]
                with refused():
                    module(x, type(states)(one) if isinstance(states, tuple) else one[0])
                assert t.shape == one[k].shape
            for key, w in weights.items():
                with refused():
                    torch.func.functional_call(module, {key: dual(w)}, (x,))
            module(x, states)  # no tensor has a tangent


@frozen_or_not
@each
def test_transforms(device: torch.device, name: str, trainable: bool) -> None:
    module, x, _ = make(name, trainable, device)

    def f(x: Tensor) -> Tensor:
        return flat(module(x))[0].sum()

    def of_weights(weights: dict[str, Tensor]) -> Any:
        return flat(torch.func.functional_call(module, weights, (x,)))[0].sum()

    for transform in (torch.func.jacfwd, torch.func.hessian):
        with refused():
            transform(f)(x)
    with refused():
        torch.func.jvp(f, (x,), (x,))
    weights = {k: v.detach() for k, v in module.named_parameters()}
    with refused():
        torch.func.jvp(of_weights, (weights,), (weights,))


@pytest.mark.parametrize("create_graph", [True, False])
@each
def test_a_tangent_that_comes_in_backward(
    device: torch.device, name: str, create_graph: bool
) -> None:
    module, x, _ = make(name, True, device)
    y = flat(module(x))[0]
    with forward_ad.dual_level(), refused():
        torch.autograd.grad(
            y,
            module.weight_ih if "Cell" in name else module.weight_ih_l0,
            dual(torch.ones_like(y)),
            create_graph=create_graph,
        )


@pytest.fixture
def own_dynamo() -> Iterator[None]:
    """Resets Dynamo, which remembers functions that raised, so that later tests are unaffected."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@frozen_or_not
@pytest.mark.usefixtures("own_dynamo")
@pytest.mark.parametrize("name", ["gru", "LSTMCell"])
def test_compiled(device: torch.device, name: str, trainable: bool) -> None:
    module, x, _ = make(name, trainable, device)
    compiled = torch.compile(module, backend="aot_eager")
    assert torch.equal(flat(compiled(x))[0], flat(module(x))[0])
    with forward_ad.dual_level(), refused():
        compiled(dual(x))
    inside = torch.compile(
        lambda x: torch.func.jvp(lambda x: flat(module(x))[0], (x,), (x,)), backend="aot_eager"
    )
    with refused():
        inside(x)

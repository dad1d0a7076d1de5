"""Derivatives of the layer: gradcheck, gradgradcheck, and uses of autograd that need care."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedrnn
from fusedrnn import _ops, _reference
from tests.kit.arguments import CELLS_AND_FORMS, LayerArguments, make_arguments
from tests.kit.layers import CELLS, error, flat, randn


def as_function(call: LayerArguments) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *leaves: tuple(call.with_leaves(leaves).run(_ops.layer))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_gradcheck(device: torch.device, cell: str, form: str, D: int) -> None:
    call = make_arguments(cell, form, T=3, N=2, I=2, H=3, D=D, device=device)
    torch.autograd.gradcheck(as_function(call), call.leaves)


@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_gradgradcheck(device: torch.device, cell: str, form: str) -> None:
    call = make_arguments(cell, form, T=3, N=2, I=2, H=2, device=device)
    torch.autograd.gradgradcheck(as_function(call), call.leaves, fast_mode=True)


@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_gradcheck_without_bias_and_states(device: torch.device, cell: str, form: str) -> None:
    call = make_arguments(cell, form, T=3, N=2, I=2, H=3, bias=False, states=False, device=device)
    torch.autograd.gradcheck(as_function(call), call.leaves)
    torch.autograd.gradgradcheck(as_function(call), call.leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradgradcheck_of_every_element(device: torch.device, cell: Any) -> None:
    call = make_arguments(cell.name, T=2, N=1, I=1, H=2, D=1, device=device)
    torch.autograd.gradgradcheck(as_function(call), call.leaves)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradgradcheck_of_a_stack(device: torch.device, cell: Any) -> None:
    ours, _ = cell.make(2, 2, device=device, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = randn(3, 2, 2, device=device).requires_grad_()
    parameters = tuple(ours.parameters())
    names = [name for name, _ in ours.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        y: Tensor = torch.func.functional_call(ours, weights, (x,))[0]
        return y

    torch.autograd.gradcheck(run, (x, *parameters))
    torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 5, 3, 17), (9, 13, 6, 37), (40, 3, 2, 70)])
def test_gradients_against_the_reference(
    device: torch.device, cell: str, form: str, sizes: tuple[int, int, int, int]
) -> None:
    T, N, I, H = sizes
    call = make_arguments(cell, form, T, N, I, H, device=device)
    ours, theirs = call.run(_ops.layer), call.run(_reference.layer)
    weights = [torch.randn_like(t) for t in theirs]
    d_ours = torch.autograd.grad(ours, call.leaves, weights)
    d_theirs = torch.autograd.grad(theirs, call.leaves, weights)
    for a, b in zip([*ours, *d_ours], [*theirs, *d_theirs], strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_third_derivative(device: torch.device, cell: Any) -> None:
    """The third derivative of a smooth cell along x equals the reference's."""
    call = make_arguments(cell.name, T=2, N=1, I=2, H=2, D=1, device=device)

    def third(layer: Any) -> Tensor:
        d: Tensor = call.run(layer)[0].sum()
        for _ in range(3):
            (d,) = torch.autograd.grad(d, call.x, create_graph=True)
            d = (d * d).sum()
        return d

    ours, theirs = third(_ops.layer), third(_reference.layer)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert cell.name == "rnn_relu" or theirs.item() != 0


@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_backward_twice_gives_the_same_gradients(
    device: torch.device, cell: str, form: str
) -> None:
    call = make_arguments(cell, form, dtype=torch.float32, device=device)
    outputs = call.run(_ops.layer)
    weights = [torch.randn_like(t) for t in outputs]
    first = torch.autograd.grad(outputs, call.leaves, weights, retain_graph=True)
    second = torch.autograd.grad(outputs, call.leaves, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_output_may_be_changed_in_place(device: torch.device, cell: Any) -> None:
    """torch.nn's GRU and RNN allow this too. Backward has its own copy of h."""
    ours, _ = cell.make(3, 5, device=device, dtype=torch.float64)
    x = randn(4, 2, 3, device=device).requires_grad_()
    (expected,) = torch.autograd.grad(ours(x)[0].relu().sum(), x)
    (actual,) = torch.autograd.grad(ours(x)[0].relu_().sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("which", ["y", "h_n", "c_n"])
def test_one_output_alone(device: torch.device, which: str) -> None:
    """Backward gets no gradients for the outputs that the loss does not use."""
    call = make_arguments("lstm", "lengths", device=device)
    k = ["y", "h_n", "c_n"].index(which)
    ours = torch.autograd.grad(call.run(_ops.layer)[k].sum(), call.leaves)
    theirs = torch.autograd.grad(call.run(_reference.layer)[k].sum(), call.leaves)
    assert all(error(a, b) < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_only_what_is_asked_for(device: torch.device) -> None:
    lstm = fusedrnn.FusedLSTM(3, 4, device=device)
    lstm.weight_hh_l0.requires_grad_(False)
    x = torch.randn(5, 2, 3, device=device)
    lstm(x)[0].sum().backward()
    assert x.grad is None and lstm.weight_hh_l0.grad is None
    assert lstm.weight_ih_l0.grad is not None and lstm.bias_hh_l0.grad is not None
    lstm.requires_grad_(False)
    x.requires_grad_()
    lstm(x)[0].sum().backward()
    assert x.grad is not None


def test_eval_mode_keeps_gradients(device: torch.device) -> None:
    lstm = fusedrnn.FusedLSTM(3, 4, num_layers=2, dropout=0.5, device=device).eval()
    lstm(torch.randn(5, 2, 3, device=device))[0].sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_kept(device: torch.device, context: Any) -> None:
    call = make_arguments("lstm", device=device)
    with context():
        outputs = call.run(_ops.layer)
    assert not any(t.requires_grad for t in outputs)
    expected = call.run(_ops.layer)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_same_tensor_as_h0_and_c0(device: torch.device) -> None:
    lstm = fusedrnn.FusedLSTM(3, 4, dtype=torch.float64, device=device)
    x, z = randn(5, 2, 3, device=device), randn(1, 2, 4, device=device).requires_grad_()
    y, _ = lstm(x, (z, z))
    (both,) = torch.autograd.grad(y.sum(), z)
    h0, c0 = z.detach().clone().requires_grad_(), z.detach().clone().requires_grad_()
    d_h, d_c = torch.autograd.grad(lstm(x, (h0, c0))[0].sum(), (h0, c0))
    assert error(both, d_h + d_c) < 1e-14


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_torch_func_grad(device: torch.device, cell: Any) -> None:
    ours, _ = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = randn(4, 2, 3, device=device)
    functional = torch.func.grad(lambda x: ours(x)[0].pow(2).sum())(x)
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(ours(leaf)[0].pow(2).sum(), leaf)
    assert error(functional, plain) < 1e-14


def test_second_derivative_under_torch_func_is_an_error(device: torch.device) -> None:
    lstm = fusedrnn.FusedLSTM(3, 4, device=device)
    x = torch.randn(2, 1, 3, device=device)
    first = torch.func.grad(lambda x: lstm(x)[0].sum())
    with pytest.raises(NotImplementedError, match=r"second derivatives .* torch\.func"):
        torch.func.grad(lambda x: first(x).pow(2).sum())(x)


def test_vmap_is_an_error(device: torch.device) -> None:
    lstm = fusedrnn.FusedLSTM(3, 4, device=device)
    x = torch.randn(2, 5, 1, 3, device=device)
    for function in (lambda x: lstm(x)[0], torch.func.grad(lambda x: lstm(x)[0].sum())):
        with pytest.raises(NotImplementedError, match=r"^fusedrnn: torch\.vmap is not supported"):
            torch.func.vmap(function)(x)


def test_checkpointing(device: torch.device) -> None:
    """Recomputing the forward in backward gives the same gradients."""
    lstm = fusedrnn.FusedLSTM(3, 4, dtype=torch.float64, device=device)
    x = randn(5, 2, 3, device=device).requires_grad_()
    plain = torch.autograd.grad(flat(lstm(x))[0].sum(), [x, *lstm.parameters()])
    y, _ = torch.utils.checkpoint.checkpoint(lstm, x, use_reentrant=False)
    again = torch.autograd.grad(y.sum(), [x, *lstm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

"""FusedLSTM(peephole=True): changed attributes, mistakes, and what torch.nn cannot take over."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import functional

x = torch.randn(5, 2, 3)


def peephole(**options: Any) -> fusedrnn.FusedLSTM:
    return fusedrnn.FusedLSTM(3, 4, peephole=True, **options)


def refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("change", [fusedrnn.to_torch, fusedrnn.revert])
def test_a_layer_with_peepholes_stays_what_it_is(change: Callable[[nn.Module], Any]) -> None:
    """torch.nn would read a weight that it does not know as the matrix of another layer."""
    layer = peephole(num_layers=2, bias=False)
    message = "torch.nn cannot compute the module itself (FusedLSTM with peephole=True)"
    refused(ValueError, message, lambda: change(layer))
    layer.peephole = False
    refused(ValueError, message, lambda: change(layer))
    assert type(layer) is fusedrnn.FusedLSTM
    plain = fusedrnn.FusedLSTM(3, 4)
    expected = plain(x)[0]
    plain.peephole = True
    reverted = change(plain)
    torch.testing.assert_close(reverted(x)[0], expected)
    assert not hasattr(reverted, "peephole")


def test_a_changed_attribute() -> None:
    def changed(layer: fusedrnn.FusedLSTM, value: Any) -> Callable[[], Any]:
        layer.peephole = value
        return lambda: layer(x)

    with_it, without = peephole(), fusedrnn.FusedLSTM(3, 4)
    message = "ask for 4 weights of lstm, the layer has 5; make another layer to change an option"
    refused(RuntimeError, message, changed(with_it, False))
    refused(RuntimeError, "ask for 5 weights of lstm_peephole", changed(without, True))
    refused(TypeError, "peephole should be of type bool, got: str", changed(peephole(), "no"))
    projected = fusedrnn.FusedLSTM(3, 4, proj_size=2)
    refused(ValueError, "proj_size must be 0 with peephole=True, got 2", changed(projected, True))
    gru = fusedrnn.FusedGRU(3, 4)
    gru.reset_after = "no"  # type: ignore[assignment]
    refused(TypeError, "reset_after should be of type bool, got: str", lambda: gru(x))


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_the_function(bias: bool) -> None:
    *others, weight_ch = peephole(bias=bias).parameters()

    def message_of(last: torch.Tensor, option: bool, message: str) -> None:
        weights = [*others, last]
        call = lambda: functional.lstm(x, None, weights, bias=bias, peephole=option)  # noqa: E731
        refused(RuntimeError, message, call)

    message_of(weight_ch, False, "peephole must be True for weights with weight_ch [3H], got False")
    message_of(weight_ch[:, None], True, "weight_ch_l0 must be [3H], got [12, 1]")
    message_of(weight_ch.view(3, 4), True, "weight_ch_l0 must be [3H], got [3, 4]")
    message_of(weight_ch.view(1, 3, 4), False, "weight_hr_l0 must be [P, H], got [1, 3, 4]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("peepholes", [False, True])
def test_the_numbers_drawn_are_those_of_torch(peepholes: bool, dtype: torch.dtype) -> None:
    """By the constructor and by reset_parameters. H ** -0.5 differs from 1 / sqrt(H) for some H."""
    for H in range(1, 20):
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dtype": dtype}
        torch.manual_seed(3)
        ours = fusedrnn.FusedLSTM(3, H, peephole=peepholes, **options)
        torch.manual_seed(3)
        theirs = nn.LSTM(3, H, **options)
        for _ in range(2):
            drawn = dict(ours.named_parameters())
            for name, parameter in theirs.named_parameters():
                assert torch.equal(drawn.pop(name), parameter)
            assert len(drawn) == (4 if peepholes else 0)
            assert all(0 < p.abs().max() <= H**-0.5 + 1e-6 for p in drawn.values())
            for layer in (ours, theirs):
                torch.manual_seed(4)
                layer.reset_parameters()


def test_an_error_names_the_weight_that_changed() -> None:
    layer = peephole()
    y = layer(x)[0]
    with torch.no_grad():
        layer.weight_ch_l0.mul_(2)
    refused(RuntimeError, "inplace operation: weight_ch [12] is at version", y.sum().backward)


def test_advice_for_torchscript_holds() -> None:
    with pytest.raises(RuntimeError, match="does not support FusedLSTM") as caught:
        torch.jit.script(peephole())
    assert "to_torch" not in str(caught.value)
    with pytest.raises(RuntimeError, match="to_torch"):
        torch.jit.script(fusedrnn.FusedLSTM(3, 4))

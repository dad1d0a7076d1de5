"""Odd values for each argument of a constructor, and for attributes that are changed afterwards.
The layer computes the same as torch.nn, or raises an error of the same type.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from tests.kit.layers import flat

PAIRS: dict[str, tuple[Any, Any]] = {
    "LSTM": (fusedrnn.FusedLSTM, nn.LSTM),
    "GRU": (fusedrnn.FusedGRU, nn.GRU),
    "RNN": (fusedrnn.FusedRNN, nn.RNN),
    "LSTMCell": (fusedrnn.FusedLSTMCell, nn.LSTMCell),
    "GRUCell": (fusedrnn.FusedGRUCell, nn.GRUCell),
    "RNNCell": (fusedrnn.FusedRNNCell, nn.RNNCell),
}
LAYERS = ["LSTM", "GRU", "RNN"]
ARGUMENTS = ["input_size", "hidden_size", "bias", "device", "dtype", "nonlinearity"]
LAYER_ARGUMENTS = ["num_layers", "batch_first", "dropout", "bidirectional", "proj_size"]

VALUES: dict[str, Any] = {
    **{repr(v): v for v in (None, 0, 1, 2, -1, True, False, 1.0, 0.5, float("nan"), float("inf"))},
    **{repr(v): v for v in ("yes", "", "relu", "cpu", "meta", b"a", 1j, (), [1], [], {}, [1, 2])},
    **{
        repr(v): v for v in (np.int64(2), np.int32(-1), np.uint8(1), np.float64(0.5), np.float32(2))
    },
    **{repr(v): v for v in (np.True_, np.False_, torch.float64, torch.int64, torch.device("cpu"))},
    **{repr(v): v for v in (torch.tensor(2), torch.tensor(0.5), Decimal("0.5"), object)},
}

# Calls with which our layer raises another error. The comments say what torch.nn does.
DIFFERENT: dict[tuple[str, str, str], Any] = {
    **{(kind, "num_layers", "np.False_"): TypeError for kind in LAYERS},  # ValueError
    ("LSTM", "proj_size", "inf"): TypeError,  # ValueError
    ("LSTM", "proj_size", "np.False_"): TypeError,  # runs without projection
}


def outcome(make: Callable[[], Any], *shape: int) -> list[Tensor] | type[Exception]:
    """The result of a module, or the type of the exception that making or calling it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            module = make()
            weight = next(module.parameters())
            x = torch.linspace(-1, 1, 5 * 3 * 9).view(*shape, 9)[..., : module.input_size]
            return flat(module(x.to(weight)))
        except Exception as error:
            return type(error)


def same(a: list[Tensor] | type[Exception], b: list[Tensor] | type[Exception]) -> bool:
    if isinstance(a, type) or isinstance(b, type):
        return a is b
    alike = [(t.shape, t.dtype, t.device) for t in a] == [(t.shape, t.dtype, t.device) for t in b]
    return alike and all(
        t.is_meta or torch.allclose(t, u, atol=1e-6) for t, u in zip(a, b, strict=True)
    )


def brief(result: list[Tensor] | type[Exception]) -> str:
    return result.__name__ if isinstance(result, type) else f"y {list(result[0].shape)}"


@pytest.mark.parametrize(
    ("kind", "argument"),
    [(k, a) for k in PAIRS for a in ARGUMENTS + (LAYER_ARGUMENTS if k in LAYERS else [])],
)
def test_constructors(kind: str, argument: str) -> None:
    shape = (5, 3) if kind in LAYERS else (15,)
    wrong = {}
    for name, value in VALUES.items():
        options = {"input_size": 3, "hidden_size": 6, argument: value}
        if argument == "dropout":
            options["num_layers"] = 2
        ours, theirs = (outcome(partial(cls, **options), *shape) for cls in PAIRS[kind])
        theirs = DIFFERENT.get((kind, argument, name), theirs)
        if not same(ours, theirs):
            wrong[name] = f"expected {brief(theirs)}, got {brief(ours)}"
    assert not wrong


# torch.nn's LSTM does not check these, and computes with its first weights or with other sizes.
CHANGES: list[tuple[str, Any, type[Exception], str]] = [
    (
        "num_layers",
        1,
        RuntimeError,
        "num_layers = 1, .* ask for 4 weights of .*, the layer has 8",
    ),
    (
        "num_layers",
        3,
        RuntimeError,
        "num_layers = 3, .* ask for 12 weights of .*, the layer has 8",
    ),
    (
        "num_layers",
        0,
        RuntimeError,
        "num_layers = 0, .* ask for 0 weights of .*, the layer has 8",
    ),
    ("num_layers", "2", TypeError, "'str' object cannot be interpreted as an integer"),
    (
        "bidirectional",
        True,
        RuntimeError,
        "bidirectional = True .* ask for 16 weights of .* has 8",
    ),
    ("bidirectional", "yes", TypeError, "bidirectional should be of type bool, got: str"),
    ("bidirectional", np.True_, TypeError, "bidirectional should be of type bool, got: bool"),
    ("bias", False, RuntimeError, "bias = False ask for 4 weights of .*, the layer has 8"),
    ("bias", None, TypeError, "bias should be of type bool, got: NoneType"),
    ("batch_first", 1, TypeError, "batch_first should be of type bool, got: int"),
    (
        "hidden_size",
        5,
        RuntimeError,
        r"weight_ih_l0 must be \[\d?H, I\] = \[\d+, 3\], got \[\d+, 3\]",
    ),
    ("input_size", 5, RuntimeError, r"weight_ih_l0 must be \[\d?H, I\] = \[\d+, 5\], got"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_attributes_that_do_not_fit(
    kind: str, name: str, value: Any, error: type[Exception], message: str
) -> None:
    x = torch.randn(5, 4, 3)
    for cls in PAIRS[kind]:
        layer = cls(3, 6, num_layers=2)
        setattr(layer, name, value)
        if cls is PAIRS[kind][0]:
            with pytest.raises(error, match=message):
                layer(x)
        elif kind != "LSTM" or error is TypeError:
            with pytest.raises(error):
                layer(x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("batch_first", True), ("dropout", 0.5), ("mode", "RNN_RELU"), ("mode", "GRU")),
        *(("nonlinearity", "relu"), ("nonlinearity", "selu"), ("training", False)),
    ],
)
def test_attributes_that_may_change(name: str, value: Any) -> None:
    def changed(cls: Any) -> nn.Module:
        layer: nn.Module = cls(3, 6, num_layers=2)
        setattr(layer, name, value)
        return layer

    ours, theirs = (outcome(partial(changed, cls), 5, 3) for cls in PAIRS["RNN"])
    assert same(ours, theirs), (brief(ours), brief(theirs))

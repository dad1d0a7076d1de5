"""Keras's recurrent layers as ours: the same outputs as Keras's own, on its torch backend."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedrnn
import fusedrnn.keras
from tests.helpers import error, flat

os.environ["KERAS_BACKEND"] = "torch"
keras: Any = pytest.importorskip("keras")

# In Keras's own get_weights().
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

N, T, I, H = 3, 5, 4, 6
# Keras's products are float32 on its torch backend, whatever the dtype of the layer.
LIMIT = 1e-6
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU reset before": ("GRU", {"reset_after": False}),
    "SimpleRNN": ("SimpleRNN", {}),
    "SimpleRNN relu": ("SimpleRNN", {"activation": "relu"}),
}


def build(kind: str, bidirectional: bool = False, dtype: str = "float64", **options: Any) -> Any:
    """A layer of Keras that gives all it can; biases too are random."""
    name, own = KINDS[kind]
    options = {"return_sequences": True, "return_state": True, "dtype": dtype} | own | options
    layer = getattr(keras.layers, name)(H, **options)
    if bidirectional:
        layer = keras.layers.Bidirectional(layer, dtype=dtype)
    layer.build((N, T, I))
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=w.shape) / 2 for w in layer.get_weights()])
    return layer


def outputs(layer: Any, x: Tensor) -> list[Tensor]:
    return [torch.as_tensor(t).detach().cpu() for t in layer(x)]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_layers(kind: str, bidirectional: bool, use_bias: bool) -> None:
    theirs = build(kind, bidirectional, use_bias=use_bias)
    ours = fusedrnn.keras.load(theirs)
    assert ours.weight_ih_l0.dtype == torch.float64
    assert ours.bias == use_bias
    x = torch.randn(N, T, I, dtype=torch.float64)
    y, *states = outputs(theirs, x)
    # Keras's order of states: those of the forward layer, then those of the backward layer.
    k = 2 if kind == "LSTM" else 1
    expected = [y, *(torch.stack(states[s::k]) for s in range(k))]
    for a, b in zip(flat(ours(x)), expected, strict=True):
        assert error(a, b) < LIMIT


def test_return_sequences_false() -> None:
    x = torch.randn(N, T, I, dtype=torch.float64)
    options = {"return_sequences": False, "return_state": False}
    theirs = build("GRU", **options)
    _, h_n = fusedrnn.keras.load(theirs)(x)
    assert error(h_n[-1], torch.as_tensor(theirs(x)).detach()) < LIMIT
    theirs = build("GRU", bidirectional=True, **options)
    _, h_n = fusedrnn.keras.load(theirs)(x)
    assert error(torch.cat([h_n[-2], h_n[-1]], 1), torch.as_tensor(theirs(x)).detach()) < LIMIT


def test_from_weights_needs_no_keras() -> None:
    """In a process that cannot import it."""
    program = """
import sys
sys.modules["keras"] = None
import numpy as np, torch
import fusedrnn.keras
rng = np.random.default_rng(0)
shapes = [(4, 18), (6, 18), (2, 18)] * 2
layer = fusedrnn.keras.from_weights("GRU", [rng.normal(size=s) for s in shapes], bidirectional=True)
print(layer, tuple(layer(torch.zeros(2, 3, 4, dtype=torch.float64))[0].shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "FusedGRU(4, 6, batch_first=True, bidirectional=True) (2, 3, 12)\n"


def test_from_weights_gives_what_load_gives() -> None:
    for kind, (name, own) in KINDS.items():
        theirs = build(kind)
        options = {"nonlinearity" if k == "activation" else k: v for k, v in own.items()}
        made = fusedrnn.keras.from_weights(name, theirs.get_weights(), **options)
        loaded = fusedrnn.keras.load(theirs)
        assert repr(made) == repr(loaded)
        for key, weight in loaded.state_dict().items():
            assert torch.equal(made.state_dict()[key], weight)


def test_weights_can_be_trained_and_the_generator_is_left_alone() -> None:
    theirs = build("LSTM", dtype="float32")
    before = torch.get_rng_state()
    ours = fusedrnn.keras.load(theirs)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(ours, fusedrnn.FusedLSTM)
    ours(torch.randn(N, T, I))[0].sum().backward()
    assert all(w.grad is not None for w in ours.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("LSTM", {"activation": "relu"}, "activation must be tanh, got 'relu'"),
        ("GRU", {"recurrent_activation": "hard_sigmoid"}, "must be sigmoid, got 'hard_sigmoid'"),
        ("SimpleRNN", {"activation": "linear"}, "activation must be tanh or relu, got 'linear'"),
        ("GRU", {"go_backwards": True}, "go_backwards must be False, got True"),
        ("LSTM", {"stateful": True}, "stateful must be False, got True"),
    ],
)
def test_options_that_ours_lack(kind: str, options: dict[str, Any], message: str) -> None:
    if "stateful" in options:
        layer = keras.layers.LSTM(H, **options)
    else:
        layer = build(kind, **options)
    with pytest.raises(ValueError, match=message):
        fusedrnn.keras.load(layer)


def test_what_a_bidirectional_layer_must_be() -> None:
    lstm, gru = keras.layers.LSTM, keras.layers.GRU
    bidirectional = keras.layers.Bidirectional
    with pytest.raises(ValueError, match="merge_mode must be \"concat\", got 'sum'"):
        fusedrnn.keras.load(bidirectional(lstm(H), merge_mode="sum"))
    backward = gru(H, go_backwards=True)
    with pytest.raises(TypeError, match="must hold two LSTM, GRU or SimpleRNN, got LSTM and GRU"):
        fusedrnn.keras.load(bidirectional(lstm(H), backward_layer=backward))
    backward = gru(H, go_backwards=True, reset_after=False)
    with pytest.raises(ValueError, match="both directions must have the same options"):
        fusedrnn.keras.load(bidirectional(gru(H), backward_layer=backward))


def test_dropout_is_left_out_and_named() -> None:
    theirs = build("GRU", dropout=0.25)
    with pytest.warns(UserWarning, match=r"dropout=0\.25 is left out") as warned:
        ours = fusedrnn.keras.load(theirs)
    assert warned[0].filename == __file__  # the line to look at is the caller's
    x = torch.randn(N, T, I, dtype=torch.float64)
    assert error(ours(x)[0], outputs(theirs, x)[0]) < LIMIT


def test_what_is_no_layer_of_keras() -> None:
    class Own(keras.layers.LSTM):  # type: ignore[misc]
        pass

    for layer in (keras.layers.Dense(3), Own(3), torch.nn.LSTM(1, 1), None):
        with pytest.raises(TypeError, match=r"layer must be a keras\.layers\.LSTM, GRU"):
            fusedrnn.keras.load(layer)
    with pytest.raises(ValueError, match="the layer has no weights yet"):
        fusedrnn.keras.load(keras.layers.LSTM(3))


@pytest.mark.parametrize(
    ("kind", "shapes", "message"),
    [
        ("Dense", [], "kind must be one of LSTM, GRU, SimpleRNN, got 'Dense'"),
        ("LSTM", [(4, 24)], "for each of 1 directions, got 1 arrays"),
        ("LSTM", [(4, 24), (6, 18)], r"recurrent_kernel must be \[H, 4\*H\] = \[6, 24\]"),
        ("LSTM", [(4, 20), (6, 24)], r"kernel must be \[I, 4\*H\] = \[4, 24\], got \[4, 20\]"),
        ("LSTM", [(4, 24), (6, 24), (2, 24)], r"bias must be \[4\*H\] = \[24\], got \[2, 24\]"),
        ("GRU", [(4, 18), (6, 18), (18,)], r"reset_after=True must be \[2, 3\*H\] = \[2, 18\]"),
        ("SimpleRNN", [(), (6, 6)], r"kernel must be 2-D and of a floating-point dtype, got \[\]"),
    ],
)
def test_weights_that_do_not_fit(kind: str, shapes: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedrnn.keras.from_weights(kind, [np.zeros(shape) for shape in shapes])


def test_weights_of_a_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"floating-point dtype, got \[4, 6\] of torch\.int64"):
        fusedrnn.keras.from_weights("SimpleRNN", [np.zeros((4, 6), int), np.zeros((6, 6), int)])
    two = [np.zeros(shape) for shape in [(4, 6), (6, 6), (5, 6), (6, 6)]]  # I is 4, then 5
    with pytest.raises(ValueError, match=r"kernel must be \[I, 1\*H\] = \[4, 6\], got \[5, 6\]"):
        fusedrnn.keras.from_weights("SimpleRNN", two, bidirectional=True)

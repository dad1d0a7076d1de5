"""Loaded Keras layers: ours compute the same as Keras's own, on its torch backend."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedrnn
import fusedrnn.keras
from tests.kit.layers import error, flat

os.environ["KERAS_BACKEND"] = "torch"
keras: Any = pytest.importorskip("keras")

# Keras's get_weights() raises this warning.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

N, T, I, H = 3, 5, 4, 6
# On its torch backend Keras computes products in float32, whatever the dtype of the layer.
LIMIT = 1e-6
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU reset before": ("GRU", {"reset_after": False}),
    "SimpleRNN": ("SimpleRNN", {}),
    "SimpleRNN relu": ("SimpleRNN", {"activation": "relu"}),
}


def build(kind: str, bidirectional: bool = False, dtype: str = "float64", **options: Any) -> Any:
    """A layer of Keras that returns all outputs and states. Its weights and biases are random."""
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
    # Keras returns the states of the forward layer, then those of the backward layer.
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
    """It works in a process that cannot import keras."""
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


def test_from_weights_returns_the_same_layer_as_load() -> None:
    for kind, (name, own) in KINDS.items():
        theirs = build(kind)
        options = {"nonlinearity" if k == "activation" else k: v for k, v in own.items()}
        made = fusedrnn.keras.from_weights(name, theirs.get_weights(), **options)
        loaded = fusedrnn.keras.load(theirs)
        assert repr(made) == repr(loaded)
        for key, weight in loaded.state_dict().items():
            assert torch.equal(made.state_dict()[key], weight)


def test_weights_can_be_trained_and_the_random_generator_does_not_advance() -> None:
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
def test_options_that_our_layers_lack(kind: str, options: dict[str, Any], message: str) -> None:
    if "stateful" in options:
        layer = keras.layers.LSTM(H, **options)
    else:
        layer = build(kind, **options)
    with pytest.raises(ValueError, match=message):
        fusedrnn.keras.load(layer)


def test_bidirectional_layers_that_cannot_be_loaded() -> None:
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
    assert warned[0].filename == __file__  # the warning names the line of the caller
    x = torch.randn(N, T, I, dtype=torch.float64)
    assert error(ours(x)[0], outputs(theirs, x)[0]) < LIMIT


def test_layers_that_are_not_of_keras() -> None:
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
    two = [np.zeros(shape) for shape in [(4, 6), (6, 6), (5, 6), (6, 6)]]  # I is 4, and then 5
    with pytest.raises(ValueError, match=r"kernel must be \[I, 1\*H\] = \[4, 6\], got \[5, 6\]"):
        fusedrnn.keras.from_weights("SimpleRNN", two, bidirectional=True)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.astype("float32"), r"must have the dtype of the first kernel, torch\.float"),
        (lambda a: a.astype(int), r"got .*torch\.int64"),
        (lambda a: a.astype(complex), r"got .*torch\.complex128"),
        (lambda a: a.astype(object), "must be an array of numbers, got ndarray of object"),
        (lambda a: a.astype(str), "must be an array of numbers, got ndarray of <U"),
        (lambda a: a.astype(np.longdouble), "must be an array of numbers, got ndarray of float128"),
        (lambda a: None, "must be an array of numbers, got NoneType"),
        (lambda a: [[1.0, 2.0], [3.0]], "must be an array of numbers, got list"),
        (lambda a: a[None], r"got \[1, "),
        (lambda a: a[..., 0], "got "),
    ],
)
def test_values_that_are_not_weights(change: Any, message: str, place: int) -> None:
    weights: list[Any] = [np.zeros(shape) for shape in ((4, 24), (6, 24), (24,))]
    weights[place] = change(weights[place])
    name = ("kernel", "recurrent_kernel", "bias")[place]
    if place == 0 and message.startswith("must have the dtype"):
        name = "recurrent_kernel"  # it is the first array whose dtype differs from the kernel's
    with pytest.raises((ValueError, TypeError), match=f"^{name} .*{message}"):
        fusedrnn.keras.from_weights("LSTM", weights)


@pytest.mark.parametrize("weights", [None, 5])
def test_weights_that_are_not_a_list(weights: Any) -> None:
    with pytest.raises(TypeError, match=r"weights must be a list of arrays, got (NoneType|int)"):
        fusedrnn.keras.from_weights("LSTM", weights)


def test_altered_weights_give_an_error_or_the_right_layer() -> None:
    """One array is changed at random. The outcome must be an error or the right layer."""
    rng = random.Random(20250101)
    numbers = np.random.default_rng(0)
    # Each entry is a change of an array, and whether its numbers stay the same.
    changes: list[tuple[Any, bool]] = [
        (lambda a: a.astype(a.dtype.newbyteorder()), True),
        (lambda a: np.flip(np.flip(a, 0).copy(), 0), True),
        (lambda a: np.asfortranarray(a), True),
        (lambda a: torch.from_numpy(a.copy()).requires_grad_(), True),
        (lambda a: a.tolist(), True),
        *((lambda a, t=t: a.astype(t), False) for t in "?bBhHiIlLefgFDOSUV"),
        (lambda a: a.T, False),
        (lambda a: a[..., None], False),
        (lambda a: a[0], False),
        (lambda a: a[:-1], False),
        (lambda a: a[..., :-1], False),
        (lambda a: a[:0], False),
        (lambda a: a.reshape(-1), False),
        (lambda a: a.item(0), False),
        (lambda a: "weights", False),
        (lambda a: {}, False),
        (lambda a: torch.zeros(a.shape, device="meta"), False),
    ]
    outcomes = {"error": 0, "layer": 0}
    for _ in range(400):
        kind, reset_after = rng.choice(
            [("LSTM", True), ("GRU", True), ("GRU", False), ("SimpleRNN", True)]
        )
        D, bias, H, I = rng.choice([1, 2]), rng.random() < 0.7, rng.randint(1, 4), rng.randint(1, 4)
        G = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}[kind]
        last = (2, G * H) if kind == "GRU" and reset_after else (G * H,)
        shapes = [(I, G * H), (H, G * H), *([last] if bias else [])] * D
        weights: list[Any] = [numbers.normal(size=shape) for shape in shapes]
        options: dict[str, Any] = {"bidirectional": D == 2, "reset_after": reset_after}
        expected = fusedrnn.keras.from_weights(kind, weights, **options).state_dict()
        place, (change, harmless) = rng.randrange(len(weights)), rng.choice(changes)
        before = weights[place]
        weights[place] = change(before)
        made, refusal = expected, ""
        try:
            made = fusedrnn.keras.from_weights(kind, weights, **options).state_dict()
        except (ValueError, TypeError) as raised:
            refusal = str(raised)
        if refusal:
            assert not harmless, refusal
            assert "must" in refusal, refusal
            outcomes["error"] += 1
            continue
        after = weights[place]
        unchanged = np.shape(after) == before.shape and np.array_equal(
            np.asarray(after.detach() if isinstance(after, Tensor) else after), before
        )
        # A changed array can still be valid: the transpose of a square kernel, or a kernel with one
        # row less.
        if not unchanged:
            assert isinstance(after, np.ndarray)
            assert after.dtype == before.dtype
            assert after.ndim == before.ndim
        else:
            assert all(torch.equal(made[name], w) for name, w in expected.items())
        outcomes["layer"] += 1
    assert min(outcomes.values()) > 40, outcomes


# One row each with all steps, padding at the end, no steps, padding at the start, and gaps.
MASK = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]]
).bool()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRU reset before", "SimpleRNN"])
def test_masks(kind: str, bidirectional: bool, zero: bool) -> None:
    theirs = build(kind, bidirectional, zero_output_for_mask=zero)
    ours = fusedrnn.keras.load(theirs)
    x = torch.randn(len(MASK), T, I, dtype=torch.float64)
    D, k = (2 if bidirectional else 1), (2 if kind == "LSTM" else 1)
    # Keras takes the states of the forward layer, then those of the backward layer.
    initial = [torch.randn(len(MASK), H, dtype=torch.float64) for _ in range(k * D)]
    start = initial[0] if len(initial) == 1 else initial
    y, *states = (torch.as_tensor(t).detach() for t in theirs(x, mask=MASK, initial_state=start))
    hx = tuple(torch.stack(initial[s::k]) for s in range(k))
    broken = x.masked_fill(~MASK.unsqueeze(2), float("nan"))
    result = fusedrnn.keras.with_mask(
        ours, broken, MASK, hx if k == 2 else hx[0], zero_output_for_mask=zero
    )
    expected = [y, *(torch.stack(states[s::k]) for s in range(k))]
    for a, b in zip(flat(result), expected, strict=True):
        assert error(a, b) < LIMIT
    of_array = fusedrnn.keras.with_mask(ours, x, MASK.numpy(), hx if k == 2 else hx[0])
    of_tensor = fusedrnn.keras.with_mask(ours, x, MASK, hx if k == 2 else hx[0])
    assert all(map(torch.equal, flat(of_array), flat(of_tensor)))


def test_the_last_output_repeated_over_the_padding() -> None:
    x = torch.randn(3, T, I, dtype=torch.float64)
    theirs = build("LSTM")
    y, _ = fusedrnn.keras.load(theirs)(x, lengths=[5, 2, 0])
    expected = torch.as_tensor(theirs(x, mask=MASK[:3])[0]).detach()
    assert error(fusedrnn.keras.repeat_last(y, [5, 2, 0]), expected) < LIMIT
    assert torch.equal(fusedrnn.keras.repeat_last(y, torch.tensor([5, 5, 5])), y)
    # repeat_last takes the same lengths as the layer.
    for dtype in ("uint8", "uint16", "uint32", "uint64", "int8", "int32", "float32"):
        lengths = np.array([5, 2, 0], dtype)
        assert error(fusedrnn.keras.repeat_last(y, lengths), expected) < LIMIT
    with pytest.raises(RuntimeError, match=r"lengths must be \[N\] = \[3\], got \[2\]"):
        fusedrnn.keras.repeat_last(y, [5, 2])
    with pytest.raises(RuntimeError, match=r"lengths\[0\] must be in \[0, T\] = \[0, 5\], got 6"):
        fusedrnn.keras.repeat_last(y, [6, 2, 0])
    with pytest.raises(TypeError, match=r"a whole number for each sequence, got 2\.5"):
        fusedrnn.keras.repeat_last(y, [5, 2.5, 0])
    with pytest.raises(ValueError, match=r"y must be \[N, T, H\], got \[5, 6\]"):
        fusedrnn.keras.repeat_last(y[0], [5])


def test_arguments_that_with_mask_refuses() -> None:
    x = torch.randn(len(MASK), T, I)
    with pytest.raises(ValueError, match="layer must be batch_first"):
        fusedrnn.keras.with_mask(fusedrnn.FusedGRU(I, H), x, MASK)
    layer = fusedrnn.FusedGRU(I, H, batch_first=True)
    with pytest.raises(ValueError, match=r"mask \[N, T\], got \[5, 5, 4\] and \[5, 4\]"):
        fusedrnn.keras.with_mask(layer, x, MASK[:, 1:])

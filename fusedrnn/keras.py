"""Weights of Keras's recurrent layers in fused ones.

`load` takes a layer of Keras 3 (tested on its torch backend); `from_weights` takes the arrays of
``get_weights()``, where Keras itself is not at hand. Nothing here imports Keras.

    import fusedrnn.keras

    lstm = fusedrnn.keras.load(model.get_layer("encoder"))
    lstm = fusedrnn.keras.from_weights("LSTM", [kernel, recurrent_kernel, bias])

The layers are ``batch_first``, as Keras's are. They return what Keras does with
``return_sequences=True, return_state=True``; its last output alone is ``h_n[-1]`` (bidirectional:
``h_n[-2]`` and ``h_n[-1]`` side by side).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._importing import as_tensor, expect_shape, make_layer, with_gates
from .modules import FusedGRU, FusedLSTM, FusedRNN

__all__ = ["from_weights", "load"]

Layer = FusedLSTM | FusedGRU | FusedRNN

# Of our gates (LSTM ifgo, GRU rzn), the place in Keras's order (LSTM ifco, GRU zrh).
_GATES = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "SimpleRNN": (0,)}


def load(layer: Any) -> Layer:
    """Makes a fused layer of a Keras layer: LSTM, GRU, SimpleRNN or Bidirectional of one.

    Args:
        layer: a built layer. Those of tf_keras are read in the same way, which is not tested.

    Returns:
        A layer with the same weights, in their dtype, that gives the same outputs.

    Raises:
        TypeError: another kind of layer, a subclass included.
        ValueError: a layer without weights yet, or with an option that our layers do not have:
            other activations, go_backwards, stateful, a merge_mode other than "concat".

    Warns:
        UserWarning: dropout and recurrent_dropout, which act on other things in Keras than in
            torch and are left out. They change training alone.
    """
    kind = _kind(layer)
    bidirectional = kind == "Bidirectional"
    parts = [layer]
    if bidirectional:
        parts = [layer.forward_layer, layer.backward_layer]
        kind = _kind(parts[0])
        if kind not in _GATES or _kind(parts[1]) != kind:
            raise TypeError(
                "a Bidirectional layer must hold two LSTM, GRU or SimpleRNN, got "
                f"{' and '.join(type(part).__name__ for part in parts)}"
            )
        merge_mode = layer.get_config().get("merge_mode")
        if merge_mode != "concat":
            raise ValueError(
                f'merge_mode must be "concat", got {merge_mode!r}; load forward_layer, or build '
                "the layer with concat and merge the two halves of y"
            )
    options = []
    for d, part in enumerate(parts):  # no comprehension: a warning points to the caller's line
        options.append(_options(kind, part, d == 1))
    if options[0] != options[-1]:
        raise ValueError(f"both directions must have the same options, got {options}")
    weights = layer.get_weights()
    if not weights:
        raise ValueError("the layer has no weights yet; call it once, or its build method")
    return from_weights(kind, weights, bidirectional=bidirectional, **options[0])


def from_weights(
    kind: str,
    weights: Sequence[Any],
    *,
    bidirectional: bool = False,
    reset_after: bool = True,
    nonlinearity: str = "tanh",
) -> Layer:
    """Makes a fused layer from the arrays of a Keras layer's ``get_weights()``.

    Args:
        kind: "LSTM", "GRU" or "SimpleRNN".
        weights: kernel ``[I, G*H]``, recurrent_kernel ``[H, G*H]`` and, with biases, bias:
            ``[G*H]``, of a GRU with reset_after ``[2, 3H]``; bidirectional: those of the forward
            layer, then those of the backward layer. Gates in Keras's order (LSTM i, f, c, o; GRU
            z, r, h).
        bidirectional: two directions.
        reset_after: of a GRU, as in Keras (its default since version 2).
        nonlinearity: of a SimpleRNN: "tanh" or "relu".

    Returns:
        The layer, ``batch_first``, in the dtype of the arrays.

    Raises:
        ValueError: an unknown kind, a number or shapes of weights that do not fit it.
    """
    if kind not in _GATES:
        raise ValueError(f"kind must be one of {', '.join(_GATES)}, got {kind!r}")
    D = 2 if bidirectional else 1
    one = len(weights) // D
    if one not in (2, 3) or len(weights) != one * D:
        raise ValueError(
            f"weights must hold kernel, recurrent_kernel and, or not, bias for each of {D} "
            f"directions, got {len(weights)} arrays"
        )
    order = _GATES[kind]
    G = len(order)
    two_biases = kind == "GRU" and reset_after
    result: list[Tensor] = []
    for d in range(D):
        kernel, recurrent, *biases = (as_tensor(w) for w in weights[d * one : (d + 1) * one])
        if d == 0:
            for name, weight in (("kernel", kernel), ("recurrent_kernel", recurrent)):
                if weight.dim() != 2 or not weight.is_floating_point():
                    raise ValueError(
                        f"{name} must be 2-D and of a floating-point dtype, got "
                        f"{list(weight.shape)} of {weight.dtype}"
                    )
            I, H = kernel.shape[0], recurrent.shape[0]
        expect_shape("recurrent_kernel", recurrent, f"[H, {G}*H]", H, G * H)
        expect_shape("kernel", kernel, f"[I, {G}*H]", I, G * H)
        result += [with_gates(w.T, order) for w in (kernel, recurrent)]
        for bias in biases:
            if two_biases:
                expect_shape("bias of a GRU with reset_after=True", bias, "[2, 3*H]", 2, G * H)
                result += [with_gates(b, order) for b in bias]
            else:
                expect_shape("bias", bias, f"[{G}*H]", G * H)
                b = with_gates(bias, order)
                result += [b, b.new_zeros(b.shape)]
    options: dict[str, Any] = {"bidirectional": bidirectional, "batch_first": True}
    if kind == "LSTM":
        return make_layer(FusedLSTM, result, one == 3, **options)
    if kind == "GRU":
        return make_layer(FusedGRU, result, one == 3, reset_after=reset_after, **options)
    return make_layer(FusedRNN, result, one == 3, nonlinearity=nonlinearity, **options)


def _kind(layer: Any) -> str:
    """The name of a layer's class, which must be one of Keras's own."""
    cls = type(layer)
    package = cls.__module__.split(".")[0]
    if package not in ("keras", "tf_keras", "tensorflow") or cls.__name__ not in (
        *_GATES,
        "Bidirectional",
    ):
        raise TypeError(
            "layer must be a keras.layers.LSTM, GRU, SimpleRNN or Bidirectional, got "
            f"{cls.__module__}.{cls.__qualname__}"
        )
    return cls.__name__


def _options(kind: str, layer: Any, backward: bool) -> dict[str, Any]:
    """Options of `from_weights` that a layer's configuration asks for; raises for any other."""
    config = layer.get_config()
    accepted = {"activation": ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",)}
    if kind != "SimpleRNN":
        accepted["recurrent_activation"] = ("sigmoid",)
    for name, values in accepted.items():
        if config[name] not in values:
            raise ValueError(f"{name} must be {' or '.join(values)}, got {config[name]!r}")
    if bool(config.get("go_backwards")) != backward:
        raise ValueError(
            "go_backwards must be False, got True; give the layer flipped sequences (y.flip(1))"
        )
    for name in ("stateful", "time_major"):
        if config.get(name):
            raise ValueError(f"{name} must be False, got True; build the layer without it")
    for name in ("dropout", "recurrent_dropout"):
        if config.get(name):
            warnings.warn(
                f"{name}={config[name]} is left out: it changes training alone, and acts on other "
                "things in Keras than in torch",
                UserWarning,
                stacklevel=3,
            )
    if kind == "GRU":
        return {"reset_after": bool(config["reset_after"])}
    if kind == "SimpleRNN":
        return {"nonlinearity": config["activation"]}
    return {}

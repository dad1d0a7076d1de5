"""Makes fused layers from Keras's recurrent layers or from their weights.

`load` takes a layer of Keras 3 (tested with its torch backend). `from_weights` takes the arrays of
``get_weights()`` and does not need Keras. This module never imports Keras.

    import fusedrnn.keras

    lstm = fusedrnn.keras.load(model.get_layer("encoder"))
    lstm = fusedrnn.keras.from_weights("LSTM", [kernel, recurrent_kernel, bias])

The layers are ``batch_first``, like Keras's. They return what Keras returns with
``return_sequences=True, return_state=True``. What Keras returns without these options is
``h_n[-1]``, or for a bidirectional layer the concatenation of ``h_n[-2]`` and ``h_n[-1]``.

With a mask, Keras repeats the last output at masked steps, unless ``zero_output_for_mask`` is set
or the layer is bidirectional. The outputs of our layers are zero beyond a length. `repeat_last`
repeats the last output as Keras does. `with_mask` calls a layer with any mask, as Keras does
(``pad_sequences`` pads at the front by default).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._importing import as_tensor, expect_shape, make_layer, with_gates
from ._modules import FusedGRU, FusedLSTM, FusedRNN
from ._sequence_checks import Lengths, as_lengths

__all__ = ["from_weights", "load", "repeat_last", "with_mask"]

Layer = FusedLSTM | FusedGRU | FusedRNN

# For each gate in torch's order (LSTM ifgo, GRU rzn), its index in Keras's (LSTM ifco, GRU zrh).
_TO_OURS = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "SimpleRNN": (0,)}


def load(layer: Any) -> Layer:
    """Makes a fused layer from a Keras layer: LSTM, GRU, SimpleRNN, or Bidirectional with one.

    Args:
        layer: a built layer. Layers of tf_keras are accepted too, but this is not tested.

    Returns:
        A layer with the same weights, in their dtype, which gives the same outputs.

    Raises:
        TypeError: another kind of layer, or a subclass.
        ValueError: the layer has no weights yet, or an option that our layers lack: other
            activations, go_backwards, stateful, or a merge_mode other than "concat".

    Warns:
        UserWarning: the layer has dropout or recurrent_dropout, which are left out. In Keras they
            act on other values than dropout in torch. They only change training.
    """
    kind = _kind(layer)
    bidirectional = kind == "Bidirectional"
    parts = [layer]
    if bidirectional:
        parts = [layer.forward_layer, layer.backward_layer]
        kind = _kind(parts[0])
        if kind not in _TO_OURS or _kind(parts[1]) != kind:
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
    for d, part in enumerate(parts):  # a comprehension may add a frame and shift stacklevel
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

    Check the activations in the configuration of the Keras layer, because the arrays do not contain
    them. The result has sigmoid for gates and tanh. If the Keras layer has another
    ``recurrent_activation``, the arrays fit but the outputs differ, without an error.
    TensorFlow.js, and Keras before TensorFlow 2, have ``hard_sigmoid`` by default.

    Args:
        kind: "LSTM", "GRU" or "SimpleRNN".
        weights: kernel ``[I, G*H]``, recurrent_kernel ``[H, G*H]`` and, if the layer has biases,
            bias: ``[G*H]``, or ``[2, 3H]`` for a GRU with reset_after. If bidirectional, these are
            the arrays of the forward layer and then those of the backward layer. The gates are in
            Keras's order (LSTM i, f, c, o; GRU z, r, h).
        bidirectional: whether there are two directions.
        reset_after: the option of a GRU with this name in Keras (True by default since version 2).
        nonlinearity: the activation of a SimpleRNN: "tanh" or "relu".

    Returns:
        The layer, ``batch_first``, in the dtype of the arrays.

    Raises:
        ValueError: an unknown kind; the number, shapes or dtypes of the weights do not fit.
        TypeError: weights is not a list, or an item is not an array of numbers.
    """
    if kind not in tuple(_TO_OURS):
        raise ValueError(f"kind must be one of {', '.join(_TO_OURS)}, got {kind!r}")
    try:
        weights = list(weights)
    except TypeError:
        raise TypeError(f"weights must be a list of arrays, got {type(weights).__name__}") from None
    D = 2 if bidirectional else 1
    one = len(weights) // D
    if one not in (2, 3) or len(weights) != one * D:
        raise ValueError(
            f"weights must hold kernel, recurrent_kernel and, or not, bias for each of {D} "
            f"directions, got {len(weights)} arrays"
        )
    order = _TO_OURS[kind]
    G = len(order)
    two_biases = kind == "GRU" and reset_after
    result: list[Tensor] = []
    for d in range(D):
        kernel, recurrent, *biases = (
            _numbers(name, weight)
            for name, weight in zip(_NAMES, weights[d * one : (d + 1) * one], strict=False)
        )
        if d == 0:
            for name, weight in (("kernel", kernel), ("recurrent_kernel", recurrent)):
                if weight.dim() != 2 or not weight.is_floating_point():
                    raise ValueError(
                        f"{name} must be 2-D and of a floating-point dtype, got "
                        f"{list(weight.shape)} of {weight.dtype}"
                    )
            I, H = kernel.shape[0], recurrent.shape[0]
            dtype = kernel.dtype
        for name, weight in zip(_NAMES, (kernel, recurrent, *biases), strict=False):
            if weight.dtype != dtype:
                raise ValueError(
                    f"{name} must have the dtype of the first kernel, {dtype}, got {weight.dtype}"
                )
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


def repeat_last(y: Tensor, lengths: Lengths) -> Tensor:
    """Repeats the last output of each sequence over its padding, as Keras does after a mask's end.

    Keras does this in layers of one direction with ``return_sequences=True``, unless
    ``zero_output_for_mask`` is set. Its Bidirectional returns zeros there, as our layers do.

    Args:
        y: ``[N, T, H]``, the output of a ``batch_first`` layer.
        lengths: ``[N]``, the lengths with which the layer was called.

    Returns:
        ``[N, T, H]``; the outputs of a sequence of length 0 stay zero, as in Keras.

    Raises:
        ValueError: y is not 3-D.
        TypeError, RuntimeError: lengths that the layer would also refuse.
    """
    if y.dim() != 3:
        raise ValueError(f"y must be [N, T, H], got {list(y.shape)}")
    N, T, _ = y.shape
    ends = as_lengths(lengths, T, N).to(y.device)
    steps = torch.arange(T, device=y.device)
    return _take(y, torch.minimum(steps, ends.unsqueeze(1) - 1).clamp(min=0))


def with_mask(
    layer: Layer, x: Tensor, mask: Any, hx: Any = None, *, zero_output_for_mask: bool = False
) -> tuple[Tensor, Any]:
    """Calls a layer as Keras calls its layers with ``mask=``: the layer skips masked steps.

    The mask may have any form: padding at the end (``lengths=`` does the same), at the front (the
    default of Keras's ``pad_sequences``) or between other steps. Masked values of x do not affect
    the result.

    Args:
        layer: a layer of `load` or `from_weights`, or any fused layer with ``batch_first``.
        x: ``[N, T, I]``.
        mask: ``[N, T]``, a tensor or an array that is true for the steps that count.
        hx: the initial state, as in the layer's call.
        zero_output_for_mask: whether outputs at masked steps are zero, as in Keras. If not, they
            repeat the last output before, and are zero where there is none. The outputs of a
            bidirectional layer are always zero there.

    Returns:
        The layer's y ``[N, T, D*H]`` and its final state. The final state of a sequence without
        any step is its initial state.

    Raises:
        ValueError: the layer is not ``batch_first``, or the shapes of x and mask do not fit.
        Exception: the errors of the layer's call.
    """
    if not layer.batch_first:
        raise ValueError("layer must be batch_first, as Keras's are")
    mask = torch.as_tensor(mask, dtype=torch.bool, device=x.device)
    if x.dim() != 3 or mask.shape != x.shape[:2]:
        raise ValueError(
            f"x must be [N, T, I] and mask [N, T], got {list(x.shape)} and {list(mask.shape)}"
        )
    behind = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    y, state = layer(_take(x, behind), hx, lengths=mask.sum(1).cpu())
    # For each step, the index of the last unmasked step so far, counted among the unmasked steps.
    last = mask.cumsum(1) - 1
    lives = mask if zero_output_for_mask or layer.bidirectional else last >= 0
    y = _take(y, last.clamp(min=0))
    return torch.where(lives.unsqueeze(2), y, y.new_zeros(())), state


def _take(x: Tensor, steps: Tensor) -> Tensor:
    """Returns the given steps [N, T] of each sequence of x [N, T, .]."""
    return x.gather(1, steps.unsqueeze(2).expand_as(x))


# The names of the weights of one direction.
_NAMES = ("kernel", "recurrent_kernel", "bias")


def _numbers(name: str, weight: Any) -> Tensor:
    """Copies an array into a tensor; TypeError if it is not an array of numbers."""
    try:
        return as_tensor(weight.detach().cpu() if isinstance(weight, Tensor) else weight)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        what = type(weight).__name__
        if hasattr(weight, "dtype"):
            what += f" of {weight.dtype}"
        reason = str(error).partition(". ")[0]
        raise TypeError(f"{name} must be an array of numbers, got {what} ({reason})") from None


def _kind(layer: Any) -> str:
    """Returns the name of a layer's class; TypeError if it is not a recurrent class of Keras."""
    cls = type(layer)
    package = cls.__module__.split(".")[0]
    if package not in ("keras", "tf_keras", "tensorflow") or cls.__name__ not in (
        *_TO_OURS,
        "Bidirectional",
    ):
        raise TypeError(
            "layer must be a keras.layers.LSTM, GRU, SimpleRNN or Bidirectional, got "
            f"{cls.__module__}.{cls.__qualname__}"
        )
    return cls.__name__


def _options(kind: str, layer: Any, backward: bool) -> dict[str, Any]:
    """Returns a layer's options for `from_weights`; ValueError if our layers lack one."""
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

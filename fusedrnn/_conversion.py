"""Turns torch.nn's recurrent layers in a model into fused ones, and back.

Only the class of a layer changes, as in `torch.nn.utils.parametrize`. The layer stays the same
object with the same Parameters, so everything that refers to them (an optimizer, a hook, a second
place in the model, a variable) continues to work.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._cell_modules import WEIGHT_NAMES, FusedGRUCell, FusedLSTMCell, FusedRNNCell
from ._checks import check_kernels, option_torch_lacks
from ._modules import FusedGRU, FusedLSTM, FusedRNN

__all__ = ["convert", "convert_for", "revert", "to_torch"]

M = TypeVar("M", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: FusedLSTM,
    nn.GRU: FusedGRU,
    nn.RNN: FusedRNN,
    nn.LSTMCell: FusedLSTMCell,
    nn.GRUCell: FusedGRUCell,
    nn.RNNCell: FusedRNNCell,
}
_TORCH = {fused: plain for plain, fused in _FUSED.items()}
_NAMES = {plain.__name__ for plain in _FUSED}


class _Change(NamedTuple):
    module: nn.Module
    to: type[nn.Module]


class _Left(NamedTuple):
    name: str
    module: nn.Module
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__}): {self.reason}"


def convert(module: M) -> M:
    """Makes every torch.nn LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in `module` a fused one.

    It changes the model in place and returns it; use `convert(copy.deepcopy(module))` to keep the
    original. Every layer stays the same object and only its class changes. Everything else stays as
    it is: the Parameter objects (an optimizer that has them continues to work), buffers,
    requires_grad, device, dtype, training mode, hooks of every kind, and references to a layer.
    Layers that are fused already do not change.

    Convert before `torch.compile`, `torch.jit.script`, quantization and parametrizations, not
    after. A graph that was captured before keeps the layers that it captured. The others replace
    the layers by classes of their own, which `convert` reports and does not change.

    Args:
        module: a layer or a model; the root itself may be one of the layers.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is not a torch.nn.Module.

    Warns:
        UserWarning: one warning with the qualified name of every recurrent layer that was not
            changed, and the reason. Reasons are a subclass (its forward may do anything), a
            parametrized layer, a layer with a forward of its own, a layer that TorchScript compiled
            or that is quantized, a layer in a module that works only with torch.nn's own class
            (TorchRL's LSTMModule and GRUModule, outside of `patch_torch`), and weights with a dtype
            or device without kernels.
    """
    return convert_for("convert", module)


def convert_for(caller: str, module: M) -> M:
    """Does what `convert` does, for the public function `caller`, which a warning names."""
    changes: list[_Change] = []
    left: list[_Left] = []
    held = _held_by_type(module)
    for name, layer in _named_modules(module):
        fused = _FUSED.get(type(layer))
        reason = _why_not_as_it_is(layer) if fused else _why_not_this_class(layer)
        reason = reason or (held.get(id(layer)) if fused else None)
        if reason:
            left.append(_Left(name, layer, reason))
        elif fused:
            changes.append(_Change(layer, fused))
    for change in changes:
        _apply(change)
    _report(caller, left, frames=4)
    return module


def revert(module: M) -> M:
    """Makes every fused layer in `module` the torch.nn layer that it stands for.

    This is the inverse of `convert`. It also works in place and keeps the same things.

    Args:
        module: a layer or a model; the root itself may be one of the layers.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is not a torch.nn.Module.
        ValueError: a GRU in it has reset_after=False, or an LSTM peephole=True, which torch.nn
            cannot compute. In this case no layer has changed.

    Warns:
        UserWarning: one warning with the qualified name of every fused layer that was not changed,
            and the reason: a subclass, a parametrized layer, or a forward of its own.
    """
    changes, left = _plan_revert("revert", module)
    for change in changes:
        _apply(change)
    _report("revert", left)
    return module


def to_torch(module: M) -> M:
    """Returns a copy of `module` that has torch.nn's layers and shares the parameters.

    The modules are new but the tensors are the same, so training one of the two trains both.
    `module` stays fused. The copy is for functions that look for torch.nn's exact types, such as
    `torch.ao.quantization.quantize_dynamic`. Hooks are copied too.

    Args:
        module: a layer or a model with fused layers in it.

    Returns:
        The copy.

    Raises:
        TypeError: `module` is not a torch.nn.Module.
        ValueError: a GRU in it has reset_after=False, or an LSTM peephole=True, which torch.nn
            cannot compute.

    Warns:
        UserWarning: as `revert` does.
    """
    _plan_revert("to_torch", module)
    # deepcopy does not copy the objects in its memo: it takes them as their own copies.
    shared: dict[int, Any] = {id(t): t for layer in module.modules() for t in _tensors(layer)}
    duplicate = copy.deepcopy(module, shared)
    changes, left = _plan_revert("to_torch", duplicate)
    for change in changes:
        _apply(change)
    _report("to_torch", left)
    return duplicate


def _apply(change: _Change) -> None:
    layer, cls = change
    # A layer that changes its class has the defaults of these two, which the class provides.
    vars(layer).pop("reset_after", None)
    vars(layer).pop("peephole", None)
    # torch.nn's layers store a list of their weights; the fused layers look the weights up.
    vars(layer).pop("_flat_weights", None)
    layer.__class__ = cls
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def _plan_revert(caller: str, module: nn.Module) -> tuple[list[_Change], list[_Left]]:
    changes: list[_Change] = []
    left: list[_Left] = []
    impossible: list[str] = []
    for name, layer in _named_modules(module):
        if not isinstance(layer, tuple(_TORCH)):
            continue
        plain = _TORCH.get(type(layer))
        if plain is None:
            left.append(_Left(name, layer, _subclass_reason(layer)))
        elif "forward" in vars(layer):
            left.append(_Left(name, layer, _OWN_FORWARD))
        elif option := option_torch_lacks(layer):
            impossible.append(f"{name} ({type(layer).__name__} with {option})")
        else:
            changes.append(_Change(layer, plain))
    if impossible:
        raise ValueError(
            f"fusedrnn.{caller}: torch.nn cannot compute {', '.join(impossible)}. Its GRU has the "
            "reset gate after the recurrent product only, and its LSTM has no peepholes. Nothing "
            "was changed"
        )
    return changes, left


def _named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, layer in module.named_modules():
        yield name or "the module itself", layer


# Modules that check the class of the layer that they hold: (package, class).
_ASKING = {("torchrl", "LSTMModule"), ("torchrl", "GRUModule")}


def _held_by_type(module: nn.Module) -> dict[int, str]:
    """Maps the id of a layer to the reason why the module that holds it needs torch.nn's class."""
    if not isinstance(module, nn.Module) or nn.LSTM not in _FUSED:  # nn.LSTM is patched
        return {}
    return {
        id(layer): (
            f"{cls.__module__}.{cls.__name__} asks whether its layer is torch.nn's and calls any "
            "other with mask=; convert and run the model in a block, with fusedrnn.patch_torch():"
        )
        for holder in module.modules()
        for cls in type(holder).__mro__
        if (cls.__module__.split(".")[0], cls.__name__) in _ASKING
        for layer in holder.children()
    }


_OWN_FORWARD = "its forward is not its class's, but was set on the object"


def _why_not_as_it_is(layer: nn.Module) -> str | None:
    """The reason why a layer whose type has a fused counterpart cannot change; None if it can."""
    if "forward" in vars(layer):
        return _OWN_FORWARD
    names: Any = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else WEIGHT_NAMES
    for name in names:
        weight = getattr(layer, name, None)
        if isinstance(weight, Tensor) and not _has_kernels(weight):
            return f"there are no kernels for {weight.dtype} on {weight.device}"
    return None


def _has_kernels(tensor: Tensor) -> bool:
    try:
        check_kernels(tensor)
    except NotImplementedError:
        return False
    return True


def _why_not_this_class(layer: nn.Module) -> str | None:
    """The reason to report for a layer without a fused counterpart; None to report nothing."""
    if isinstance(layer, tuple(_TORCH)):
        return None
    if isinstance(layer, torch.jit.ScriptModule):
        if getattr(layer, "original_name", "") in _NAMES:
            return "compiled by TorchScript; convert before torch.jit.script or torch.jit.trace"
        return None
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return _subclass_reason(layer)
    # torch.ao's quantized layers derive from nn.Module but not from nn.RNNBase.
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("torch.ao.nn.quant") and cls.__name__ in _NAMES:
            return f"quantized ({cls.__module__}); the fused layers compute in floating point"
    return None


def _subclass_reason(layer: nn.Module) -> str:
    if parametrize.is_parametrized(layer):
        return "parametrized; register parametrizations after the change, either form takes them"
    cls = type(layer)
    bases = (*_FUSED, *_TORCH, nn.RNNBase, nn.RNNCellBase)
    base = next(b for b in cls.__mro__ if b in bases)
    package = base.__module__.split(".")[0].replace("torch", "torch.nn")
    return f"{cls.__module__}.{cls.__qualname__} is a subclass of {package}.{base.__name__}"


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors that a module itself holds, including weights that a hook computes."""
    held = vars(layer)
    for value in (*layer._parameters.values(), *layer._buffers.values(), *held.values()):
        if isinstance(value, Tensor):
            yield value
    yield from (w for w in held.get("_flat_weights", ()) if isinstance(w, Tensor))


def _report(caller: str, left: list[_Left], frames: int = 3) -> None:
    """Warns of the layers that were left; the line is that of the caller `frames` calls up."""
    if left:
        lines = "".join(f"\n  {entry}" for entry in left)
        warnings.warn(
            f"fusedrnn.{caller} left {len(left)} recurrent layer{'s' * (len(left) > 1)} as "
            f"{'they are' if len(left) > 1 else 'it is'}:{lines}",
            UserWarning,
            stacklevel=frames,
        )

"""Helpers of the modules for other software: imports of packages, and layers from arrays."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._checks import weight_names
from ._modules import FusedGRU, FusedLSTM, FusedRNN

__all__ = ["as_tensor", "expect_shape", "make_layer", "need", "with_gates"]

Layer = TypeVar("Layer", FusedLSTM, FusedGRU, FusedRNN)


def need(package: str, user: str) -> Any:
    """Imports a package that fusedrnn does not require.

    Raises:
        ModuleNotFoundError: it is not installed; the message says that `user` needs it.
    """
    name = package.split(".")[0]
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    else:
        # Python also imports a plain folder of that name, for instance one that holds ONNX files.
        if getattr(module, "__file__", None) is not None:
            return module
    raise ModuleNotFoundError(
        f"{user} needs the package {name}, which is not installed: pip install "
        f"{name.replace('_', '-')}",
        name=name,
    )


def as_tensor(array: Any) -> Tensor:
    """Copies an array into a tensor. The array may be bfloat16, a type that numpy itself lacks."""
    # numpy is imported here, because fusedrnn must work without it. The message names only
    # fusedrnn.keras, because onnx requires numpy.
    np = need("numpy", "fusedrnn.keras")
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    # torch takes neither the other byte order nor negative strides.
    return torch.tensor(array.astype(array.dtype.newbyteorder("="), order="C"))


def expect_shape(what: str, tensor: Tensor, form: str, *sizes: int) -> None:
    """Raises ValueError if a tensor does not have these sizes; `form` names them, as "[D, 3*H]"."""
    if tuple(tensor.shape) != sizes:
        raise ValueError(f"{what} must be {form} = {list(sizes)}, got {list(tensor.shape)}")


def with_gates(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Reorders the gates of a tensor [G*H, ...]: gate k of the result is gate order[k]."""
    blocks = tensor.chunk(len(order))
    return torch.cat([blocks[k] for k in order])


def make_layer(cls: type[Layer], weights: Sequence[Tensor], bias: bool, **options: Any) -> Layer:
    """Makes a module with one layer and these tensors as its parameters.

    Args:
        cls: the class of the module.
        weights: for each direction weight_ih [G*H, I] and weight_hh [G*H, H], with `bias` also
            bias_ih and bias_hh [G*H], and for an LSTM with peepholes weight_ch [3*H]; the gates are
            in torch's order.
        bias: whether there are biases.
        options: other arguments of the constructor.
    """
    I, H = weights[0].shape[1], weights[1].shape[1]
    # On "meta" no random numbers are drawn, so the state of torch's generator does not change.
    layer = cls(I, H, bias=bias, device="meta", dtype=weights[0].dtype, **options)
    names = weight_names(layer._cell(), 1, 2 if layer.bidirectional else 1, bias)
    layer.load_state_dict(dict(zip(names, weights, strict=True)), assign=True)
    return layer

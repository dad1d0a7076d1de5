"""Helpers of `fusedrnn.onnx` and `fusedrnn.keras`: from numpy arrays to one of our layers."""

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
    """Imports a package that fusedrnn does not require, or says that `user` needs it."""
    name = package.split(".")[0]
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    else:
        # Python imports a mere folder of that name too, such as one of ONNX files.
        if getattr(module, "__file__", None) is not None:
            return module
    raise ModuleNotFoundError(
        f"{user} needs the package {name}, which is not installed: pip install {name}", name=name
    )


def as_tensor(array: Any) -> Tensor:
    """A copy of an array as a tensor; bfloat16, which numpy itself does not know, included."""
    # Here and not above: fusedrnn is imported where torch is alone. onnx brings numpy along.
    np = need("numpy", "fusedrnn.keras")
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    # torch takes neither foreign byte orders nor negative strides.
    return torch.tensor(array.astype(array.dtype.newbyteorder("="), order="C"))


def expect_shape(what: str, tensor: Tensor, form: str, *sizes: int) -> None:
    """Raises a ValueError where a tensor is not of these sizes; `form` is their names."""
    if tuple(tensor.shape) != sizes:
        raise ValueError(f"{what} must be {form} = {list(sizes)}, got {list(tensor.shape)}")


def with_gates(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Returns a tensor [G*H, ...] with its gates reordered: gate k of it is gate order[k]."""
    blocks = tensor.chunk(len(order))
    return torch.cat([blocks[k] for k in order])


def make_layer(cls: type[Layer], weights: Sequence[Tensor], bias: bool, **options: Any) -> Layer:
    """A layer of one level that holds these tensors, in torch's order, as its parameters.

    Args:
        cls: the class of the layer.
        weights: per direction weight_ih [G*H, I], weight_hh [G*H, H], with `bias` also bias_ih and
            bias_hh [G*H], then weight_ch [3*H] of an LSTM with peepholes.
        bias: whether there are biases.
        options: of the constructor.
    """
    I, H = weights[0].shape[1], weights[1].shape[1]
    # On "meta" nothing is drawn: torch's generator stays as it is.
    layer = cls(I, H, bias=bias, device="meta", dtype=weights[0].dtype, **options)
    names = weight_names(layer._cell(), 1, 2 if layer.bidirectional else 1, bias)
    layer.load_state_dict(dict(zip(names, weights, strict=True)), assign=True)
    return layer

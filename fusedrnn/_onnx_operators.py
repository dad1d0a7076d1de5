"""The operators that may compute the weights of an ONNX file's recurrent nodes, in numpy.

Each function takes a `Meter`, its node and the arrays of the node's inputs. It raises ValueError if
the node contradicts itself. Before it writes elements, it charges them to the meter. A view writes
none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from ._onnx import attribute, need

__all__ = ["OPERATORS", "Array", "Meter", "dequantized", "form"]

Array: TypeAlias = "np.ndarray[Any, Any]"

FLOATS = ("float32", "float64", "float16", "bfloat16")
SIGNED = ("int32", "int64")
QUANTIZED = ("int8", "uint8", "int16", "uint16")


class Meter(Protocol):
    """The interface through which an operator charges elements and reads stored tensors."""

    def charge(self, elements: int) -> None:
        """Counts elements that will be written, and raises ValueError if they are too many."""

    def tensor(self, tensor: Any) -> Array:
        """Returns a TensorProto as an array."""


def _dtype_of(code: int, names: Sequence[str]) -> Any:
    """Returns the numpy type for one of ONNX's codes; ValueError if it is not among `names`."""
    helper = need("onnx.helper", "load")
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(code))
    except KeyError:
        raise ValueError(f"the type {code} is unknown") from None
    if dtype.name not in names:
        raise ValueError(f"the type must be one of {', '.join(names)}, got {dtype.name}")
    return dtype


def _ints(what: str, array: Array | None) -> list[int] | None:
    """Returns the numbers of a small tensor of integers, or None for None."""
    if array is None:
        return None
    if array.dtype.name not in SIGNED or array.ndim > 1 or array.size > 1024:
        raise ValueError(f"{what} must be a list of integers, got {form(array)}")
    return [int(v) for v in array.reshape(-1)]


def _of_either(node: Any, name: str, array: Array | None) -> list[int] | None:
    """Reads integers that are an attribute in early opsets and an input in later ones."""
    given = attribute(node, name, "INTS", None)
    if given is not None and array is not None:
        raise ValueError(f"{name} must be an attribute or an input, not both")
    return _ints(name, array) if given is None else given


def form(array: Array) -> str:
    """The sizes and the type of an array, for a message."""
    return f"{list(array.shape)} of {array.dtype.name}"


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"axis must be in [-{rank}, {rank}), got {axis}")
    return axis % rank


def _same_types(arrays: Sequence[Array]) -> None:
    if len({a.dtype for a in arrays}) > 1:
        raise ValueError(f"its inputs must have one type, got {', '.join(map(form, arrays))}")


def _identity(_: Meter, node: Any, x: Array) -> Array:
    return x


def _slice(
    _: Meter,
    node: Any,
    x: Array,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    first = _of_either(node, "starts", starts)
    last = _of_either(node, "ends", ends)
    if first is None or last is None:
        raise ValueError("starts and ends are missing")
    where = _of_either(node, "axes", axes)
    step = _ints("steps", steps)
    where = list(range(len(first))) if where is None else where
    step = [1] * len(first) if step is None else step
    if not len(first) == len(last) == len(where) == len(step):
        raise ValueError("starts, ends, axes and steps must be of one length")
    index = [slice(None)] * x.ndim
    for k, s, e, d in zip(where, first, last, step, strict=True):
        k = _axis(k, x.ndim)
        if index[k] != slice(None):
            raise ValueError(f"axes must differ, got {where}")
        if d == 0:
            raise ValueError("steps must not be 0")
        index[k] = slice(s, e, d)
    return x[tuple(index)]


def _concat(meter: Meter, node: Any, *parts: Array | None) -> Array:
    arrays = [a for a in parts if a is not None]
    if not arrays:
        raise ValueError("its inputs are missing")
    _same_types(arrays)
    axis = _axis(attribute(node, "axis", "INT"), arrays[0].ndim)
    meter.charge(sum(a.size for a in arrays))
    return np.concatenate(arrays, axis)


def _unsqueeze(_: Meter, node: Any, x: Array, axes: Array | None = None) -> Array:
    where = _of_either(node, "axes", axes)
    if where is None:
        raise ValueError("axes are missing")
    return np.expand_dims(x, tuple(where))


def _squeeze(_: Meter, node: Any, x: Array, axes: Array | None = None) -> Array:
    where = _of_either(node, "axes", axes)
    return np.squeeze(x, None if where is None else tuple(where))


def _reshape(meter: Meter, node: Any, x: Array, shape: Array | None = None) -> Array:
    sizes = _of_either(node, "shape", shape)
    if sizes is None:
        raise ValueError("shape is missing")
    if not attribute(node, "allowzero", "INT", 0):
        for k, size in enumerate(sizes):
            if size == 0:
                sizes[k] = x.shape[_axis(k, x.ndim)]
    if not x.flags.c_contiguous:
        meter.charge(x.size)
    return x.reshape(sizes)


def _transpose(_: Meter, node: Any, x: Array) -> Array:
    return np.transpose(x, attribute(node, "perm", "INTS", None))


def _gather(meter: Meter, node: Any, x: Array, indices: Array) -> Array:
    axis = _axis(attribute(node, "axis", "INT", 0), x.ndim)
    if indices.dtype.name not in SIGNED:
        raise ValueError(f"indices must be integers, got {form(indices)}")
    size = x.shape[axis]
    if indices.size and not -size <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(f"indices must be in [-{size}, {size})")
    meter.charge(indices.size * math.prod(x.shape[:axis] + x.shape[axis + 1 :]))
    return np.take(x, indices, axis)


def _split(_: Meter, node: Any, x: Array, split: Array | None = None) -> list[Array]:
    axis = _axis(attribute(node, "axis", "INT", 0), x.ndim)
    sizes = _of_either(node, "split", split)
    count = attribute(node, "num_outputs", "INT", len(node.output))
    if count != len(node.output):
        raise ValueError(f"num_outputs must be {len(node.output)}, got {count}")
    if sizes is None:
        size = -(-x.shape[axis] // count)
        if size * count != x.shape[axis] and all(a.name != "num_outputs" for a in node.attribute):
            raise ValueError(f"{x.shape[axis]} cannot be split in {count} equal parts")
        sizes = [size] * (count - 1) + [x.shape[axis] - size * (count - 1)]
    if len(sizes) != count or min(sizes) < 0 or sum(sizes) != x.shape[axis]:
        raise ValueError(f"{x.shape[axis]} cannot be split in {sizes} for {count} outputs")
    return np.split(x, np.cumsum(sizes[:-1]), axis)


def _cast(meter: Meter, node: Any, x: Array) -> Array:
    dtype = _dtype_of(attribute(node, "to", "INT"), (*FLOATS, *SIGNED))
    meter.charge(x.size)
    return x.astype(dtype)


def _arithmetic(compute: Callable[..., Any], names: Sequence[str]) -> Callable[..., Array]:
    def run(meter: Meter, node: Any, a: Array, b: Array) -> Array:
        _same_types([a, b])
        if a.dtype.name not in names:
            raise ValueError(f"its inputs must be {', '.join(names)}, got {a.dtype.name}")
        meter.charge(math.prod(np.broadcast_shapes(a.shape, b.shape)))
        return np.asarray(compute(a, b))

    return run


def _reduce_l2(meter: Meter, node: Any, x: Array, axes: Array | None = None) -> Array:
    if x.dtype.name not in FLOATS:
        raise ValueError(f"its input must be {', '.join(FLOATS)}, got {x.dtype.name}")
    where = _of_either(node, "axes", axes)
    if not where and attribute(node, "noop_with_empty_axes", "INT", 0):
        raise ValueError("axes are missing")
    keep = attribute(node, "keepdims", "INT", 1) != 0
    over = tuple(_axis(k, x.ndim) for k in where) if where else None
    meter.charge(2 * x.size)
    wide = x.astype(np.float32) if x.itemsize < 4 else x
    squares = np.sum(np.square(wide), axis=over, keepdims=keep, dtype=wide.dtype)
    return np.sqrt(squares).astype(x.dtype)


def _expand(meter: Meter, node: Any, x: Array, shape: Array) -> Array:
    sizes = tuple(_ints("shape", shape) or ())
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape must not be negative, got {sizes}")
    sizes = np.broadcast_shapes(x.shape, sizes)
    meter.charge(math.prod(sizes))
    return np.broadcast_to(x, sizes)


def _tile(meter: Meter, node: Any, x: Array, repeats: Array) -> Array:
    times = _ints("repeats", repeats) or []
    if len(times) != x.ndim or any(t < 0 for t in times):
        raise ValueError(f"repeats must be {x.ndim} numbers from 0 on, got {times}")
    meter.charge(x.size * math.prod(times))
    return np.tile(x, times)


def _constant_of_shape(meter: Meter, node: Any, shape: Array) -> Array:
    sizes = _ints("shape", shape) or []
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape must not be negative, got {sizes}")
    value = attribute(node, "value", "TENSOR", None)
    fill = np.zeros(1, np.float32) if value is None else meter.tensor(value)
    if fill.size != 1:
        raise ValueError(f"value must be one number, got {form(fill)}")
    meter.charge(math.prod(sizes))
    return np.broadcast_to(fill.reshape(()), sizes)


def _beside(meter: Meter, node: Any, x: Array, what: str, array: Array) -> Array:
    """Returns a scale or zero point of x in a shape that broadcasts with x."""
    axis = attribute(node, "axis", "INT", 1)
    block = attribute(node, "block_size", "INT", 0)
    if block:
        k = _axis(axis, x.ndim)
        blocks = list(x.shape)
        blocks[k] = -(-x.shape[k] // block)
        if block < 0 or list(array.shape) != blocks:
            raise ValueError(f"{what} must be {blocks}, got {form(array)}")
        meter.charge(x.size)
        return np.take(array, np.arange(x.shape[k]) // block, k)
    if array.size == 1 and array.ndim <= 1:
        return array.reshape(())
    k = _axis(axis, x.ndim)
    if array.shape != (x.shape[k],):
        raise ValueError(f"{what} must be a number or [{x.shape[k]}], got {form(array)}")
    return array.reshape([-1 if j == k else 1 for j in range(x.ndim)])


def _dequantize_linear(
    meter: Meter, node: Any, x: Array, scale: Array, zero: Array | None = None
) -> Array:
    code = attribute(node, "output_dtype", "INT", 0)
    dtype = _dtype_of(code, FLOATS) if code else scale.dtype
    meter.charge(x.size)
    scale = _beside(meter, node, x, "the scale", scale)
    zero = None if zero is None else _beside(meter, node, x, "the zero point", zero)
    return dequantized(x, scale, zero).astype(dtype)


def _quantize_linear(
    meter: Meter, node: Any, x: Array, scale: Array, zero: Array | None = None
) -> Array:
    if zero is None:
        code = attribute(node, "output_dtype", "INT", 0)
        dtype = _dtype_of(code, QUANTIZED) if code else np.dtype(np.uint8)
        zero = np.zeros((), dtype)
    if x.dtype.name not in FLOATS or scale.dtype != x.dtype or zero.dtype.name not in QUANTIZED:
        raise ValueError(
            f"it must make one of {', '.join(QUANTIZED)} of floating-point numbers, got "
            f"{', '.join(map(form, (x, scale, zero)))}"
        )
    meter.charge(x.size)
    limits = np.iinfo(zero.dtype)
    steps = x.astype(np.float32) / _beside(meter, node, x, "the scale", scale).astype(np.float32)
    steps = np.rint(steps) + _beside(meter, node, x, "the zero point", zero).astype(np.float32)
    return np.clip(steps, limits.min, limits.max).astype(zero.dtype)


@np.errstate(all="ignore")
def dequantized(x: Array, scale: Array, zero: Array | None) -> Array:
    """Computes (x - zero) * scale in float32, as ONNX Runtime; scale and zero broadcast with x."""
    if scale.dtype.name not in FLOATS:
        raise ValueError(f"the scale must be {', '.join(FLOATS)}, got {scale.dtype.name}")
    if x.dtype.name in FLOATS:
        raise ValueError(f"the quantized tensor must not be {x.dtype.name}")
    if zero is not None:
        _same_types([x, zero])
        if "float" not in x.dtype.name:  # otherwise x is float8
            x = x.astype(np.int64) - zero.astype(np.int64)
        elif zero.astype(np.float32).any():
            raise ValueError("the zero point of float8 must be 0")
    return x.astype(np.float32) * scale.astype(np.float32)


# The operators that may compute a value: the function, the number of inputs that it needs at least,
# and its attributes. The comments say which exporters use it in files with recurrent nodes.
OPERATORS: dict[str, tuple[Callable[..., Any], int, tuple[str, ...]]] = {
    # torch's exporters, to put the gates into ONNX's order; Paddle2ONNX; mx2onnx
    "Identity": (_identity, 1, ()),
    "Slice": (_slice, 1, ("starts", "ends", "axes")),
    "Concat": (_concat, 1, ("axis",)),
    "Unsqueeze": (_unsqueeze, 1, ("axes",)),
    "Squeeze": (_squeeze, 1, ("axes",)),
    # models exported with our `translations`
    "Reshape": (_reshape, 1, ("shape", "allowzero")),
    "Gather": (_gather, 2, ("axis",)),
    # tf2onnx (CudnnRNN) and mx2onnx, which store the weights of all layers in one tensor
    "Split": (_split, 1, ("axis", "split", "num_outputs")),
    # exporters that store weights in Keras's layout; quantizers, after DequantizeLinear
    "Transpose": (_transpose, 1, ("perm",)),
    # float16 models of onnxruntime and onnxconverter-common, before nodes that stay in float32
    "Cast": (_cast, 1, ("to", "saturate", "round_mode")),
    # weight_norm in torch.onnx.export(do_constant_folding=False); sizes in mx2onnx
    "Add": (_arithmetic(np.add, (*FLOATS, *SIGNED)), 2, ()),
    "Sub": (_arithmetic(np.subtract, (*FLOATS, *SIGNED)), 2, ()),
    "Mul": (_arithmetic(np.multiply, (*FLOATS, *SIGNED)), 2, ()),
    "Div": (_arithmetic(np.divide, FLOATS), 2, ()),
    "ReduceL2": (_reduce_l2, 1, ("axes", "keepdims", "noop_with_empty_axes")),
    # initial states: zeros, or one parameter repeated for every sequence
    "ConstantOfShape": (_constant_of_shape, 1, ("value",)),
    "Expand": (_expand, 2, ()),
    "Tile": (_tile, 2, ()),
    # quantizers; both in sequence if the stored weights are floating-point numbers
    "DequantizeLinear": (_dequantize_linear, 2, ("axis", "block_size", "output_dtype")),
    "QuantizeLinear": (_quantize_linear, 2, ("axis", "block_size", "output_dtype", "saturate")),
    # any exporter; a tensor that is stored as a node
    "Constant": (_identity, 1, ()),
}

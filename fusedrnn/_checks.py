"""The checks of a call before any kernel runs, with torch.nn's exception types and wording.

A function raises if something does not fit. It makes a cheap comparison first, and composes the
message only for an error. The size letters are those of docs/glossary.md: T steps, N sequences, I
input features, H units, P features of h, G gates.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from ._library import CELLS, CUDA, CellParameter, cuda_problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Shape = tuple[int, ...]


# The types of the arguments `device` and `dtype` of a constructor, as in torch.nn.
Device = torch.device | str | int | None
DType = torch.dtype | None


def check_flags(bias: Any, batch_first: Any, bidirectional: Any) -> None:
    """Checks that the switches of a call are bools; torch.nn checks the last in forward only."""
    if type(bias) is type(batch_first) is type(bidirectional) is bool:
        return
    flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    for name, flag in flags.items():
        check_bool(name, flag)


def check_bool(name: str, flag: Any) -> None:
    """Checks that a switch is a bool, with torch.nn's message."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")


def gru_cell(reset_after: Any) -> str:
    """Returns the name of a GRU's cell; checks that the option is a bool."""
    if reset_after is True:
        return "gru"
    check_bool("reset_after", reset_after)
    return "gru_reset_before"


def option_torch_lacks(layer: Any) -> str:
    """Returns the option of a fused layer that torch.nn cannot compute; "" if it can compute it."""
    if not getattr(layer, "reset_after", True):
        return "reset_after=False"
    # The weights decide: the attribute may have been changed since they were made.
    names = getattr(layer, "_flat_weights_names", ())
    return "peephole=True" if any(name.startswith("weight_ch") for name in names) else ""


def check_sizes(
    input_size: Any,
    hidden_size: Any,
    num_layers: Any,
    bias: Any,
    batch_first: Any,
    dropout: Any,
    proj_size: Any = 0,
) -> tuple[int, int]:
    """Checks a layer's constructor arguments in torch.nn's order.

    nn.RNNBase checks them too, but these messages also contain the value that was given. Returns
    num_layers and proj_size as ints, because as in torch.nn they may be numpy integers.
    """
    try:
        rate = float(dropout)
    except TypeError:
        raise TypeError(f"dropout should be a number in range [0, 1], got {dropout!r}") from None
    except ValueError:
        rate = -1.0
    if isinstance(dropout, (bool, str)) or not 0 <= rate <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an "
            f"element being zeroed, got {dropout!r}"
        )
    check_bool("bias", bias)
    check_bool("batch_first", batch_first)
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero, got {size}")
    num_layers = _as_int("num_layers", num_layers)
    if num_layers <= 0:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    proj_size = _as_int("proj_size", proj_size)
    if proj_size < 0:
        raise ValueError(
            "proj_size should be a positive integer or zero to disable projections, "
            f"got {proj_size}"
        )
    if proj_size >= hidden_size:
        raise ValueError(
            f"proj_size has to be smaller than hidden_size = {hidden_size}, got {proj_size}"
        )
    return num_layers, proj_size


def _as_int(name: str, size: Any) -> int:
    try:
        if size is not True:  # torch.nn refuses True in forward
            return operator.index(size)
    except TypeError:
        pass
    raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")


def weight_shapes(
    cell: str, sizes: tuple[int, int, int], num_layers: int, directions: int, bias: bool
) -> list[Shape]:
    """The shapes of all weights of a stack in torch.nn's order; sizes = (I, H, P)."""
    width, H, P = sizes
    spec = CELLS[cell]
    shapes: list[Shape] = []
    for _ in range(num_layers):
        one = [p.shape(G=spec.gates, H=H, I=width, P=P) for p in spec.parameters_with(bias)]
        shapes += one * directions
        width = P * directions
    return shapes


# The shapes are cached, because making them takes a tenth of the time of a small layer's call.
_known_shapes = functools.lru_cache(maxsize=1000)(weight_shapes)


def weight_names(cell: str, num_layers: int, directions: int, bias: bool) -> list[str]:
    """The names of all weights of a stack in torch.nn's order."""
    return [
        f"{parameter.name}_l{layer}{suffix}"
        for layer in range(num_layers)
        for suffix in ("", "_reverse")[:directions]
        for parameter in CELLS[cell].parameters_with(bias)
    ]


def check_weights(
    cell: str,
    sizes: tuple[int, int, int],
    num_layers: int,
    directions: int,
    bias: bool,
    weights: Sequence[Tensor],
    x: Tensor,
    mismatch: type[Exception],
    names: Sequence[str] = (),
) -> None:
    """Checks that weights are dense tensors with the right shapes and the input's dtype and device.

    Args:
        cell: the name of the cell.
        sizes: (I, H, P).
        num_layers: L.
        directions: D.
        bias: whether there are biases.
        weights: all weights of the stack, in torch.nn's order.
        x: the input.
        mismatch: the exception for an input whose dtype is not that of the first weight.
        names: the names of the weights; `weight_names` gives them if this is empty.
    """
    dtype, device = x.dtype, x.device
    shapes = (weight_shapes if torch.compiler.is_compiling() else _known_shapes)(
        cell, sizes, num_layers, directions, bias
    )
    if len(weights) != len(shapes):  # attributes of the layer were changed
        raise RuntimeError(
            f"num_layers = {num_layers}, bidirectional = {directions == 2} and bias = {bias} ask "
            f"for {len(shapes)} weights of {cell}, the layer has {len(weights)}; make another "
            "layer to change an option"
        )
    for k, (w, shape) in enumerate(zip(weights, shapes, strict=True)):
        if (
            not isinstance(w, Tensor)
            or w.shape != shape
            or w.dtype != dtype
            or w.device != device
            or w.layout is not torch.strided
        ):
            if k == 0 and isinstance(w, Tensor) and w.dtype != dtype:
                raise mismatch(
                    f"RNN input dtype ({dtype}) does not match weight dtype ({w.dtype}). Convert "
                    f"input: input.to({w.dtype}), or convert model: model.to({dtype})"
                )
            name = (names or weight_names(cell, num_layers, directions, bias))[k]
            parameters = CELLS[cell].parameters_with(bias)
            letters = letters_of(cell, parameters[k % len(parameters)])
            refuse_weight(name, w, letters, shape, dtype, device)


def letters_of(cell: str, parameter: CellParameter) -> str:
    """The shape of a parameter for a message, such as "4H, I"."""
    G = CELLS[cell].gates
    letters = ", ".join(parameter.sizes).replace("G*", f"{G}*" if G > 1 else "").replace("*", "")
    return letters if CELLS[cell].projects else letters.replace("P", "H")


def refuse_weight(
    name: str,
    w: Any,
    letters: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
) -> NoReturn:
    """Raises the error for a weight that is not dense or lacks this shape, dtype or device."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(w).__name__}")
    if w.device != device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{device} and parameter tensor {name} at {w.device}"
        )
    if w.shape != shape:
        raise RuntimeError(f"{name} must be [{letters}] = {list(shape)}, got {list(w.shape)}")
    if w.dtype == dtype:
        raise RuntimeError(
            f"{name} must be a dense tensor, got layout {w.layout}; give {name}.to_dense()"
        )
    raise RuntimeError(f"{name} must have the dtype of the input, {dtype}, got {w.dtype}")


def check_storage(name: str, t: Tensor) -> None:
    """Raises RuntimeError if the memory of a tensor was freed, before torch's own ops read it.

    torch's ops would crash or read other data. fusedrnn's ops make this check themselves.
    """
    dense = type(t) in (Tensor, Parameter) and t.layout is torch.strided
    if dense and not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        # The op makes the message. It is called only in doubt, as it takes as long as a small step.
        needed = (t.storage_offset() + t.numel()) * t.element_size()
        if not t.is_contiguous() or t.untyped_storage().nbytes() < needed:
            _check_storage(t, name)


_check_storage = torch.ops.fusedrnn._check_storage.default


def as_dense(name: str, t: Tensor) -> Tensor:
    """Returns a dense tensor as is and makes a sparse one dense; refuses all other layouts."""
    if t.layout is torch.strided and not t.is_nested:
        return t
    if t.is_nested:
        raise RuntimeError(
            f"{name} must be a dense tensor, got a nested one of layout {t.layout}; only the input "
            "of a layer may be nested, of layout torch.jagged"
        )
    if str(t.layout).startswith("torch.sparse"):
        return t.to_dense()
    raise RuntimeError(f"{name} must be a dense tensor, got layout {t.layout}; use to_dense()")


def check_kernels(x: Tensor) -> None:
    """Checks that there are kernels for dtype and device; "meta", with shapes only, passes."""
    if x.dtype not in DTYPES:
        raise NotImplementedError(
            f"input must be float32, float64, bfloat16 or float16, got {x.dtype}"
        )
    device = x.device
    if device.type == "cuda":
        if device.index not in _GPUS_THAT_FIT:
            _check_gpu(device)
    elif device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"input is on {device}, but fusedrnn has no kernels for {device.type}; move input and "
            "module to the CPU, or use torch.nn there"
        )


# The indices of the GPUs that passed `_check_gpu`.
_GPUS_THAT_FIT: set[int | None] = set()


def _check_gpu(device: torch.device) -> None:
    """Raises NotImplementedError if the kernels cannot run on a GPU."""
    if CUDA.path is not None and (torch.compiler.is_compiling() or not torch.cuda.is_available()):
        # This is a fake tensor, which needs no GPU. The ops check again before kernels run.
        return
    problem = cuda_problem(device.index)
    if problem:
        raise NotImplementedError(
            f"input is on {device}, but {problem}. Or move input and module to the CPU, or use "
            "torch.nn on the GPU"
        )
    _GPUS_THAT_FIT.add(device.index)


def check_state(
    name: str, state: Tensor, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """Checks an initial state; `name` for messages is "hidden", "hidden[0]" or "hidden[1]"."""
    if state.shape != shape:
        raise RuntimeError(f"Expected {name} size {shape}, got {list(state.shape)}")
    if state.device != device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{device} and hidden tensor ({name}) at {state.device}"
        )
    if state.dtype != dtype:
        raise RuntimeError(f"{name} must have the dtype of the input, {dtype}, got {state.dtype}")


def check_rank(batched: bool, h0: Any, c0: Any, has_c: bool) -> None:
    """Checks that the states are tensors, 3-D for batched input and 2-D for unbatched."""
    for state in (h0, c0) if has_c else (h0,):
        if not isinstance(state, Tensor):
            raise AttributeError(
                f"hx must be {'a tuple (h_0, c_0) of tensors' if has_c else 'a Tensor'}, got "
                f"{type(state).__name__}{' in it' if has_c else ''}"
            )
    rank = 3 if batched else 2
    kind = f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, "
    if has_c and (h0.dim() != rank or c0.dim() != rank):
        raise RuntimeError(
            f"{kind}hx and cx should also be {rank}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
        )
    if h0.dim() != rank:
        raise RuntimeError(f"{kind}hx should also be {rank}-D but got {h0.dim()}-D tensor")


def lstm_states(hx: Any) -> tuple[Any, Any]:
    """Returns h_0 and c_0 of an LSTM's hx, which may be None: then both are None."""
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple (h_0, c_0) of tensors, got {type(hx).__name__}")
    if len(hx) != 2:
        # torch.nn reads hx[0] and hx[1] before it checks the length.
        raise (IndexError if len(hx) < 2 else RuntimeError)(
            f"lstm expects two hidden states (h_0, c_0) in hx, got {len(hx)}"
        )
    h0, c0 = hx
    if h0 is None:  # without this check (None, None) would count as no hx
        raise AttributeError("hx must be a tuple (h_0, c_0) of tensors, got NoneType in it")
    return h0, c0

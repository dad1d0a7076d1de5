"""Makes fused layers from the recurrent nodes of ONNX models."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ._importing import as_tensor, expect_shape, make_layer, with_gates
from ._modules import FusedGRU, FusedLSTM, FusedRNN
from ._onnx import PEEPHOLES_TO_ONNX, TO_ONNX, attribute, need, text

if TYPE_CHECKING:  # these modules need numpy
    from ._onnx_operators import Array
    from ._onnx_values import Constants, Scope

__all__ = ["constants", "load"]

Layer = FusedLSTM | FusedGRU | FusedRNN

# ONNX Runtime's name for an LSTM whose weights are integers.
QUANTIZED = "DynamicQuantizeLSTM"
KINDS = {**{("", kind): kind for kind in TO_ONNX}, ("com.microsoft", QUANTIZED): "LSTM"}
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# The limits for a model in which each call of a local function is replaced by the function's nodes.
# They are the number of nodes, the depth of nested calls, and the size, which may be at most four
# times the size of the file plus MOST_BYTES. Exporters that write functions nest them a few levels
# deep and do not store weights in them.
MOST_NODES = 1_000_000
DEEPEST = 100
MOST_BYTES = 1 << 26


@overload
def load(source: Any, name: None = None) -> dict[str, Layer]: ...


@overload
def load(source: Any, name: str) -> Layer: ...


def load(source: Any, name: str | None = None) -> Layer | dict[str, Layer]:
    """Makes a fused layer from each LSTM, GRU and RNN node of an ONNX model, or from one node.

    A layer has the weights of its node, in their dtype, and its attributes. Like the node, it takes
    x [T, N, I]. The node's other inputs must be passed to the layer's call: initial states as
    ``hx``, sequence_lens as ``lengths=``. `constants` returns those that the file contains.

    The node's Y [T, D, N, H] is ``y.unflatten(-1, (D, H)).transpose(1, 2)`` of the layer's y [T, N,
    D*H]. A node with layout = 1 becomes a ``batch_first`` layer, which takes x [N, T, I]. Its Y [N,
    T, D, H] is ``y.unflatten(-1, (D, H))``, and its Y_h and Y_c [N, D, H] are
    ``h_n.transpose(0, 1)`` and ``c_n.transpose(0, 1)``. Nodes in the branches of an If, in the body
    of a Loop and in local functions are also found.

    Weights must be constant: either stored, or computed from stored tensors by operators that
    exporters and quantizers use for weights (the error for another operator lists them). Weights
    behind DequantizeLinear, and those of ONNX Runtime's DynamicQuantizeLSTM, become floating-point
    numbers. Nothing else in the file is computed.

    Args:
        source: the path of a file, or an onnx.ModelProto.
        name: the name of one node; None loads all. A node without a name, or with the name of an
            earlier node, has the name ``<operator>_<k>``, where k counts the model's recurrent
            nodes from 0.

    Returns:
        The layer of the node `name`, or all layers by name, in the order of the graph.

    Warns:
        UserWarning: the file contains initial states that are not zero, or sequence_lens, and a
            call of the layer uses them only if it gets `constants`. Or they depend on no input of
            the graph, but load cannot compute them.

    Raises:
        ModuleNotFoundError: onnx is missing.
        OSError: the file cannot be opened.
        TypeError: source is neither a path nor a model.
        ValueError: the file is not an ONNX model, or contradicts itself; there is no such node; or
            our layers cannot compute a node, because it has other activations, clip, input_forget,
            direction "reverse", weights that are not constant, weights of several dtypes, or a
            dtype other than float32, float64, float16 and bfloat16.
    """
    model, folder = _read(source)
    found: dict[str, _Node] = {}
    odd: set[str] = set()
    for scope, proto in _nodes(model.graph):
        domain = "" if proto.domain == "ai.onnx" else text(proto.domain)
        op_type, key = text(proto.op_type), text(proto.name)
        if (domain, op_type) not in KINDS:
            if op_type.endswith((*TO_ONNX,)):
                odd.add(f"{domain}::{op_type}" if domain else op_type)
            continue
        if not key or key in found:
            key = f"{op_type}_{len(found)}"
            while key in found:
                key += "_"
        found[key] = _Node(proto, KINDS[domain, op_type], scope, folder)
    if not found:
        known = f"; load does not know {', '.join(sorted(odd))}" if odd else ""
        raise ValueError(f"the model has no LSTM, GRU or RNN node{known}")
    if name is not None and name not in found:
        raise ValueError(f"name must be one of {', '.join(found)}, got {name!r}")
    result: dict[str, Layer] = {}
    for key in found if name is None else [name]:
        what = f"node {key!r} ({text(found[key].proto.op_type)})"
        try:
            result[key], remarks = found[key].layer()
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        for remark in remarks:
            warnings.warn(f"{what}: {remark}", stacklevel=2)
    return result if name is None else result[name]


def constants(layer: Layer, N: int | None = None) -> dict[str, Any]:
    """Returns the constants that the file of a layer contains for its node, besides the weights.

    A model can contain initial states (learned ones, for example) and the lengths of its sequences.
    `load` keeps them with the layer, and a call can pass them on::

        y, state = layer(x, **fusedrnn.onnx.constants(layer))

    Args:
        layer: a layer from `load`. If it moves to another dtype or device, so do the states.
        N: the number of sequences, for a state that is stored once and that the graph repeats for
            each sequence. None: the number for which states are stored.

    Returns:
        Arguments for the layer's call; {} if the file has none. ``hx`` is present if an initial
        state is not zero: h0 [D, N, H], or (h0, c0) for an LSTM. In this pair None stands for a
        state that the graph computes and the caller must fill in. ``lengths`` [N] is present if
        sequence_lens is constant.

    Raises:
        ValueError: the states are stored for another number of sequences than N.
    """
    states: list[Any] = [getattr(layer, f"onnx_{key}0", None) for key in "hc"]
    result: dict[str, Any] = {}
    stored = max((s.size(1) for s in states if s is not None), default=1)
    size = stored if N is None else N
    if stored not in (1, size):
        raise ValueError(f"N must be {stored}, as in the initial state, got {size}")
    states = [None if s is None else s.expand(-1, size, -1) for s in states]
    if any(s is not None for s in states):
        result["hx"] = tuple(states) if layer.mode == "LSTM" else states[0]
    lengths = getattr(layer, "onnx_lengths", None)
    if lengths is not None:
        result["lengths"] = torch.tensor(lengths, dtype=torch.int64)
    return result


def _read(source: Any) -> tuple[Any, str | None]:
    """Returns the model, with calls of local functions replaced by their nodes, and its folder."""
    onnx = need("onnx", "load")
    folder: str | None = None
    if isinstance(source, onnx.ModelProto):
        model, what = source, "the model"
    elif isinstance(source, (str, os.PathLike)) or hasattr(source, "read"):
        what = "the file"
        if not hasattr(source, "read"):
            path = os.fspath(source)
            what, folder = repr(path), os.path.dirname(path)
            if path.endswith((".onnxtxt", ".onnxtext")):
                # onnx 1.23 ends the process if such a file is nested deeply.
                raise ValueError(f"{what} is in onnx's text form: give load onnx.load({what})")
        try:
            form = "protobuf" if hasattr(source, "read") else None  # None: by the path
            model = onnx.load(source, form, load_external_data=False)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # protobuf has another exception for each form of a file
            raise ValueError(
                f"{what} is not an ONNX model: {type(error).__name__}: {error}"
            ) from None
    else:
        raise TypeError(f"source must be a path or an onnx.ModelProto, got {type(source).__name__}")
    if not model.HasField("graph"):
        raise ValueError(f"{what} is not an ONNX model: it has no graph")
    if model.functions:
        inliner = need("onnx.inliner", "load")
        try:
            _check_functions(model)
            model = inliner.inline_local_functions(model)
        except ValueError:
            raise
        except Exception as error:  # an exception of protobuf or of onnx's C++ code
            raise ValueError(
                f"the local functions of {what} cannot be put in place of their calls: {error}"
            ) from None
    return model, folder


def _check_functions(model: Any) -> None:
    """Raises ValueError if replacing calls of functions would not end or exceed the limits."""

    def key(node: Any, name: Any) -> tuple[Any, ...]:
        return ("" if node.domain == "ai.onnx" else node.domain, name, node.overload)

    functions = {key(f, f.name): f for f in model.functions}
    calls = {
        name: Counter(key(n, n.op_type) for _, n in _nodes(f, scopes=False))
        for name, f in functions.items()
    }
    callers: dict[Any, list[Any]] = {name: [] for name in functions}
    for name, counts in calls.items():
        for each in counts.keys() & functions.keys():
            callers[each].append(name)
    missing = {name: len(counts.keys() & functions.keys()) for name, counts in calls.items()}
    sizes: dict[Any, tuple[int, int, int]] = {}  # nodes, bytes and depth of each function

    def size_of(proto: Any, counts: Counter[Any]) -> tuple[int, int, int]:
        inner = {each: sizes[each] for each in counts.keys() & functions.keys()}
        return (
            sum(n * inner[each][0] if each in inner else n for each, n in counts.items()),
            proto.ByteSize() + sum(counts[each] * size[1] for each, size in inner.items()),
            1 + max((size[2] for size in inner.values()), default=0),
        )

    ready = [name for name, count in missing.items() if count == 0]
    while ready:
        name = ready.pop()
        sizes[name] = size_of(functions[name], calls[name])
        for caller in callers[name]:
            missing[caller] -= 1
            if missing[caller] == 0:
                ready.append(caller)
    circle = [name for name in functions if name not in sizes]
    if circle:
        raise ValueError(f"the local function {text(circle[0][1])!r} calls itself")
    of_graph = Counter(key(n, n.op_type) for _, n in _nodes(model.graph, scopes=False))
    nodes, size, depth = size_of(model.graph, of_graph)
    most = MOST_BYTES + 4 * model.ByteSize()
    if nodes > MOST_NODES or depth > DEEPEST or size > most:
        raise ValueError(
            f"with its local functions in place the model has {nodes} nodes of {size} bytes, "
            f"{depth - 1} deep; load takes {MOST_NODES} of {most}, {DEEPEST} deep"
        )


def _nodes(graph: Any, scopes: bool = True) -> Iterator[tuple[Any, Any]]:
    """Yields the nodes of a graph and of the graphs in its nodes, in order, each with its scope."""
    if scopes:
        from ._onnx_values import Scope
    stack: list[tuple[Any, Iterator[Any]]] = [
        (Scope(graph, None) if scopes else None, iter(graph.node))
    ]
    while stack:
        scope, nodes = stack[-1]
        node = next(nodes, None)
        if node is None:
            stack.pop()
            continue
        yield scope, node
        inner = [
            g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)
        ]
        stack += [(Scope(g, scope) if scopes else None, iter(g.node)) for g in reversed(inner)]


class _Node:
    """A recurrent node, with access to the constants among its inputs."""

    def __init__(self, proto: Any, kind: str, scope: Scope, folder: str | None) -> None:
        from ._onnx_values import Constants

        self.proto = proto
        self.kind = kind  # LSTM, GRU or RNN
        self.inputs = [*proto.input, *[""] * 12]
        self.constants: Constants = Constants(scope, folder)

    def layer(self) -> tuple[Layer, list[str]]:
        """Makes the fused layer of this node; returns it with remarks for the user."""
        kind = self.kind
        G = len(TO_ONNX[kind])
        options = self._options()
        D = 2 if options["bidirectional"] else 1
        W, R = (self._matrix(*each) for each in (("W", 1, 8), ("R", 2, 10)))
        if W.dim() != 3:
            raise ValueError(f"W must have 3 dimensions, got {W.dim()}")
        H, I = W.shape[1] // G, W.shape[2]
        expect_shape("W", W, f"[D, {G}*H, I]", D, G * H, I)
        expect_shape("R", R, f"[D, {G}*H, H]", D, G * H, H)
        hidden_size = attribute(self.proto, "hidden_size", "INT", H)
        if hidden_size != H:
            raise ValueError(f"hidden_size must be the H of W, {H}, got {hidden_size}")
        _expect_float("W", W)
        _expect_float("R", R, W.dtype)

        # For each gate in torch's order, its index in ONNX's.
        order = [TO_ONNX[kind].index(k) for k in range(G)]
        weights: list[Tensor] = []
        B = self._tensor("B", 3) if self.inputs[3] else None
        if B is not None:
            expect_shape("B", B, f"[D, 2*{G}*H]", D, 2 * G * H)
            _expect_float("B", B, W.dtype)
        P = self._tensor("P", 7) if kind == "LSTM" and self.inputs[7] else None
        if P is not None:
            expect_shape("P", P, "[D, 3*H]", D, 3 * H)
            _expect_float("P", P, W.dtype)
            options["peephole"] = True
        for d in range(D):
            of_direction = [W[d], R[d], *(() if B is None else B[d].chunk(2))]
            weights += [with_gates(w, order) for w in of_direction]
            weights += [] if P is None else [with_gates(P[d], PEEPHOLES_TO_ONNX)]
        bias = B is not None
        layer: Layer
        if kind == "LSTM":
            layer = make_layer(FusedLSTM, weights, bias, **options)
        elif kind == "GRU":
            layer = make_layer(FusedGRU, weights, bias, **options)
        else:
            layer = make_layer(FusedRNN, weights, bias, **options)
        return layer, self._keep_constants(layer, D, H, W.dtype)

    def _options(self) -> dict[str, Any]:
        """Returns the attributes as options of our constructor; ValueError if it lacks one."""
        kind, node = self.kind, self.proto
        direction = text(attribute(node, "direction", "STRING", b"forward"))
        if direction not in ("forward", "bidirectional"):
            raise ValueError(
                f"direction must be forward or bidirectional, got {direction}: for reverse, give a "
                "forward layer the flipped sequences"
            )
        for name, type_ in (("clip", "FLOAT"), ("input_forget", "INT")):
            value = attribute(node, name, type_, 0)
            if value != 0:
                raise ValueError(f"{name} must be absent or 0, got {value:g}")
        layout = attribute(node, "layout", "INT", 0)
        if layout not in (0, 1):
            raise ValueError(f"layout must be 0 or 1, got {layout}")
        defaults = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
        expected = [defaults.get(kind, ["Tanh"])]
        if kind == "RNN":
            expected.append(["Relu"])
        D = 2 if direction == "bidirectional" else 1
        given = [text(a) for a in attribute(node, "activations", "STRINGS", [])]
        given = given or expected[0] * D
        accepted = [e for e in expected if [a.lower() for a in given] == [a.lower() for a in e * D]]
        if not accepted:
            wanted = " or ".join(str(e * D) for e in expected)
            raise ValueError(f"activations must be {wanted}, got {given}")
        options: dict[str, Any] = {"bidirectional": D == 2, "batch_first": layout == 1}
        if kind == "GRU":
            options["reset_after"] = attribute(node, "linear_before_reset", "INT", 0) != 0
        if kind == "RNN":
            options["nonlinearity"] = accepted[0][0].lower()
        return options

    def _tensor(self, what: str, k: int, any_batch: bool = False) -> Tensor:
        """Returns the value of input k, which `what` names in messages."""
        if not self.inputs[k]:
            raise ValueError(f"the input {what} is missing")
        return _as_tensor(what, self.constants.of(what, self.inputs[k], any_batch))

    def _matrix(self, what: str, k: int, scale: int) -> Tensor:
        """Returns W or R [D, G*H, ...]; a quantized node has integers [D, ..., G*H] and a scale."""
        if self.proto.op_type != QUANTIZED:
            return self._tensor(what, k)
        from ._onnx_operators import dequantized

        names = (what, f"{what}_scale", f"{what}_zero_point")
        if not self.inputs[k] or not self.inputs[scale]:
            raise ValueError(f"the inputs {what} and {what}_scale must be there")
        x, *rest = (
            self.constants.of(each, self.inputs[place]) if self.inputs[place] else None
            for each, place in zip(names, (k, scale, scale + 1), strict=True)
        )
        assert x is not None
        if x.ndim != 3:
            raise ValueError(f"{what} must have 3 dimensions, got {x.ndim}")
        D, _, rows = x.shape
        broad: list[Any] = []
        for each, array in zip(names[1:], rest, strict=True):
            if array is not None and array.shape not in ((D,), (D, rows)):
                raise ValueError(f"{each} must be [{D}] or [{D}, {rows}], got {list(array.shape)}")
            broad.append(None if array is None else array.reshape(D, 1, -1))
        try:
            array = dequantized(x, *broad)
        except ValueError as error:
            raise ValueError(f"{what} cannot be dequantized: {error}") from None
        return _as_tensor(what, array).transpose(1, 2).contiguous()

    def _keep_constants(self, layer: Layer, D: int, H: int, dtype: torch.dtype) -> list[str]:
        """Stores in a layer the values that `constants` returns; returns remarks for the user."""
        remarks: list[str] = []
        states: list[Tensor | None] = []
        kept = []
        for k, what in ((5, "initial_h"), (6, "initial_c"))[: 2 if self.kind == "LSTM" else 1]:
            states.append(torch.zeros(D, 1, H, dtype=dtype))
            if not self.inputs[k]:
                continue
            try:
                state = self._tensor(what, k, any_batch=True)
                _expect_float(what, state, dtype)
                states[-1] = self._rows(what, state, D, H, layer.batch_first)
            except ValueError as error:
                states[-1] = None
                if not getattr(error, "given", False):
                    remarks.append(f"{error}. It is yours to pass to the layer, as hx")
                continue
            if bool(state.any()):
                kept.append(what)
        sizes = {s.shape[1] for s in states if s is not None} - {1}
        if len(sizes) > 1:
            numbers = " and ".join(map(str, sorted(sizes)))
            remarks.append(f"the states are of {numbers} sequences. They are yours to pass, as hx")
            kept = []
        if kept:
            for key, value in zip("hc", states, strict=False):
                layer.register_buffer(f"onnx_{key}0", value, persistent=False)
        if self.inputs[4]:
            try:
                lengths = self._tensor("sequence_lens", 4)
                if lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64):
                    form = f"{list(lengths.shape)} of {_name(lengths.dtype)}"
                    raise ValueError(f"sequence_lens must be [N] of int32, got {form}")
            except ValueError as error:
                if not getattr(error, "given", False):
                    remarks.append(f"{error}. It is yours to pass to the layer, as lengths=")
            else:
                layer.onnx_lengths = lengths.tolist()
                kept.append("sequence_lens")
        if kept:
            remarks.append(
                f"the file holds {' and '.join(kept)}. The layer uses them where a call passes "
                "**fusedrnn.onnx.constants(layer)"
            )
        return remarks

    def _rows(self, what: str, state: Tensor, D: int, H: int, batch_first: bool) -> Tensor:
        """Returns a state as [D, N, H]; a node with layout = 1 has it as [N, D, H]."""
        form = f"[N, {D}, {H}]" if batch_first else f"[{D}, N, {H}]"
        wrong = ValueError(f"{what} must be {form}, got {list(state.shape)}")
        if self.constants.repeated:
            state = state[(None,) * (3 - state.dim())]
        if state.dim() != 3:
            raise wrong
        state = state.transpose(0, 1) if batch_first else state
        if not self.constants.repeated and (state.shape[0], state.shape[2]) != (D, H):
            raise wrong
        self.constants.charge(D * state.shape[1] * H)
        try:
            return state.expand(D, -1, H).clone()
        except RuntimeError:
            raise wrong from None


def _as_tensor(what: str, array: Array) -> Tensor:
    try:  # torch takes no negative strides, which the result of a Slice may have
        return as_tensor(array if array.flags.c_contiguous else array.copy())
    except TypeError:
        raise ValueError(f"{what} must hold numbers, got {array.dtype.name}") from None


def _expect_float(what: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError if a tensor has no type with kernels, or not `dtype`, which is W's."""
    said = _name(tensor.dtype)
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{what} must be {_name(dtype)} as W is, got {said}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{what} must be float32, float64, float16 or bfloat16, got {said}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

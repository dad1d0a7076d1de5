"""Models with fused layers to ONNX files, and ONNX's recurrent nodes to fused layers.

`export` writes a model in which every fused layer is one node: LSTM, GRU or RNN. `load` reads such
nodes, whoever wrote them. The package onnx is needed for both, onnxscript for `export`.

    import fusedrnn.onnx

    fusedrnn.onnx.export(model, (x,), "model.onnx", dynamic_shapes=({0: "T", 1: "N"},))
    layer = fusedrnn.onnx.load("model.onnx", "encoder")
"""

from __future__ import annotations

import ast
import importlib
import os
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from ._importing import as_tensor, expect_shape, make_layer, with_gates
from ._library import CELLS
from .modules import FusedGRU, FusedLSTM, FusedRNN

__all__ = ["export", "load", "translations"]

# Of ONNX's gates (LSTM iofc, GRU zrh), the place in our order (LSTM ifgo, GRU rzn).
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
_OPERATORS = {
    "lstm": "LSTM",
    "gru": "GRU",
    "gru_reset_before": "GRU",
    "rnn_tanh": "RNN",
    "rnn_relu": "RNN",
}


class _NoForm(NotImplementedError):
    """What ONNX cannot say."""


def _need(package: str, task: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"fusedrnn.onnx.{task} needs the package {error.name}, which is not installed: "
            f"pip install {error.name}",
            name=error.name,
        ) from None


# --- Export ------------------------------------------------------------------------------------


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | torch.Tensor = (),
    file: str | os.PathLike[str] | None = None,
    *,
    external_data: bool | None = None,
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Exports a model with `torch.onnx.export`, every fused layer as one ONNX node.

    A stack of L layers gives L nodes; those of a layer ``encoder`` are named ``encoder_l0`` and on
    (``model_l0`` where the model is the layer). ``lengths=`` becomes the input sequence_lens,
    reset_after linear_before_reset. The weights are stored in ONNX's layout and order of gates.

    Args:
        model: in eval mode, as for `torch.onnx.export`.
        args: example inputs.
        file: where to write the model; None to write nothing.
        external_data: whether weights go to a file beside `file`; None: only above 1.5 GB.
        custom_translation_table: of other operators, beside `translations`.
        options: any of `torch.onnx.export`: kwargs, dynamic_shapes, input_names, output_names,
            opset_version (18 or later), optimize, report...

    Returns:
        The program, which can be saved, called (by ONNX Runtime) and looked at.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        NotImplementedError: something in the model that ONNX's operators cannot compute: a
            projection (proj_size), a PackedSequence (use ``lengths=``), bfloat16.
        torch.onnx.OnnxExporterError: whatever else torch cannot export.
    """
    table = {**translations(), **(custom_translation_table or {})}
    options.setdefault("verbose", False)
    try:
        program = torch.onnx.export(
            model,
            args,  # type: ignore[arg-type]
            dynamo=True,
            custom_translation_table=table,
            **options,
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _NoForm):
            cause = cause.__cause__
        if cause is None:
            raise
        raise NotImplementedError(str(cause)) from None
    assert program is not None
    _store_weights(program.model)
    if file is not None:
        program.save(file, external_data=external_data)
    return program


def translations() -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` must know of fused layers, for those who call it themselves.

    Pass it as ``custom_translation_table``. Unlike `export`, which reorders the weights once,
    torch's exporter leaves that to a few nodes before each layer; ONNX Runtime runs them once when
    it loads the model.

    Returns:
        A function for each operator of ours that can be in an exported program.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
    """
    _need("onnx", "export")
    op = _need("onnxscript", "export").opset18

    def forward(
        x: Any,
        h0: Any,
        c0: Any,
        weights: Any,
        batch_sizes: Any,
        lengths: Any,
        batch: Any,
        cell: str,
        bidirectional: bool,
        keep: bool,
    ) -> Any:
        return _translate(op, x, h0, c0, weights, batch_sizes, lengths, cell, bidirectional)

    return {torch.ops.fusedrnn.forward.default: forward}


def _translate(
    op: Any,
    x: Any,  # [T, N, I]
    h0: Any,  # [D, N, H] or None
    c0: Any,  # [D, N, H] or None
    weights: Sequence[Any],
    batch_sizes: Any,
    lengths: Any,  # int64 [N] or None
    cell: str,
    bidirectional: bool,
) -> list[Any]:
    """The nodes of one layer: y [T, N, D*H], h_n and, for an LSTM, c_n [D, N, H]."""
    if CELLS[cell].projects:
        raise _NoForm("proj_size must be 0: ONNX's LSTM has no projection, so this has no form")
    if batch_sizes is not None:
        raise _NoForm(
            "a PackedSequence has no form in ONNX; call the layer with the padded batch and "
            "lengths=, which becomes the input sequence_lens"
        )
    if x.dtype is not None and x.dtype.name == "BFLOAT16":
        raise _NoForm("bfloat16 has no form in ONNX's recurrent operators; use model.float()")
    D = 2 if bidirectional else 1
    G = CELLS[cell].gates
    name = _OPERATORS[cell]
    H = weights[1].shape[1]
    bias = len(weights) == 4 * D

    def gates(weight: Any) -> Any:
        """A weight [G*H, K] or [G*H] as [1, G*H, ...], its gates in ONNX's order."""
        rest = list(weight.shape)[1:]
        if G > 1:
            weight = op.Reshape(weight, op.Constant(value_ints=[G, H, *rest]))
            weight = op.Gather(weight, op.Constant(value_ints=list(_GATES[name])), axis=0)
        return op.Reshape(weight, op.Constant(value_ints=[1, G * H, *rest]))

    def side_by_side(parts: list[Any], axis: int) -> Any:
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)

    kinds = 4 if bias else 2
    W, R = (side_by_side([gates(w) for w in weights[k::kinds]], 0) for k in (0, 1))
    B = None
    if bias:
        both = [op.Concat(gates(weights[k]), gates(weights[k + 1]), axis=1) for k in (2, 6)[:D]]
        B = side_by_side(both, 0)
    options: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if bidirectional else "forward",
    }
    sequence_lens = None if lengths is None else op.Cast(lengths, to=6)  # int32
    inputs = [x, W, R, B, sequence_lens, h0]
    if name == "LSTM":
        inputs.append(c0)
    elif name == "GRU":
        options["linear_before_reset"] = int(cell == "gru")
    else:
        options["activations"] = ["Tanh" if cell == "rnn_tanh" else "Relu"] * D
    Y, *last = getattr(op, name)(*inputs, **options)

    if lengths is not None:
        # The state of a row of length 0 is its initial one; ONNX Runtime gives zeros.
        empty = op.Unsqueeze(
            op.Equal(lengths, op.Constant(value_int=0)), op.Constant(value_ints=[0, 2])
        )
        last = [
            s if s0 is None else op.Where(empty, s0, s)
            for s0, s in zip((h0, c0), last, strict=False)
        ]
    if D == 1:
        y = op.Squeeze(Y, op.Constant(value_ints=[1]))
    else:
        y = op.Reshape(op.Transpose(Y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, D * H]))
    return [y, *last]


def _store_weights(model: Any) -> None:
    """Stores W, R and B of recurrent nodes as the nodes want them, and gives the nodes names."""
    wanted: set[int] = set()
    recurrent = [n for n in model.graph.all_nodes() if n.domain == "" and n.op_type in _GATES]

    def want(value: Any) -> None:
        node = None if value is None else value.producer()
        if node is not None and id(node) not in wanted:
            wanted.add(id(node))
            for source in node.inputs:
                want(source)

    for node in recurrent:
        for value in node.inputs[1:4]:
            want(value)
    optimizer = _need("onnxscript.optimizer", "export")
    # Where one of them does not depend on stored weights alone, folding stops before it.
    optimizer.fold_constants_ir(model, should_fold=lambda node: id(node) in wanted)
    optimizer.remove_unused_nodes(model)
    layers: Counter[str] = Counter()
    for node in recurrent:
        scopes = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
        path = scopes[-2] if len(scopes) > 1 else ""  # ["", "encoder", the call]
        node.name = f"{path or 'model'}_l{layers[path]}"
        layers[path] += 1
        for letter, value in zip("WRB", node.inputs[1:4], strict=False):
            if value is not None and value.is_initializer() and len(value.uses()) == 1:
                value.name = f"{node.name}.{letter}"


# --- Import ------------------------------------------------------------------------------------

Layer = FusedLSTM | FusedGRU | FusedRNN


@overload
def load(source: Any, name: None = None) -> dict[str, Layer]: ...


@overload
def load(source: Any, name: str) -> Layer: ...


def load(source: Any, name: str | None = None) -> Layer | dict[str, Layer]:
    """Makes a fused layer of every LSTM, GRU and RNN node of an ONNX model, or of one.

    The layers hold the nodes' weights and attributes, in their dtype, and take [T, N, I] as the
    nodes do. What the graph feeds to a node besides is the caller's to pass: initial states as
    ``hx``, sequence_lens as ``lengths=``. The node's Y [T, D, N, H] is our y [T, N, D*H],
    ``y.unflatten(-1, (D, H)).transpose(1, 2)``. Nodes in the branches of an If, in the body of
    a Loop and in local functions are found too.

    Args:
        source: the path of a file, or an onnx.ModelProto.
        name: of one node; one without a name, or with the name of an earlier one, has the name
            ``<operator>_<k>``, k counting the model's recurrent nodes from 0.

    Returns:
        The layer named, or all of them by name, in the order of the graph.

    Raises:
        ModuleNotFoundError: onnx is missing.
        ValueError: no such node, or one that our layers cannot compute: other activations, clip,
            peepholes, input_forget, layout = 1, direction "reverse", weights that are not constant.
    """
    onnx = _need("onnx", "load")
    model = source if isinstance(source, onnx.ModelProto) else onnx.load(source)
    if model.functions:
        model = _need("onnx.inliner", "load").inline_local_functions(model)
    found: dict[str, _Node] = {}
    for k, node in enumerate(_recurrent_nodes(model, model.graph, ChainMap())):
        taken = not node.proto.name or node.proto.name in found
        found[f"{node.proto.op_type}_{k}" if taken else node.proto.name] = node
    if not found:
        raise ValueError("the model has no LSTM, GRU or RNN node")
    if name is None:
        return {key: node.layer(key) for key, node in found.items()}
    if name not in found:
        raise ValueError(f"name must be one of {', '.join(found)}, got {name!r}")
    return found[name].layer(name)


class _Node:
    """A recurrent node, and where the values come from that it can see."""

    def __init__(self, model: Any, proto: Any, sources: Mapping[str, Any]) -> None:
        self.model = model
        self.proto = proto
        self.sources = sources  # of a value: the initializer, or the node that computes it

    def layer(self, name: str) -> Layer:
        """The fused layer with the weights of this node."""
        try:
            return self._layer()
        except ValueError as error:
            raise ValueError(f"node {name!r} ({self.proto.op_type}): {error}") from None

    def _layer(self) -> Layer:
        kind = self.proto.op_type
        G = len(_GATES[kind])
        options = self._options()
        D = 2 if options["bidirectional"] else 1

        inputs = [*self.proto.input, *[""] * 8]
        if kind == "LSTM" and inputs[7]:
            raise ValueError("the input P must be absent: peepholes have no counterpart")
        W, R = (as_tensor(self._constant(what, inputs[k])) for what, k in (("W", 1), ("R", 2)))
        if W.dim() != 3:
            raise ValueError(f"W must have 3 dimensions, got {W.dim()}")
        H, I = W.shape[1] // G, W.shape[2]
        expect_shape("W", W, f"[D, {G}*H, I]", D, G * H, I)
        expect_shape("R", R, f"[D, {G}*H, H]", D, G * H, H)
        hidden_size = self._attributes().get("hidden_size", H)
        if hidden_size != H:
            raise ValueError(f"hidden_size must be the H of W, {H}, got {hidden_size}")

        order = _ours(kind)
        weights: list[torch.Tensor] = []
        B = as_tensor(self._constant("B", inputs[3])) if inputs[3] else None
        if B is not None:
            expect_shape("B", B, f"[D, 2*{G}*H]", D, 2 * G * H)
        for d in range(D):
            of_direction = [W[d], R[d], *(() if B is None else B[d].chunk(2))]
            weights += [with_gates(w, order) for w in of_direction]
        bias = B is not None
        if kind == "LSTM":
            return make_layer(FusedLSTM, weights, bias, **options)
        if kind == "GRU":
            return make_layer(FusedGRU, weights, bias, **options)
        return make_layer(FusedRNN, weights, bias, **options)

    def _attributes(self) -> dict[str, Any]:
        helper = _need("onnx.helper", "load")
        return {a.name: helper.get_attribute_value(a) for a in self.proto.attribute}

    def _options(self) -> dict[str, Any]:
        """What the attributes say to our constructor; raises where it cannot be said."""
        attributes = self._attributes()
        direction = attributes.get("direction", b"forward").decode()
        if direction not in ("forward", "bidirectional"):
            raise ValueError(
                f"direction must be forward or bidirectional, got {direction}: for reverse, give a "
                "forward layer the flipped sequences"
            )
        for name in ("clip", "input_forget", "layout"):
            if attributes.get(name, 0) != 0:
                raise ValueError(f"{name} must be absent or 0, got {attributes[name]:g}")
        kind = self.proto.op_type
        defaults = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
        expected = [defaults.get(kind, ["Tanh"])]
        if kind == "RNN":
            expected.append(["Relu"])
        D = 2 if direction == "bidirectional" else 1
        given = [a.decode() for a in attributes.get("activations", [])] or expected[0] * D
        accepted = [e for e in expected if [a.lower() for a in given] == [a.lower() for a in e * D]]
        if not accepted:
            wanted = " or ".join(str(e * D) for e in expected)
            raise ValueError(f"activations must be {wanted}, got {given}")
        options: dict[str, Any] = {"bidirectional": D == 2}
        if kind == "GRU":
            options["reset_after"] = attributes.get("linear_before_reset", 0) != 0
        if kind == "RNN":
            options["nonlinearity"] = accepted[0][0].lower()
        return options

    def _constant(self, what: str, name: str) -> Any:
        """The value of an input as an array, computed where it depends on constants alone."""
        helper = _need("onnx.helper", "load")
        nodes: dict[int, Any] = {}  # in the order in which they can run
        initializers: dict[str, Any] = {}

        def collect(value: str) -> None:
            source = self.sources.get(value)
            if source is None:
                raise ValueError(f"{what} must be constant, but {name!r} depends on {value!r}")
            if not hasattr(source, "op_type"):
                initializers[value] = source
            elif id(source) not in nodes:
                for each in filter(None, source.input):
                    collect(each)
                nodes[id(source)] = source

        collect(name)
        graph = helper.make_graph(
            list(nodes.values()),
            "constant",
            [],
            [helper.make_empty_tensor_value_info(name)],
            list(initializers.values()),
        )
        if not nodes:
            return _need("onnx.numpy_helper", "load").to_array(initializers[name])
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        return _need("onnx.reference", "load").ReferenceEvaluator(model).run([name], {})[0]


def _recurrent_nodes(model: Any, graph: Any, outer: ChainMap[str, Any]) -> Iterator[_Node]:
    """The recurrent nodes of a graph and of the graphs in its nodes, in order."""
    sources = outer.new_child({tensor.name: tensor for tensor in graph.initializer})
    for node in graph.node:
        sources.update((output, node) for output in node.output if output)
    for node in graph.node:
        if node.op_type in _GATES and node.domain in ("", "ai.onnx"):
            yield _Node(model, node, sources)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _recurrent_nodes(model, inner, sources)


def _ours(kind: str) -> list[int]:
    """Of our gates, the place in ONNX's order."""
    return [_GATES[kind].index(k) for k in range(len(_GATES[kind]))]

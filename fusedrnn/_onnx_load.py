"""ONNX's recurrent nodes to fused layers."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any, overload

import torch

from ._importing import as_tensor, expect_shape, make_layer, with_gates
from ._onnx import GATES, need
from .modules import FusedGRU, FusedLSTM, FusedRNN

__all__ = ["load"]

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
    onnx = need("onnx", "load")
    model = source if isinstance(source, onnx.ModelProto) else onnx.load(source)
    if model.functions:
        model = need("onnx.inliner", "load").inline_local_functions(model)
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
        G = len(GATES[kind])
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
        helper = need("onnx.helper", "load")
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
        helper = need("onnx.helper", "load")
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
            return need("onnx.numpy_helper", "load").to_array(initializers[name])
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        return need("onnx.reference", "load").ReferenceEvaluator(model).run([name], {})[0]


def _recurrent_nodes(model: Any, graph: Any, outer: ChainMap[str, Any]) -> Iterator[_Node]:
    """The recurrent nodes of a graph and of the graphs in its nodes, in order."""
    sources = outer.new_child({tensor.name: tensor for tensor in graph.initializer})
    for node in graph.node:
        sources.update((output, node) for output in node.output if output)
    for node in graph.node:
        if node.op_type in GATES and node.domain in ("", "ai.onnx"):
            yield _Node(model, node, sources)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _recurrent_nodes(model, inner, sources)


def _ours(kind: str) -> list[int]:
    """Of our gates, the place in ONNX's order."""
    return [GATES[kind].index(k) for k in range(len(GATES[kind]))]

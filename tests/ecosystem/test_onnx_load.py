"""Recurrent nodes of ONNX files, whoever wrote them, as our layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedrnn
import fusedrnn.onnx
from tests.helpers import randn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # type: ignore[attr-defined]

from tests.ecosystem.test_onnx import assert_close, run, session

T, N, I, H = 5, 3, 4, 6
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def value(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape or None)


def make_model(nodes: list[Any], weights: dict[str, Any], inputs: list[Any] | None = None) -> Any:
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("X", T, N, I)] if inputs is None else inputs,
        [value("Y")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def make_weights(operator: str, D: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    G = GATES[operator]
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H)}
    return {name: randn(*shape, dtype=dtype).numpy() / 2 for name, shape in shapes.items()}


def node(
    operator: str, name: str = "it", inputs: Any = ("X", "W", "R", "B"), **options: Any
) -> Any:
    options.setdefault("hidden_size", H)
    return helper.make_node(operator, inputs, ["Y"], name, **options)


def assert_node(model: Any, layer: Any, inputs: dict[str, Tensor] | None = None) -> None:
    """Compares a model of one node with its layer, in float64."""
    inputs = inputs or {}
    x = randn(T, N, I, dtype=torch.float32)
    (Y,) = run(session(model), [x, *inputs.values()])
    hx: Any = [inputs[name].double() for name in ("h0", "c0") if name in inputs] or None
    if hx is not None and layer.mode != "LSTM":
        hx = hx[0]
    lengths = inputs["lens"].long() if "lens" in inputs else None
    y = layer.double()(x.double(), hx, lengths=lengths)[0]
    D = 2 if layer.bidirectional else 1
    assert_close([Y], [y.unflatten(-1, (D, H)).transpose(1, 2)])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("operator", "options", "cell"),
    [
        ("LSTM", {}, "lstm"),
        ("LSTM", {"activations": ["sigmoid", "TANH", "Tanh"]}, "lstm"),
        ("GRU", {}, "gru_reset_before"),
        ("GRU", {"linear_before_reset": 1}, "gru"),
        ("RNN", {}, "rnn_tanh"),
        ("RNN", {"activations": ["Relu"]}, "rnn_relu"),
    ],
)
def test_loaded_nodes(
    operator: str, options: dict[str, Any], cell: str, bidirectional: bool, tmp_path: Path
) -> None:
    D = 2 if bidirectional else 1
    options = dict(options)
    if bidirectional:
        options["direction"] = "bidirectional"
        if "activations" in options:
            options["activations"] = options["activations"] * 2
    states = ["h0", "c0"] if operator == "LSTM" else ["h0"]
    inputs = {"lens": torch.tensor([5, 2, 4], dtype=torch.int32)}
    inputs |= {name: randn(D, N, H, dtype=torch.float32) for name in states}
    declared = [value("X", T, N, I), value("lens", N, kind=TensorProto.INT32)]
    declared += [value(name, D, N, H) for name in states]
    model = make_model(
        [node(operator, inputs=["X", "W", "R", "B", "lens", *states], **options)],
        make_weights(operator, D),
        declared,
    )
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    state = torch.get_rng_state()
    layer = fusedrnn.onnx.load(file, "it")
    assert torch.equal(torch.get_rng_state(), state)
    assert layer._cell() == cell
    assert all(w.requires_grad for w in layer.parameters())
    assert_node(model, layer, inputs)


def test_node_without_biases() -> None:
    weights = make_weights("GRU", 1)
    del weights["B"]
    model = make_model([node("GRU", inputs=["X", "W", "R"])], weights)
    layer = fusedrnn.onnx.load(model, "it")
    assert not layer.bias
    assert_node(model, layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_of_weights(dtype: torch.dtype) -> None:
    weights = make_weights("LSTM", 1)
    model = make_model([node("LSTM")], weights)
    kind = {
        torch.float64: TensorProto.DOUBLE,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
    }[dtype]
    for tensor in model.graph.initializer:
        tensor.CopyFrom(helper.make_tensor(tensor.name, kind, tensor.dims, weights[tensor.name]))
    layer = fusedrnn.onnx.load(model, "it")
    # The first gate of ONNX, i, is ours.
    expected = torch.from_numpy(weights["W"][0, :H]).to(dtype)
    torch.testing.assert_close(layer.weight_ih_l0[:H], expected)
    assert layer.weight_hh_l0.dtype == layer.bias_ih_l0.dtype == dtype


def test_names_of_nodes() -> None:
    weights = make_weights("RNN", 1)
    model = make_model([node("RNN", name) for name in ("", "a", "a")], weights)
    assert list(fusedrnn.onnx.load(model)) == ["RNN_0", "a", "RNN_2"]
    with pytest.raises(ValueError, match="name must be one of RNN_0, a, RNN_2, got 'b'"):
        fusedrnn.onnx.load(model, "b")


def test_weights_that_nodes_compute() -> None:
    weights = make_weights("LSTM", 1)
    computed = [
        helper.make_node("Constant", [], ["axis"], value_ints=[0]),
        helper.make_node("Squeeze", ["W", "axis"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "axis"], ["W2"]),
        helper.make_node("Add", ["B", "B"], ["B2"]),
    ]
    model = make_model([*computed, node("LSTM", inputs=["X", "W2", "R", "B2"])], weights)
    assert_node(model, fusedrnn.onnx.load(model, "it"))


def test_nodes_of_branches_and_functions() -> None:
    weights = make_weights("GRU", 1)
    branch = helper.make_graph([node("GRU", "inner")], "branch", [], [value("Y")])
    condition = helper.make_node("If", ["c"], ["Y"], then_branch=branch, else_branch=branch)
    weights["c"] = np.array(True)
    layers = fusedrnn.onnx.load(make_model([condition], weights))
    assert list(layers) == ["inner", "GRU_1"]

    model = make_model([helper.make_node("F", ["X", "W", "R", "B"], ["Y"], domain="own")], weights)
    opset = helper.make_opsetid("", 20)
    function = helper.make_function("own", "F", list("XWRB"), ["Y"], [node("GRU")], [opset])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    (layer,) = fusedrnn.onnx.load(model).values()
    assert torch.equal(layer.weight_ih_l0, layers["inner"].weight_ih_l0)
    assert_node(model, layer)


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("silero_vad_16k_sequence.onnx", 1),
        ("silero_vad_16k_op15.onnx", 2),
        ("silero_vad.onnx", 4),  # in the branches of an If, which differ in the sample rate
        ("silero_vad_openvino_16k.onnx", 1),  # in a local function
    ],
)
def test_published_files(file: str, count: int) -> None:
    """Files of two exporters that the package silero-vad ships, with one network's LSTM in them."""
    spec = importlib.util.find_spec("silero_vad")  # not imported: it sets torch's threads
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("silero_vad is not installed")
    data = Path(spec.submodule_search_locations[0]) / "data"
    published = torch.jit.load(str(data / "silero_vad.jit")).state_dict()
    layers = fusedrnn.onnx.load(data / file)
    assert len(layers) == count
    expected = {
        rate: published[f"{model}.decoder.rnn.weight_hh"]
        for rate, model in (("16k", "_model"), ("8k", "_model_8k"))
    }
    for layer in layers.values():
        assert any(torch.equal(layer.weight_hh_l0, weight) for weight in expected.values())
    if "16k" in file:
        assert torch.equal(layer.weight_hh_l0, expected["16k"])


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        ("LSTM", {"clip": 0.5}, "clip must be absent or 0, got 0.5"),
        ("LSTM", {"input_forget": 1}, "input_forget must be absent or 0, got 1"),
        ("GRU", {"layout": 2}, "layout must be 0 or 1, got 2"),
        (
            "RNN",
            {"direction": "reverse"},
            "direction must be .*, got reverse",
        ),
        ("RNN", {"activations": ["Affine"]}, r"\['Tanh'\] or \['Relu'\], got \['Affine'\]"),
        (
            "LSTM",
            {"activations": ["HardSigmoid", "Tanh", "Tanh"]},
            r"activations must be \['Sigmoid', 'Tanh', 'Tanh'\], got \['HardSigmoid'",
        ),
        ("GRU", {"hidden_size": 7}, "hidden_size must be the H of W, 6, got 7"),
        ("GRU", {"direction": "bidirectional"}, r"W must be .* = \[2, 18, 4\], got \[1, 18, 4\]"),
        (
            "LSTM",
            {"inputs": ["X", "W", "R", "B", "", "", "", "W"]},
            "the input P must be absent: peepholes",
        ),
        (
            "LSTM",
            {"inputs": ["X", "X", "R"]},
            "W must be constant, but 'X' is an input of the graph 'graph'",
        ),
        ("LSTM", {"inputs": ["X", "W", "W"]}, r"R must be \[D, 4\*H, H\] = \[1, 24, 6\]"),
    ],
)
def test_nodes_that_cannot_be_loaded(operator: str, options: Any, message: str) -> None:
    model = make_model([node(operator, **options)], make_weights(operator, 1))
    with pytest.raises(ValueError, match=rf"node 'it' \({operator}\): .*{message}"):
        fusedrnn.onnx.load(model, "it")


def test_a_model_without_recurrent_nodes() -> None:
    model = make_model([helper.make_node("Relu", ["X"], ["Y"])], {})
    with pytest.raises(ValueError, match="the model has no LSTM, GRU or RNN node"):
        fusedrnn.onnx.load(model)

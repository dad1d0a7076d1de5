"""Loading the recurrent nodes of ONNX files, from any exporter, as our layers."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedrnn
import fusedrnn.onnx
from tests.kit.layers import randn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # type: ignore[attr-defined]
from onnx.reference import ReferenceEvaluator

from tests.ecosystem.onnx_models import (
    H,
    I,
    N,
    T,
    assert_close,
    assert_node,
    make_model,
    make_weights,
    node,
    run,
    session,
    state,
    value,
    with_states,
)

pytestmark = [
    # Warnings of torch's exporters and of the packages that they use.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1"),
]


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


@pytest.mark.parametrize("D", [1, 2])
def test_peepholes(D: int) -> None:
    weights = make_weights("LSTM", D)
    weights["P"] = randn(D, 3 * H, dtype=torch.float32).numpy()
    direction = "bidirectional" if D == 2 else "forward"
    inputs = ["X", "W", "R", "B", "", "", "", "P"]
    model = make_model([node("LSTM", inputs=inputs, direction=direction)], weights)
    layer = fusedrnn.onnx.load(model, "it")
    assert layer._cell() == "lstm_peephole"
    assert_node(model, layer)


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
    # The first gate is i in ONNX's order and in ours.
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
        ("silero_vad.onnx", 4),  # the nodes are in the branches of an If, by sample rate
        ("silero_vad_openvino_16k.onnx", 1),  # the node is in a local function
    ],
)
def test_published_files(file: str, count: int) -> None:
    """Files of the package silero-vad, from two exporters, hold the LSTM of one network."""
    spec = importlib.util.find_spec("silero_vad")  # an import would set torch's number of threads
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
            r"P must be \[D, 3\*H\] = \[1, 18\], got \[1, 24, 4\]",
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


# --- layout = 1, and states and lengths that a file holds ----------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_layout_1_is_batch_first(operator: str, bidirectional: bool) -> None:
    """The reference is the same node with layout = 0: ONNX Runtime does not support layout = 1."""
    D = 2 if bidirectional else 1
    options = {"direction": "bidirectional"} if bidirectional else {}
    outputs = ["Y", "Y_h", "Y_c"][: 3 if operator == "LSTM" else 2]
    weights = make_weights(operator, D)
    model = make_model([node(operator, layout=1, **options)], weights)
    layer = fusedrnn.onnx.load(model, "it")
    assert layer.batch_first

    other = make_model([node(operator, **options)], weights)
    other.graph.node[0].output[:] = outputs
    del other.graph.output[:]
    other.graph.output.extend(value(name) for name in outputs)
    x = randn(N, T, I, dtype=torch.float32)
    Y, *last = run(session(other), [x.transpose(0, 1).contiguous()])
    y, states = layer.double()(x.double())
    assert_close([Y.permute(2, 0, 1, 3)], [y.unflatten(-1, (D, H))])  # [N, T, D, H]
    states = states if operator == "LSTM" else (states,)
    assert_close(
        [s.transpose(0, 1) for s in last],
        [s.transpose(0, 1) for s in states],  # [N, D, H]
    )


def test_layout_1_in_the_evaluator_of_onnx() -> None:
    """onnx's evaluator supports layout = 1 for one step in one direction."""
    model = make_model([node("LSTM", layout=1)], make_weights("LSTM", 1), [value("X", N, 1, I)])
    x = randn(N, 1, I, dtype=torch.float32)
    (Y,) = ReferenceEvaluator(model).run(None, {"X": x.numpy()})
    y, _ = fusedrnn.onnx.load(model, "it").double()(x.double())
    assert_close([torch.from_numpy(Y)], [y.unflatten(-1, (1, H))])


REMARK = r"node 'it' \(.*\): the file holds {}\. .* passes \*\*fusedrnn\.onnx\.constants\(layer\)"


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("operator", ["LSTM", "GRU"])
def test_stored_states(operator: str, D: int) -> None:
    states = {"h": state(D, N, H), "c": state(D, N, H)}
    if operator == "GRU":
        del states["c"]
    lens = np.array([5, 0, 3], np.int32)
    model = with_states(operator, D, lens=lens, **states)
    names = " and ".join(f"initial_{k}" for k in states) + " and sequence_lens"
    with pytest.warns(UserWarning, match=REMARK.format(names)):
        layer = fusedrnn.onnx.load(model, "it")
    with pytest.warns(UserWarning, match=REMARK.format(names)):
        assert list(fusedrnn.onnx.load(model)) == ["it"]
    assert set(layer.state_dict()) == set(type(layer)(I, H, bidirectional=D == 2).state_dict())
    x = randn(T, N, I, dtype=torch.float32)
    (Y,) = run(session(model), [x])
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        each.double()
        y, _ = each(x.double(), **fusedrnn.onnx.constants(each))
        assert_close([Y], [y.unflatten(-1, (D, H)).transpose(1, 2)])
    assert fusedrnn.onnx.constants(layer)["lengths"].tolist() == [5, 0, 3]


def test_stored_states_with_layout_1() -> None:
    h = state(N, 2, H)
    with pytest.warns(UserWarning, match=REMARK.format("initial_h")):
        layer = fusedrnn.onnx.load(with_states("GRU", 2, layout=1, h=h), "it")
    hx = fusedrnn.onnx.constants(layer)["hx"]
    assert torch.equal(hx, torch.from_numpy(h).transpose(0, 1))
    layer(torch.randn(N, T, I), hx)


def test_one_stored_state_of_two() -> None:
    for name, k in (("h", 0), ("c", 1)):
        stored = state(1, N, H)
        with pytest.warns(UserWarning, match=REMARK.format(f"initial_{name}")):
            layer = fusedrnn.onnx.load(with_states("LSTM", **{name: stored}), "it")
        hx = fusedrnn.onnx.constants(layer)["hx"]
        assert np.array_equal(hx[k], stored)
        assert not hx[1 - k].any()
        layer(torch.randn(T, N, I), hx)
    # Here the other state is an input of the graph. The caller must provide it; the layer raises an
    # error otherwise.
    model = with_states("LSTM", h=state(1, N, H), c=state(1, N, H))
    del model.graph.initializer[-1]
    model.graph.input.append(value("c", 1, N, H))
    with pytest.warns(UserWarning, match=REMARK.format("initial_h")):
        layer = fusedrnn.onnx.load(model, "it")
    h, c = fusedrnn.onnx.constants(layer)["hx"]
    assert c is None
    with pytest.raises(AttributeError, match="NoneType"):
        layer(torch.randn(T, N, I), (h, c))


def test_stored_zeros_are_no_states() -> None:
    zeros = {"h": np.zeros((1, N, H), np.float32), "c": -np.zeros((1, N, H), np.float32)}
    layer = fusedrnn.onnx.load(with_states("LSTM", **zeros), "it")
    assert fusedrnn.onnx.constants(layer) == fusedrnn.onnx.constants(layer, 7) == {}
    assert fusedrnn.onnx.constants(fusedrnn.FusedGRU(2, 3)) == {}


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"h": state(1, N, H + 1)}, r"initial_h must be \[1, N, 6\], got \[1, 3, 7\]\. .*, as hx"),
        ({"h": state(1, 1, 1)}, r"initial_h must be \[1, N, 6\], got \[1, 1, 1\]\. It is yours"),
        ({"c": state(1, N, H).astype("f8")}, "initial_c must be float32 as W is, got float64"),
        ({"h": np.zeros((1, N, H), np.int64)}, "initial_h must be float32 as W is, got int64"),
        (
            {"lens": np.ones(N, np.float32)},
            r"\[N\] of int32, got \[3\] of float32. .*lengths=",
        ),
        (
            {"lens": np.ones((N, 1), np.int32)},
            r"lens must be \[N\] of int32, got \[3, 1\]",
        ),
    ],
)
def test_states_that_cannot_be_kept(states: Any, message: str) -> None:
    """The weights are loaded nevertheless, and a warning names the states."""
    with pytest.warns(UserWarning, match=message):
        layer = fusedrnn.onnx.load(with_states("LSTM", **states), "it")
    assert fusedrnn.onnx.constants(layer) == {}


def test_states_that_other_operators_compute() -> None:
    model = with_states("GRU", h=state(1, N, H))
    model.graph.initializer[-1].name = "h0"
    model.graph.node.insert(0, helper.make_node("Softsign", ["h0"], ["h"], "bend"))
    with pytest.warns(UserWarning, match=r"initial_h is prepared by the node 'bend' \(Softsign\)"):
        fusedrnn.onnx.load(model, "it")
    model.graph.node[0].op_type = "Mul"
    model.graph.node[0].input.append("two")
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    with pytest.warns(UserWarning, match=REMARK.format("initial_h")):
        layer = fusedrnn.onnx.load(model, "it")
    h0 = numpy_helper.to_array(model.graph.initializer[3])
    assert np.array_equal(fusedrnn.onnx.constants(layer)["hx"], 2 * h0)
    # The caller must provide a state that depends on an input of the graph, as documented.
    model.graph.node[0].input[1] = "X"
    assert fusedrnn.onnx.constants(fusedrnn.onnx.load(model, "it")) == {}


class Learned(nn.Module):
    """torch.nn's GRU with a learned initial state, the same one for all sequences."""

    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(I, H, 2)
        self.h0 = nn.Parameter(torch.randn(2, 1, H))
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[1]
        h0 = self.h0.repeat(1, rows, 1) if self.repeat else self.h0.expand(-1, rows, -1)
        result: Tensor = self.rnn(x, h0)[0]
        return result


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
def test_learned_states(dynamo: bool, repeat: bool) -> None:
    torch.manual_seed(0)
    model = Learned(repeat).eval()
    x, file = torch.randn(T, N, I), io.BytesIO()
    if dynamo:
        dynamic: Any = {"dynamic_shapes": ({1: torch.export.Dim("N", min=2)},)}
        if not repeat:
            dynamic = {}  # torch 2.13 cannot export this model with a dynamic N
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, **dynamic)
        assert program is not None
        proto = program.model_proto
    else:
        axes = {"x": {1: "N"}}
        torch.onnx.export(
            model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=17
        )
        proto = onnx.load_from_string(file.getvalue())
    with pytest.warns(UserWarning, match="the file holds initial_h"):
        stack = list(fusedrnn.onnx.load(proto).values())
    assert len(stack) == 2
    y = x
    for layer in stack:
        y, _ = layer(y, **fusedrnn.onnx.constants(layer, N))
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
    if not dynamo or repeat:
        (h0,) = fusedrnn.onnx.constants(stack[0]).values()
        assert torch.equal(h0, model.h0[:1])
    else:
        with pytest.raises(ValueError, match="N must be 3, as in the initial state, got 8"):
            fusedrnn.onnx.constants(stack[0], 8)


@pytest.mark.parametrize("dynamo", [False, True])
def test_states_that_torch_fills_with_zeros(dynamo: bool) -> None:
    file = io.BytesIO()
    model, x = nn.LSTM(I, H, 2).eval(), torch.randn(T, N, I)
    torch.onnx.export(model, (x,), file, dynamo=dynamo)
    for layer in fusedrnn.onnx.load(onnx.load_from_string(file.getvalue())).values():
        assert fusedrnn.onnx.constants(layer) == {}

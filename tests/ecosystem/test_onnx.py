"""Export to ONNX, run by ONNX Runtime; recurrent nodes, whoever wrote them, as our layers."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
import fusedrnn.onnx
from tests.helpers import CELLS, Cell, error, flat, make_states, ragged, randn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # type: ignore[attr-defined]

pytestmark = [
    # torch's exporter and what it stands on.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore:fusedrnn.onnx.export. T or N is dynamic"),
]

EXPORTED = [cell for cell in CELLS if not cell.projects]
OPERATORS = {"lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}
# ONNX Runtime computes float32 by approximations of its own; the reference is float64.
LIMIT = 2e-6


class Call(nn.Module):
    """A layer with its states and lengths as inputs of a graph, where it has them."""

    def __init__(self, layer: Any, states: int, lengths: bool) -> None:
        super().__init__()
        self.rnn, self.states, self.lengths = layer, states, lengths

    def forward(self, x: Tensor, *rest: Tensor) -> list[Tensor]:
        hx: Any = rest[: self.states] or None
        if self.states == 1:
            hx = rest[0]
        lengths = rest[-1] if self.lengths else None
        return flat(self.rnn(x, hx, lengths=lengths))


def session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: list[Tensor]) -> list[Tensor]:
    names = [value.name for value in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def assert_close(actual: list[Tensor], expected: Any, limit: float = LIMIT) -> None:
    errors = [error(a, e) for a, e in zip(actual, flat(expected), strict=True)]
    assert max(errors) <= limit, errors


def inputs_of(layer: Any, T: int, N: int, states: bool, lengths: bool) -> list[Tensor]:
    """Float32 inputs of `Call`; row 0 has all steps, row 1 none."""
    shape = (N, T) if layer.batch_first else (T, N)
    result = [randn(*shape, layer.input_size, dtype=torch.float32)]
    if states:
        result += flat(make_states(layer, N, torch.float32))
    if lengths:
        result.append(torch.tensor([T, 0, *range(1, N - 1)]))
    return result


FORMS = {
    "plain": ({"bias": False}, False, False),
    "everything": ({"num_layers": 2, "bidirectional": True, "batch_first": True}, True, True),
    "states": ({"bidirectional": True, "bias": False}, True, False),
    "lengths": ({"num_layers": 2}, False, True),
}


# What gru and rnn_relu would repeat of gru_reset_before and rnn_tanh: only an attribute differs.
REPEATED = {(cell, form) for cell in ("gru", "rnn_relu") for form in ("states", "lengths")}
CASES = [(cell, form) for cell in EXPORTED for form in FORMS if (cell.name, form) not in REPEATED]


@pytest.mark.parametrize(("cell", "form"), CASES, ids=str)
def test_exported_layers(cell: Cell, form: str, tmp_path: Path) -> None:
    options, states, lengths = FORMS[form]
    layer, _ = cell.make(3, 5, dtype=torch.float32, **options)
    N, T = (0, 1) if layer.batch_first else (1, 0)
    count = (2 if cell.has_c else 1) if states else 0
    dynamic: list[Any] = [{N: "N", T: "T"}, *[{1: "N"}] * count, *[{0: "N"}] * lengths]
    file = tmp_path / "model.onnx"
    program = fusedrnn.onnx.export(
        Call(layer, count, lengths).eval(),
        tuple(inputs_of(layer, 6, 4, states, lengths)),
        file,
        dynamic_shapes=(dynamic[0], *([tuple(dynamic[1:])] if dynamic[1:] else [])),
    )
    assert program is not None
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)

    # One node a layer, weights ready for it, and the same layer when it is read back.
    operator = OPERATORS.get(cell.name, "RNN")
    nodes = {node.name: node for node in model.graph.node if node.op_type == operator}
    assert list(nodes) == [f"rnn_l{k}" for k in range(layer.num_layers)]
    stored = {tensor.name for tensor in model.graph.initializer}
    assert all(set(filter(None, node.input[1:4])) <= stored for node in nodes.values())
    for k, (name, again) in enumerate(fusedrnn.onnx.load(file).items()):
        assert name == f"rnn_l{k}"
        assert type(again) is type(layer)
        assert again._cell() == layer._cell()
        for key, weight in again.state_dict().items():
            assert torch.equal(weight, getattr(layer, key.replace("_l0", f"_l{k}"))), key

    reference = Call(layer.double(), count, lengths)
    runtime = session(file)
    for steps, rows in ((6, 4), (11, 3), (1, 2)):
        inputs = inputs_of(layer, steps, rows, states, lengths)
        expected = reference(*(t.double() if t.is_floating_point() else t for t in inputs))
        assert_close(run(runtime, inputs), expected)


def test_lengths_out_of_range_are_found_by_onnx_runtime() -> None:
    layer = fusedrnn.FusedGRU(3, 5)
    inputs = [torch.randn(4, 2, 3), torch.tensor([4, 2])]
    program = fusedrnn.onnx.export(Call(layer, 0, True).eval(), tuple(inputs))
    with pytest.raises(Exception, match="sequence_lens"):
        run(session(program.model_proto), [inputs[0], torch.tensor([5, 2])])


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.encoder = fusedrnn.FusedGRU(4, 6, bidirectional=True, reset_after=False)
        self.decoder = fusedrnn.FusedLSTM(12, 5, num_layers=2, dropout=0.5)
        self.cell = fusedrnn.FusedRNNCell(5, 3, nonlinearity="relu")

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.encoder(self.embedding(ids))
        y, _ = self.decoder(y)
        result: Tensor = self.cell(y[-1])
        return result


@pytest.mark.parametrize("direct", [False, True])
def test_a_model_of_several_layers(direct: bool) -> None:
    model = Tagger().eval()
    ids = torch.randint(20, (7, 3))
    dynamic = ({0: "T", 1: "N"},)
    if direct:
        program = torch.onnx.export(
            model,
            (ids,),
            custom_translation_table=fusedrnn.onnx.translations(),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    else:
        program = fusedrnn.onnx.export(model, (ids,), dynamic_shapes=dynamic)
    assert program is not None
    proto = program.model_proto
    kinds = [node.op_type for node in proto.graph.node if node.op_type in ("LSTM", "GRU", "RNN")]
    assert kinds == ["GRU", "LSTM", "LSTM", "RNN"]
    layers = fusedrnn.onnx.load(proto)
    if not direct:
        assert list(layers) == ["encoder_l0", "decoder_l0", "decoder_l1", "cell_l0"]
    # Weights that are left to nodes are computed.
    assert torch.equal(next(iter(layers.values())).weight_hh_l0, model.encoder.weight_hh_l0)
    ids = torch.randint(20, (9, 2))
    expected = model.double()(ids)
    assert_close(run(session(proto), [ids]), [expected])


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"proj_size": 2}, torch.float32, "proj_size must be 0: ONNX's LSTM has no projection"),
        ({}, torch.bfloat16, r"bfloat16 has no form .* before opset 22: give opset_version=22 or"),
    ],
)
def test_what_has_no_form(options: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    layer = fusedrnn.FusedLSTM(3, 5, dtype=dtype, **options).eval()
    with pytest.raises(NotImplementedError, match=message):
        fusedrnn.onnx.export(layer, (torch.randn(4, 2, 3, dtype=dtype),))


def test_packed_sequences_have_no_form() -> None:
    layer = fusedrnn.FusedLSTM(3, 5).eval()
    packed = pack_sequence(ragged([4, 2], 3, torch.float32))
    with pytest.raises(NotImplementedError, match="padded batch and lengths="):
        fusedrnn.onnx.export(layer, (packed,))


def test_what_torch_cannot_export_is_torchs_error() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.ops.fusedrnn._step(
                x, None, None, [x, x], 1, 1, "rnn_tanh", False
            )
            return result

    with pytest.raises(torch.onnx.OnnxExporterError):
        fusedrnn.onnx.export(Unknown().eval(), (torch.randn(1, 1),))


@pytest.mark.parametrize("opset", [14, 17, 26])
def test_opsets_that_torch_does_not_write_itself(opset: int) -> None:
    model = Tagger().eval()
    program = fusedrnn.onnx.export(
        model, (torch.randint(20, (7, 3)),), dynamic_shapes=({0: "T"},), opset_version=opset
    )
    proto = program.model_proto
    assert [o.version for o in proto.opset_import if o.domain == ""] == [opset]
    onnx.checker.check_model(proto, full_check=True)
    layers = fusedrnn.onnx.load(proto)
    assert list(layers) == ["encoder_l0", "decoder_l0", "decoder_l1", "cell_l0"]
    assert torch.equal(layers["decoder_l1"].weight_hh_l0, model.decoder.weight_hh_l1)
    ids = torch.randint(20, (9, 3))
    assert_close(run(session(proto), [ids]), [model.double()(ids)])


@pytest.mark.parametrize(
    ("opset", "message"),
    [
        (9, r"got 9: onnx's version converter cannot go there from 18 \(No Adapter"),
        (99, r"got 99: onnx's version converter cannot go there from 25 \(.*invalid version"),
        ("17", "None or a positive int, got '17'"),
        (0, "None or a positive int, got 0"),
    ],
)
def test_opsets_that_cannot_be_written(
    opset: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = fusedrnn.FusedLSTM(3, 5).eval()
    with pytest.raises(ValueError, match=f"opset_version must be .*{message}"):
        fusedrnn.onnx.export(layer, (torch.randn(4, 2, 3),), opset_version=opset)
    assert "onnxscript.version_converter" not in {record.name for record in caplog.records}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamo": False}, r"dynamo must be True: .* fusedrnn\.to_torch\(model\)"),
        ({"f": "model.onnx"}, "f must not be given: the argument for the path is file"),
        ({"custom_opsets": {"own": 1}}, "custom_opsets must be left at None: .* got {'own': 1}"),
        ({"do_constant_folding": False}, "do_constant_folding must be left at True"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], message: str) -> None:
    layer = fusedrnn.FusedLSTM(3, 5).eval()
    with pytest.raises(ValueError, match=message):
        fusedrnn.onnx.export(layer, (torch.randn(4, 2, 3),), **options)


def test_options_of_what_is_stored(tmp_path: Path) -> None:
    layer, file = fusedrnn.FusedGRU(3, 5).eval(), tmp_path / "model.onnx"
    same_as_default: dict[str, Any] = {"dynamo": True, "do_constant_folding": True}
    for options, inputs, stored in (
        ({"keep_initializers_as_inputs": True}, 4, 3),
        ({"export_params": False}, 1, 0),
    ):
        fusedrnn.onnx.export(layer, (torch.randn(4, 2, 3),), file, **options, **same_as_default)
        graph = onnx.load(file).graph
        weights = {f"model_l0.{letter}" for letter in "WRB"}
        assert len(weights & {value.name for value in graph.input}) == inputs - 1
        assert len(weights & {tensor.name for tensor in graph.initializer}) == stored


class Blocks(nn.Module):
    """Layers that run in blocks which torch.export makes graphs of their own."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block = block
        self.part = nn.ModuleDict({"encoder": fusedrnn.FusedLSTM(3, 4)})
        self.decoder = nn.utils.parametrizations.weight_norm(
            fusedrnn.FusedGRU(4, 3, num_layers=2), "weight_ih_l1"
        )
        self.cell = fusedrnn.FusedGRUCell(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor
        if self.block == "autocast":
            with torch.autocast("cpu", dtype=torch.float16):
                y, _ = self.part["encoder"](x)
                y, _ = self.decoder(y)
                return self.cell(y[-1])
        if self.block == "no_grad":
            with torch.no_grad():
                y, _ = self.part["encoder"](x)
                y, _ = self.decoder(y)
            return self.cell(y[-1])
        y, _ = self.part["encoder"](x)
        result = torch.cond(
            y.sum() > 0, lambda y: self.decoder(y)[0], lambda y: self.decoder(2 * y)[0], (y,)
        )
        return self.cell(result[-1])


@pytest.mark.parametrize("block", ["autocast", "no_grad", "cond"])
def test_names_of_layers_that_run_in_blocks(block: str) -> None:
    program = fusedrnn.onnx.export(Blocks(block).eval(), (torch.randn(4, 2, 3),))
    onnx.checker.check_model(program.model_proto, full_check=True)
    recurrent = ("LSTM", "GRU")
    names = [node.name for node in program.model.graph.all_nodes() if node.op_type in recurrent]
    expected = ["part.encoder_l0", "decoder_l0", "decoder_l1"]
    if block == "cond":
        expected += ["decoder_l0_2", "decoder_l1_2"]  # of the other branch
    assert names == [*expected, "cell_l0"]


def test_bfloat16_from_opset_22_on() -> None:
    for layer in (fusedrnn.FusedLSTM(3, 5, bidirectional=True), fusedrnn.FusedRNN(3, 5)):
        layer = layer.bfloat16().eval()
        x = torch.randn(4, 2, 3, dtype=torch.bfloat16)
        program = fusedrnn.onnx.export(layer, (x,), opset_version=22)
        onnx.checker.check_model(program.model_proto, full_check=True)
        again = fusedrnn.onnx.load(program.model_proto, "model_l0")
        for name, weight in again.state_dict().items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, layer.state_dict()[name])
    table = fusedrnn.onnx.translations(opset_version=22)
    direct = torch.onnx.export(
        layer, (x,), custom_translation_table=table, opset_version=22, verbose=False
    )
    assert direct is not None
    onnx.checker.check_model(direct.model_proto, full_check=True)


@pytest.mark.filterwarnings("default:fusedrnn.onnx.export. T or N is dynamic")
def test_lengths_with_a_dynamic_size_are_warned_of() -> None:
    layer = fusedrnn.FusedGRU(3, 5, num_layers=2)
    inputs = (torch.randn(4, 2, 3), torch.tensor([4, 2]))
    message = "T or N is dynamic in rnn_l0, rnn_l1, where lengths= .* OpenVINO 2026.4.1 ignores"
    for of_x, of_lengths in (({0: "T"}, {}), ({1: "N"}, {0: "N"})):
        with pytest.warns(UserWarning, match=message) as warned:
            fusedrnn.onnx.export(
                Call(layer, 0, True).eval(), inputs, dynamic_shapes=(of_x, (of_lengths,))
            )
        ours = [w for w in warned if "fusedrnn.onnx.export" in str(w.message)]
        assert [w.filename for w in ours] == [__file__]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fusedrnn.onnx.export(Call(layer, 0, True).eval(), inputs)
        fusedrnn.onnx.export(
            Call(layer, 0, False).eval(), inputs[:1], dynamic_shapes=({0: "T", 1: "N"},)
        )
    assert not [w for w in caught if "fusedrnn" in str(w.message)]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f"needs the package {package}, which is not installed: pip install {package}"
    with pytest.raises(ModuleNotFoundError, match=message):
        fusedrnn.onnx.export(fusedrnn.FusedGRU(1, 1), (torch.randn(1, 1, 1),))
    if package == "onnx":
        with pytest.raises(ModuleNotFoundError, match=f"fusedrnn.onnx.load {message}"):
            fusedrnn.onnx.load("model.onnx")


# --- Nodes of others -----------------------------------------------------------------------------

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
        ("GRU", {"layout": 1}, "layout must be absent or 0, got 1"),
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
        ("LSTM", {"inputs": ["X", "X", "R"]}, "W must be constant, but 'X' depends on 'X'"),
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

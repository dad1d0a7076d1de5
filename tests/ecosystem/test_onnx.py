"""Export to ONNX. The files are run by ONNX Runtime."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
import fusedrnn.onnx
from fusedrnn import _onnx_export
from tests.kit.layers import CELLS, Cell, flat, make_states, ragged, randn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from tests.ecosystem.onnx_models import assert_close, run, session

pytestmark = [
    # Warnings of torch's exporter and of the packages that it uses.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore:fusedrnn.onnx.export. T or N is dynamic"),
]

EXPORTED = [cell for cell in CELLS if not cell.projects]
OPERATORS = {"lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU", "lstm_peephole": "LSTM"}


class Call(nn.Module):
    """A layer whose states and lengths, if there are any, are inputs of the graph."""

    def __init__(self, layer: Any, states: int, lengths: bool) -> None:
        super().__init__()
        self.rnn, self.states, self.lengths = layer, states, lengths

    def forward(self, x: Tensor, *rest: Tensor) -> list[Tensor]:
        hx: Any = rest[: self.states] or None
        if self.states == 1:
            hx = rest[0]
        lengths = rest[-1] if self.lengths else None
        return flat(self.rnn(x, hx, lengths=lengths))


def inputs_of(layer: Any, T: int, N: int, states: bool, lengths: bool) -> list[Tensor]:
    """Float32 inputs of `Call`. The first sequence has all steps, the second one has none."""
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


# gru and rnn_relu differ from gru_reset_before and rnn_tanh by one attribute, so these forms would
# test the same again.
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

    # There is one node for each layer, its weights are stored in ONNX's layout, and load returns
    # the same layer.
    operator = OPERATORS.get(cell.name, "RNN")
    nodes = {node.name: node for node in model.graph.node if node.op_type == operator}
    assert list(nodes) == [f"rnn_l{k}" for k in range(layer.num_layers)]
    stored = {tensor.name for tensor in model.graph.initializer}
    weights = {
        name for node in nodes.values() for name in (*node.input[1:4], *node.input[7:]) if name
    }
    assert weights <= stored
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
    # load computes the weights that nodes of the file prepare.
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
def test_layers_that_onnx_cannot_represent(
    options: dict[str, Any], dtype: torch.dtype, message: str
) -> None:
    layer = fusedrnn.FusedLSTM(3, 5, dtype=dtype, **options).eval()
    with pytest.raises(NotImplementedError, match=message):
        fusedrnn.onnx.export(layer, (torch.randn(4, 2, 3, dtype=dtype),))


def test_a_cell_that_onnx_lacks_has_no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_onnx_export._OPERATORS, "gru")
    with pytest.raises(NotImplementedError, match="the cell gru has no form in ONNX"):
        fusedrnn.onnx.export(fusedrnn.FusedGRU(3, 5).eval(), (torch.randn(4, 2, 3),))


def test_packed_sequences_have_no_form() -> None:
    layer = fusedrnn.FusedLSTM(3, 5).eval()
    packed = pack_sequence(ragged([4, 2], 3, torch.float32))
    with pytest.raises(NotImplementedError, match="padded batch and lengths="):
        fusedrnn.onnx.export(layer, (packed,))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"starts": torch.zeros(4, 2, dtype=torch.bool)}, "starts= has no form in ONNX"),
        ({"return_states": True}, "return_states=True has no form in ONNX for an LSTM"),
    ],
)
def test_beginnings_and_states_of_steps_have_no_form(how: dict[str, Any], message: str) -> None:
    layer = fusedrnn.FusedLSTM(3, 5).eval()
    with pytest.raises(NotImplementedError, match=message):
        fusedrnn.onnx.export(layer, (torch.randn(4, 2, 3),), kwargs=how)


def test_an_op_without_a_translation_raises_the_error_of_torch() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.ops.fusedrnn._step(
                x, None, None, [x, x], 1, 1, "rnn_tanh", False
            )
            return result

    with pytest.raises(torch.onnx.OnnxExporterError):
        fusedrnn.onnx.export(Unknown().eval(), (torch.randn(1, 1),))


@pytest.mark.parametrize("opset", [14, 17])
def test_a_stack_with_states_in_opsets_before_18(opset: int) -> None:
    """onnx's converter has no way from Split of opset 18 to an earlier one."""
    layer = fusedrnn.FusedLSTM(3, 4, 2, bidirectional=True).eval()
    x, hx = torch.randn(5, 2, 3), (torch.randn(4, 2, 4), torch.randn(4, 2, 4))
    proto = fusedrnn.onnx.export(layer, (x, hx), opset_version=opset).model_proto
    y, (h_n, c_n) = layer.double()(x.double(), tuple(state.double() for state in hx))
    assert_close(run(session(proto), [x, *hx]), [y, h_n, c_n])


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


def test_options_about_stored_weights(tmp_path: Path) -> None:
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
    """Layers that run in blocks; torch.export makes a separate graph of each block."""

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
        expected += ["decoder_l0_2", "decoder_l1_2"]  # the nodes of the other branch
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
def test_export_warns_of_lengths_with_a_dynamic_size() -> None:
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


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx is not installed, and a folder named onnx, perhaps with model files, is on the path."""
    (tmp_path / "onnx").mkdir()
    monkeypatch.delitem(sys.modules, "onnx")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match=r"fusedrnn.onnx.load needs the package onnx, "):
        fusedrnn.onnx.load("onnx/model.onnx")

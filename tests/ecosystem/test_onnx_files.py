"""ONNX files that are broken or unusual, or whose tensors are stored in other files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fusedrnn.onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx import AttributeProto, helper  # type: ignore[attr-defined]

from tests.ecosystem.onnx_models import (
    SIZE,
    W_of,
    assert_node,
    call,
    external,
    make_model,
    make_weights,
    node,
    with_functions,
)

make = helper.make_node


def lstm_file() -> bytes:
    data: bytes = make_model([node("LSTM")], make_weights("LSTM", 1)).SerializeToString()
    return data


def test_files_that_are_no_models(tmp_path: Path) -> None:
    whole = lstm_file()
    wrong = {
        "nothing": b"",
        "text": b"the model is on another server\n",
        "zip": b"PK\x03\x04" + bytes(100),
        "half": whole[: len(whole) // 2],
        "one byte less": whole[:-1],
        "numbers": bytes(range(256)),
    }
    for name, data in wrong.items():
        file = tmp_path / f"{name}.onnx"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"'.*{name}.onnx' is not an ONNX model: "):
            fusedrnn.onnx.load(file)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model.json' is not an ONNX model: ParseError"):
        fusedrnn.onnx.load(str(tmp_path / "model.json"))


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        fusedrnn.onnx.load(tmp_path / "none.onnx")
    with pytest.raises(IsADirectoryError):
        fusedrnn.onnx.load(tmp_path)
    with pytest.raises(ValueError, match="null"):
        fusedrnn.onnx.load("a\0b.onnx")
    with pytest.raises(TypeError, match=r"source must be a path or an onnx\.ModelProto, got int"):
        fusedrnn.onnx.load(5)
    (tmp_path / "model.onnx").write_bytes(lstm_file())
    with open(tmp_path / "model.onnx", "rb") as file:
        assert list(fusedrnn.onnx.load(file)) == ["it"]


def test_the_text_form_is_left_to_onnx() -> None:
    """load refuses the text form, because onnx's parser crashes on deeply nested files."""
    with pytest.raises(ValueError, match=r"text form: give load onnx\.load\('model\.onnxtxt'\)"):
        fusedrnn.onnx.load("model.onnxtxt")


def test_names_that_are_not_utf_8() -> None:
    """Such names are bytes in onnx; they still identify nodes and tensors."""
    data = lstm_file().replace(b"it", b"\xff\xfe").replace(b"\x01W", b"\x01\xfd")
    (name,) = fusedrnn.onnx.load(onnx.ModelProto.FromString(data))
    assert name == "\ufffd\ufffd"
    broken = onnx.ModelProto.FromString(data)
    del broken.graph.initializer[0]
    with pytest.raises(ValueError, match="W must be constant, but '\ufffd' is computed by nothing"):
        fusedrnn.onnx.load(broken)


def test_names_that_equal_generated_ones() -> None:
    nodes = [node("LSTM", "LSTM_1"), node("LSTM", ""), node("LSTM", "LSTM_1")]
    layers = fusedrnn.onnx.load(make_model(nodes, make_weights("LSTM", 1)))
    assert list(layers) == ["LSTM_1", "LSTM_1_", "LSTM_2"]


def test_recurrent_operators_of_others() -> None:
    other = make("AttnLSTM", ["X", "W"], ["Y"], domain="com.microsoft")
    with pytest.raises(ValueError, match=r"load does not know com\.microsoft::AttnLSTM"):
        fusedrnn.onnx.load(make_model([other], {}))


def test_graphs_in_graphs() -> None:
    model = make_model([], make_weights("LSTM", 1))
    graph = model.graph
    for _ in range(2000):  # a file cannot be nested so deeply, but a ModelProto can
        choice = graph.node.add(op_type="If")
        graph = choice.attribute.add(name="then_branch", type=AttributeProto.GRAPH).g
    graph.node.add().CopyFrom(node("LSTM", "deep"))
    assert list(fusedrnn.onnx.load(model)) == ["deep"]


def test_functions_in_functions() -> None:
    model = with_functions([call(1)], [call(2)], [node("LSTM")])
    (layer,) = fusedrnn.onnx.load(model).values()
    assert_node(model, layer)


def test_functions_that_are_recursive_or_too_large() -> None:
    with pytest.raises(ValueError, match="the local function 'F0' calls itself"):
        fusedrnn.onnx.load(with_functions([call(1)], [call(0)]))
    doubling = [[call(k + 1), call(k + 1)] for k in range(60)]
    with pytest.raises(ValueError, match=rf"the model has {2**60} nodes of \d+ bytes, 61 d"):
        fusedrnn.onnx.load(with_functions(*doubling, [node("LSTM")]))
    chain = [[call(k + 1)] for k in range(200)]
    with pytest.raises(
        ValueError, match=r"the model has 1 nodes of \d+ bytes, 201 deep; load takes"
    ):
        fusedrnn.onnx.load(with_functions(*chain, [node("LSTM")]))
    million = make("Constant", [], ["big"], value_floats=[0.5] * 250_000)
    many = with_functions([call(1)] * 300, [million, node("LSTM")])
    with pytest.raises(ValueError, match=r"the model has 600 nodes of 3\d{8} bytes, 2 deep"):
        fusedrnn.onnx.load(many)


def test_external_data(tmp_path: Path) -> None:
    for entries in ({}, {"offset": "0", "length": str(SIZE)}):
        file = external(tmp_path, **entries)
        layer = fusedrnn.onnx.load(file, "it")
        assert W_of(layer).numpy().tobytes() == (tmp_path / "W.bin").read_bytes()
    with pytest.raises(ValueError, match="give load the path of the model"):
        fusedrnn.onnx.load(onnx.load(file, load_external_data=False))
    assert_node(onnx.load(file), layer)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "none.bin"}, "none.bin' that stores it does not exist"),
        ({"location": ""}, "that stores it does not exist"),
        ({"offset": "1"}, rf"W.bin' does not hold {SIZE} bytes from 1 on"),
        ({"length": str(10**15)}, rf"are {SIZE} bytes, got {10**15}"),
        ({"length": "many"}, "offset and length .* must be numbers"),
        ({"offset": "-1"}, "does not hold"),
    ],
)
def test_external_data_that_is_missing_or_wrong(
    entries: dict[str, str], message: str, tmp_path: Path
) -> None:
    file = external(tmp_path, **entries)
    with pytest.raises(ValueError, match=rf"node 'it' \(LSTM\): W: the tensor 'W' .*{message}"):
        fusedrnn.onnx.load(file)
    (tmp_path / "W.bin").write_bytes(bytes(SIZE - 4))
    with pytest.raises(ValueError, match="W: the tensor 'W' cannot be read"):
        fusedrnn.onnx.load(file)


@pytest.mark.parametrize(
    ("name", "attribute", "message"),
    [
        ("hidden_size", {"hidden_size": "6"}, "hidden_size must be one attribute of type INT, got"),
        ("hidden_size", {"hidden_size": 2**62}, "hidden_size must be the H of W, 6, got 46116860"),
        ("hidden_size", {"hidden_size": -6}, "hidden_size must be the H of W, 6, got -6"),
        ("direction", {"direction": 1}, "direction must be one attribute of type STRING, got INT"),
        ("direction", {"direction": b"\xff"}, "direction must be forward or bidirectional, got"),
        ("activations", {"activations": "Tanh"}, "activations must be one attribute of type S"),
        ("activations", {"activations": [b"\xff"] * 3}, "activations must be .*, got"),
        ("clip", {"clip": 1}, "clip must be one attribute of type FLOAT, got INT"),
        ("clip", {"clip": float("nan")}, "clip must be absent or 0, got nan"),
        ("layout", {"layout": 1.0}, "layout must be one attribute of type INT, got FLOAT"),
        ("input_forget", {"input_forget": [0]}, "input_forget must be one attribute of type INT"),
    ],
)
def test_attributes_of_the_node(name: str, attribute: dict[str, Any], message: str) -> None:
    model = make_model([node("LSTM", **attribute)], make_weights("LSTM", 1))
    with pytest.raises(ValueError, match=rf"node 'it' \(LSTM\): {message}"):
        fusedrnn.onnx.load(model)
    of_node = model.graph.node[0].attribute
    found = next(a for a in of_node if a.name == name)
    of_node.append(found)
    with pytest.raises(ValueError, match=f"{name} must be one attribute of type"):
        fusedrnn.onnx.load(model)
    del of_node[:]
    reference = AttributeProto(name=name, ref_attr_name="of_the_function", type=AttributeProto.INT)
    of_node.append(reference)
    with pytest.raises(ValueError, match=re.escape("a reference to an attribute of a function")):
        fusedrnn.onnx.load(model)

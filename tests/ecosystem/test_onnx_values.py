"""Weights that nodes of an ONNX file prepare: the operators that load computes, and refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusedrnn.onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # type: ignore[attr-defined]

from fusedrnn._onnx_operators import OPERATORS
from tests.ecosystem.onnx_models import (
    FLOAT,
    INT8,
    PREPARED,
    ROWS,
    SIZE,
    A,
    H,
    I,
    W_of,
    arrays,
    make,
    make_model,
    make_weights,
    node,
    opset,
    prepared,
    quantized,
    run,
    session,
    value,
)
from tests.kit.layers import randn


def computed(model: Any, kind: int = FLOAT) -> torch.Tensor:
    """W of a model as ONNX Runtime computes it."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.graph.node[-1], model.graph.input[:], model.graph.output[:]
    model.graph.output.append(value("W", kind=kind))
    return run(session(model), [])[0]


@pytest.mark.parametrize("case", PREPARED)
def test_prepared_weights_equal_those_of_onnx_runtime(case: str) -> None:
    nodes, weights, version = PREPARED[case]
    model = prepared(nodes, weights, version)
    layer = fusedrnn.onnx.load(model, "it")
    assert W_of(layer).abs().sum() > 1
    torch.testing.assert_close(W_of(layer), computed(model), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
@pytest.mark.parametrize("version", [10, 13, 17, 18, 19, 21])
@pytest.mark.parametrize("axis", [None, 1, 2, -2])
def test_dequantized_weights(version: int, axis: int | None, domain: str) -> None:
    if version == 10 and not domain:
        axis = None  # version 10 of the operator has no axis
    for kind in (INT8, TensorProto.UINT8):
        count = [] if axis is None else [(1, ROWS, I)[axis]]
        model = prepared(
            [
                make("DequantizeLinear", ["q", "s", "z"], ["W"], domain=domain)
                if axis is None
                else make("DequantizeLinear", ["q", "s", "z"], ["W"], domain=domain, axis=axis)
            ],
            {"s": np.random.default_rng(2).random(count, np.float32) + np.float32(0.01)},
            version,
        )
        zero = np.random.default_rng(1).integers(3, 9, count)
        model.graph.initializer.append(helper.make_tensor("z", kind, count, zero.ravel()))
        model.graph.initializer.append(quantized(kind, 1, ROWS, I))
        layer = fusedrnn.onnx.load(model, "it")
        assert torch.equal(W_of(layer), computed(model))


@pytest.mark.parametrize(
    ("kind", "scale", "options"),
    [
        (TensorProto.INT32, FLOAT, {}),
        (TensorProto.INT16, FLOAT, {}),
        (TensorProto.INT4, FLOAT, {}),
        (INT8, TensorProto.FLOAT16, {}),
        (INT8, FLOAT, {"axis": 1, "block_size": 5}),
    ],
)
def test_dequantized_weights_of_newer_kinds(kind: int, scale: int, options: Any) -> None:
    count = [1, -(-ROWS // 5), I] if options else []
    model = prepared([make("DequantizeLinear", ["q", "s"], ["W"], **options)], {}, 21)
    scales = np.abs(np.random.default_rng(2).standard_normal(count)) / 100
    model.graph.initializer.append(helper.make_tensor("s", scale, count, scales.ravel()))
    model.graph.initializer.append(quantized(kind, 1, ROWS, I))
    if scale != FLOAT:  # all weights of a node have one type
        for tensor in model.graph.initializer:
            if tensor.name == "R":
                R = numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(R, "R"))
    layer = fusedrnn.onnx.load(model, "it")
    assert torch.equal(W_of(layer), computed(model, scale))


@pytest.mark.parametrize("version", [10, 13, 21])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_weights_between_quantize_and_dequantize(kind: Any, version: int) -> None:
    """Quantization-aware training leaves such weights. Some of them are beyond the range."""
    count = [] if version == 10 else [ROWS]
    rng = np.random.default_rng(2)
    weights = {"A1": A[None], "s": rng.random(count, np.float32) * np.float32(0.02) + 1e-3}
    weights["s"] = np.asarray(weights["s"], np.float32)
    weights["z"] = rng.integers(3, 9, count).astype(kind)
    nodes = [
        make("QuantizeLinear", ["A1", "s", "z"], ["q"]),
        make("DequantizeLinear", ["q", "s", "z"], ["W"]),
    ]
    model = prepared(nodes, weights, version)
    layer = fusedrnn.onnx.load(model, "it")
    assert torch.equal(W_of(layer), computed(model))
    assert 0 < (W_of(layer) - torch.from_numpy(A)).abs().max() < 10


def test_float8_weights() -> None:
    model = prepared([make("DequantizeLinear", ["q", "s"], ["W"])], {"s": np.float32(0.5)}, 19)
    q = helper.make_tensor("q", TensorProto.FLOAT8E4M3FN, (1, ROWS, I), A.ravel())
    model.graph.initializer.append(q)
    expected = torch.from_numpy(A).to(torch.float8_e4m3fn).float()[None] * 0.5
    assert torch.equal(W_of(fusedrnn.onnx.load(model, "it")), expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("D", [1, 2])
def test_dynamic_quantize_lstm(D: int, per_channel: bool, tmp_path: Path) -> None:
    """The node that ONNX Runtime's quantizer writes. When it runs it also rounds x and h."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    direction = "bidirectional" if D == 2 else "forward"
    model = make_model([node("LSTM", direction=direction)], make_weights("LSTM", D))
    onnx.save(opset(model, 17), tmp_path / "float.onnx")
    quantization.quantize_dynamic(
        tmp_path / "float.onnx", tmp_path / "quantized.onnx", per_channel=per_channel
    )
    original = fusedrnn.onnx.load(tmp_path / "float.onnx", "it")
    (layer,) = fusedrnn.onnx.load(tmp_path / "quantized.onnx").values()
    for name, weight in original.state_dict().items():
        got = layer.state_dict()[name]
        if name.startswith("bias"):
            assert torch.equal(got, weight)
        else:
            rows = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().max()
            assert ((got - weight).abs() <= rows / 127 / 2 * 1.01).all(), name
            assert not torch.equal(got, weight)
    x = randn(5, 3, I, dtype=torch.float32)
    (Y,) = run(session(tmp_path / "quantized.onnx"), [x])
    y = layer(x)[0].unflatten(-1, (D, H)).transpose(1, 2)
    torch.testing.assert_close(y, Y, rtol=0, atol=0.03)


def test_a_dynamic_quantize_lstm_by_hand() -> None:
    inputs = ["X", "Wq", "Rq", "", "", "", "", "", "Ws", "Wz", "Rs", "Rz"]
    lstm = make("DynamicQuantizeLSTM", inputs, ["Y"], "it", domain="com.microsoft", hidden_size=H)
    rng = np.random.default_rng(3)
    weights = {
        "Wq": rng.integers(-9, 9, (1, I, ROWS)).astype(np.int8),
        "Rq": rng.integers(-9, 9, (1, H, ROWS)).astype(np.int8),
        "Ws": rng.random((1, ROWS)).astype(np.float32),
        "Wz": rng.integers(-9, 9, (1, ROWS)).astype(np.int8),
        "Rs": np.array([0.25], np.float32),
        "Rz": np.array([3], np.int8),
    }
    layer = fusedrnn.onnx.load(opset(make_model([lstm], weights), 17), "it")
    W = (weights["Wq"].astype(np.float32) - weights["Wz"]) * weights["Ws"]
    assert torch.equal(W_of(layer), torch.from_numpy(W).transpose(1, 2))
    # ONNX's order of gates is i, o, f, c. In ours the second gate is f.
    f = (weights["Rq"][0, :, 2 * H : 3 * H].astype(np.float32).T - 3) * 0.25
    assert np.array_equal(layer.weight_hh_l0[H : 2 * H].detach().numpy(), f)

    for name, array, message in (
        ("Ws", np.ones(2, np.float32), r"W_scale must be \[1\] or \[1, 24\], got \[2\]"),
        ("Wq", np.zeros((1, I, ROWS), np.float32), "W cannot be dequantized: .* float32"),
        ("Rz", np.array([3], np.uint8), "R cannot be dequantized: its inputs must have one type"),
    ):
        model = opset(make_model([lstm], {**weights, name: array}), 17)
        with pytest.raises(ValueError, match=rf"node 'it' \(DynamicQuantizeLSTM\): {message}"):
            fusedrnn.onnx.load(model)


def tensor(name: str, kind: int, dims: list[int], data: bytes) -> Any:
    return TensorProto(name=name, data_type=kind, dims=dims, raw_data=data)


UNREADABLE = [
    (tensor("W", 99, [1, ROWS, I], bytes(SIZE)), "data of type 99"),
    (tensor("W", TensorProto.STRING, [1, ROWS, I], b""), "data of type STRING"),
    (tensor("W", TensorProto.COMPLEX64, [1, ROWS, I], bytes(2 * SIZE)), "data of type COMPLEX64"),
    (tensor("W", FLOAT, [1, ROWS, -I], bytes(SIZE)), "sizes must not be negative"),
    (tensor("W", FLOAT, [1, ROWS, I], bytes(SIZE - 1)), f"are {SIZE} bytes, got {SIZE - 1}"),
    (tensor("W", FLOAT, [1, ROWS, 2**60], b"1234"), "bytes, got 4"),
    (
        TensorProto(name="W", data_type=FLOAT, dims=[2**40], float_data=[1.0]),
        "are 1099511627776 values, got 1",
    ),
    (
        TensorProto(name="W", data_type=TensorProto.INT4, dims=[2**40], int32_data=[1]),
        "are 549755813888 values, got 1",
    ),
]


@pytest.mark.parametrize(("W", "message"), UNREADABLE, ids=[m for _, m in UNREADABLE])
def test_tensors_that_cannot_be_read(W: Any, message: str) -> None:
    model = prepared([], {})
    model.graph.initializer[0].CopyFrom(W)
    with pytest.raises(ValueError, match=rf"node 'it' .*W: the tensor 'W' cannot .*{message}"):
        fusedrnn.onnx.load(model)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("W", np.int64, "W must be float32, float64, float16 or bfloat16, got int64"),
        ("W", np.uint16, "W must be float32, float64, float16 or bfloat16, got uint16"),
        ("W", np.float64, "R must be float64 as W is, got float32"),
        ("R", np.float16, "R must be float32 as W is, got float16"),
        ("B", np.float64, "B must be float32 as W is, got float64"),
    ],
)
def test_weights_of_other_dtypes(name: str, dtype: Any, message: str) -> None:
    weights = make_weights("GRU", 1)
    weights[name] = weights[name].astype(dtype)
    with pytest.raises(ValueError, match=rf"node 'it' \(GRU\): {message}"):
        fusedrnn.onnx.load(make_model([node("GRU")], weights))


def test_infinite_and_nan_weights_are_loaded() -> None:
    W = A[None].copy()
    W[0, 0, :3] = np.inf, -np.inf, np.nan
    model = prepared([make("Cast", ["w"], ["W"], to=FLOAT)], {"w": W.astype(np.float64)})
    assert np.array_equal(W_of(fusedrnn.onnx.load(model, "it")).numpy(), W, equal_nan=True)


def test_the_page_lists_the_operators() -> None:
    page = (Path(__file__).parents[2] / "docs/interop.md").read_text()
    sentence = re.search(r"be prepared from stored tensors by ([^.]*)\.", page)
    assert sentence is not None
    named = re.split(r",\s+|\s+or\s+", sentence[1])
    assert named == sorted(OPERATORS)


def test_a_long_chain() -> None:
    chain = [make("Identity", [f"c{k}"], [f"c{k + 1}"]) for k in range(5000)]
    model = prepared([*chain, make("Identity", ["c5000"], ["W"])], {"c0": A[None]})
    assert torch.equal(W_of(fusedrnn.onnx.load(model, "it")), torch.from_numpy(A)[None])


BIG = arrays(big=[1, ROWS, 10**12])
REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "random": ([make("RandomNormal", [], ["W"], "dice", shape=[1, ROWS, I])], {},
               r"W is prepared by the node 'dice' \(RandomNormal\); load computes Add, .*"),
    "another domain": ([make("Identity", ["A"], ["W"], domain="own")], {"A": A},
                       r"W is prepared by a node \(own::Identity\)"),
    "a circle": ([make("Identity", ["a"], ["W"]), make("Identity", ["W"], ["a"])], {},
                 "W depends on itself"),
    "of itself": ([make("Add", ["W", "W"], ["W"])], {}, "W depends on itself"),
    "nothing": ([make("Identity", ["a"], ["W"])], {},
                "W must be constant, but 'W' depends on 'a', which is computed by nothing"),
    "an input": ([make("Identity", ["X"], ["W"])], {},
                 "'W' depends on 'X', which is an input of the graph 'graph'"),
    "twice": ([make("Identity", ["A"], ["W"]), make("Identity", ["R"], ["W"])], {"A": A},
              "W must be constant, but 'W' is defined twice"),
    "expanded": ([make("Expand", ["a", "big"], ["W"])], {"a": A[:1, :1], **BIG}, "would write 24"),
    "filled": ([make("ConstantOfShape", ["big"], ["W"])], BIG, "would write 24000000000000 el"),
    "tiled": ([make("Tile", ["A1", "big"], ["W"])], {"A1": A[None], **BIG}, "it would write"),
    "gathered": ([make("Gather", ["A", "k"], ["W"])],
                 {"A": A.reshape(2, -1), "k": np.zeros(200, np.int64)}, "write 9600 elements"),
    "doubled": ([make("Concat", [f"c{k}"] * 2, [f"c{k + 1}"], axis=0) for k in range(60)]
                + [make("Identity", ["c60"], ["W"])], {"c0": A}, "it would write"),
    "broadcast": ([make("Add", ["a", "b"], ["W"])],
                  {"a": A.reshape(-1, 1), "b": A.reshape(1, -1)}, "it would write 9216 elements"),
    "one block": ([make("DequantizeLinear", ["q", "s"], ["W"], axis=1, block_size=2**62)],
                  {"q": np.zeros((1, ROWS, I), np.int8), "s": A}, r"the scale must be \[1, 1, 4\]"),
    "no input": ([make("Transpose", [], ["W"])], {}, r"it needs 1 inputs, got \[\]"),
    "an input too many": ([make("Identity", ["A", "A"], ["W"])], {"A": A}, "a node .Identity.: "),
    "another attribute": ([make("Identity", ["A"], ["W"], k=1)], {"A": A}, "attribute 'k'"),
    "another type": ([make("Transpose", ["A"], ["W"], perm=1)], {"A": A},
                     "perm must be one attribute of type INTS, got INT"),
    "no axis": ([make("Concat", ["A"], ["W"])], {"A": A}, "the attribute axis is missing"),
    "axis": ([make("Concat", ["A"], ["W"], axis=2)], {"A": A}, r"axis must be in \[-2, 2\), got 2"),
    "far axis": ([make("Squeeze", ["A"], ["W"], axes=[2**62])], {"A": A}, r"a node \(Squeeze\): "),
    "step 0": ([make("Slice", ["A", "o", "o", "o", "o"], ["W"])], {"A": A, **arrays(o=[0])},
               "steps must not be 0"),
    "index": ([make("Gather", ["A", "k"], ["W"])], {"A": A, **arrays(k=[ROWS])},
              r"indices must be in \[-24, 24\)"),
    "to an integer": ([make("Cast", ["A"], ["W"], to=99)], {"A": A}, "the type 99 is unknown"),
    "two types": ([make("Add", ["A", "k"], ["W"])], {"A": A, **arrays(k=[1])}, "have one type"),
    "parts": ([make("Split", ["A"], ["W", "b", "c", "d", "e"])], {"A": A},
              "24 cannot be split in 5 equal parts"),
    "an output too many": ([make("Identity", ["A"], ["a", "W"])], {"A": A},
                           "'W' is an output that its node has not"),
    "a string": ([make("Constant", [], ["W"], value_string="w")], {}, "attributes ..value_string"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_refused(case: str) -> None:
    nodes, weights, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"node 'it' \(LSTM\): .*{message}"):
        fusedrnn.onnx.load(prepared(nodes, weights))


def test_a_sparse_weight() -> None:
    model = prepared([], {})
    del model.graph.initializer[0]
    values = numpy_helper.from_array(np.ones(1, np.float32), "W")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    sparse = helper.make_sparse_tensor(values, places, [1, ROWS, I])
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(ValueError, match="W must be constant, but 'W' is a sparse tensor"):
        fusedrnn.onnx.load(model)


def test_names_are_resolved_in_their_own_graph() -> None:
    """A branch may use a name that the graph around it uses for another tensor."""
    weights = make_weights("LSTM", 1)
    outer = make("Mul", ["a", "two"], ["W"])
    a = numpy_helper.from_array(np.zeros(1, np.float32), "a")
    lstm = node("LSTM", "inner", inputs=["X", "W", "R"])
    branch = helper.make_graph([lstm], "branch", [], [value("Y")], [a])
    choice = make("If", ["yes"], ["Y"], then_branch=branch, else_branch=branch)
    R = {"R": weights["R"], "a": A[None], "two": np.array(2, np.float32), "yes": np.array(True)}
    layer = fusedrnn.onnx.load(make_model([outer, choice], R), "inner")
    assert torch.equal(W_of(layer), 2 * torch.from_numpy(A)[None])

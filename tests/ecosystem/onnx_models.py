"""Small models of ONNX for several files of tests, and runs of them by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper  # type: ignore[attr-defined]
from torch import Tensor

from tests.kit.layers import error, flat, randn

# ONNX Runtime computes in float32 with its own approximations; the reference is float64.
LIMIT = 2e-6


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
    """Compares a model of one node, run by ONNX Runtime, with its layer in float64."""
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


def with_states(operator: str, D: int = 1, layout: int = 0, **states: Any) -> Any:
    """A model whose node has stored initial states and lengths."""
    weights = {**make_weights(operator, D), **states}
    wanted = ("lens", "h", "c") if operator == "LSTM" else ("lens", "h")
    names = [name if name in states else "" for name in wanted]
    options: dict[str, Any] = {"layout": layout} if layout else {}
    if D == 2:
        options["direction"] = "bidirectional"
    return make_model([node(operator, inputs=["X", "W", "R", "B", *names], **options)], weights)


def state(*shape: int) -> Any:
    return randn(*shape, dtype=torch.float32).numpy()


FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
ROWS = 4 * H


def opset(model: Any, version: int) -> Any:
    """Changes a model to another version of ONNX, with ONNX Runtime's own domain."""
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", version))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.ir_version = 10 if version > 20 else 8
    return model


def prepared(nodes: list[Any], weights: dict[str, Any], version: int = 20) -> Any:
    """A model whose LSTM node `it` has a W that `nodes` compute from `weights`."""
    weights = {**make_weights("LSTM", 1), **weights}
    if any("W" in n.output for n in nodes):
        del weights["W"]
    return opset(make_model([*nodes, node("LSTM", inputs=["X", "W", "R"])], weights), version)


def W_of(layer: Any) -> torch.Tensor:
    """W of a loaded LSTM in ONNX's order of gates, i, o, f, c."""
    i, f, g, o = layer.weight_ih_l0.detach().chunk(4)
    return torch.cat([i, o, f, g])[None]


def arrays(**values: Any) -> dict[str, Any]:
    """Integers as int64 arrays, the type that the operators take."""
    return {name: np.array(v, np.int64) for name, v in values.items()}


make = helper.make_node
A = randn(ROWS, I, dtype=torch.float32).numpy()  # [4H, I]
PREPARED = {
    # As written by torch.onnx.export(dynamo=False) and Paddle2ONNX for several versions of ONNX.
    "slices, attributes": (
        [
            *[
                make("Slice", ["A"], [f"s{k}"], axes=[0], starts=[k * H], ends=[k * H + H])
                for k in range(4)
            ],
            make("Concat", ["s0", "s3", "s1", "s2"], ["c"], axis=0),
            make("Unsqueeze", ["c"], ["W"], axes=[0]),
        ],
        {"A": A},
        9,
    ),
    "slices, inputs": (
        [
            make("Constant", [], [str(4 * H)], value_ints=[2**62]),  # a slice up to the end
            *[
                make("Slice", ["A", str(k * H), str(k * H + H), "0"], [f"s{k}"])
                for k in range(4)
            ],
            make("Concat", ["s0", "s3", "s1", "s2"], ["c"], axis=-2),
            make("Unsqueeze", ["c", "0"], ["W"]),
        ],
        {"A": A, **arrays(**{str(k * H): [k * H] for k in range(4)})},
        13,
    ),
    "a step back": (
        [make("Slice", ["A1", "from", "to", "from", "from"], ["W"])],
        {"A1": A[None], **arrays(**{"from": [-1], "to": [-(2**62)]})},
        13,
    ),
    # As written by fusedrnn.onnx.translations().
    "reshape and gather": (
        [
            make("Reshape", ["A", "four"], ["g"]),
            make("Gather", ["g", "order"], ["o"], axis=0),
            make("Reshape", ["o", "whole"], ["W"]),
        ],
        {"A": A, **arrays(four=[4, -1, I], order=[0, -1, 1, 2], whole=[1, ROWS, I])},
        18,
    ),
    "reshape that keeps": (
        [make("Reshape", ["A", "s"], ["W"])],
        {"A": A[None], **arrays(s=[0, -1, 0])},
        13,
    ),
    # As written by mx2onnx and tf2onnx.
    "split of one vector": (
        [
            make("Add", ["end", "zero"], ["end1"]),
            make("Mul", ["end1", "one"], ["end2"]),
            make("Slice", ["all", "zero", "end2"], ["flat"]),
            make("Split", ["flat"], list("abcd")),
            make("Concat", list("adbc"), ["iofc"], axis=0),
            make("Reshape", ["iofc", "s"], ["W"]),
        ],
        {"all": np.append(A.ravel(), A.ravel())}
        | arrays(end=[A.size], zero=[0], one=[1], s=[1, ROWS, I]),
        13,
    ),
    "uneven split": (
        [
            make("Split", ["A1", "s"], ["a", "b"], axis=1),
            make("Concat", ["b", "a"], ["W"], axis=1),
        ],
        {"A1": A[None], **arrays(s=[5, ROWS - 5])},
        13,
    ),
    "split in a number": (
        [
            make("Split", ["A1"], list("abcde"), axis=1, num_outputs=5),
            make("Concat", list("abcde"), ["W"], axis=1),
        ],
        {"A1": A[None]},
        18,
    ),
    # Stored in Keras's layout, in float16.
    "transpose and cast": (
        [
            make("Transpose", ["K"], ["t"], perm=[1, 0]),
            make("Cast", ["t"], ["f"], to=FLOAT),
            make("Unsqueeze", ["f"], ["f1"], axes=[0]),
            make("Squeeze", ["f1"], ["f2"]),
            make("Identity", ["f2"], ["f3"]),
            make("Unsqueeze", ["f3"], ["W"], axes=[-3]),
        ],
        {"K": A.T.astype(np.float16)},
        11,
    ),
    # weight_norm, as written by torch.onnx.export(do_constant_folding=False).
    "weight_norm": (
        [
            make("ReduceL2", ["v"], ["n"], axes=[2], keepdims=1),
            make("Div", ["v", "n"], ["u"]),
            make("Mul", ["u", "g"], ["W"]),
        ],
        {"v": A[None], "g": A[None, :, :1]},
        13,
    ),
    "of two tensors": (
        [make("Sub", ["A1", "b"], ["d"]), make("Expand", ["d", "s"], ["W"])],
        {"A1": A[None], "b": A[0, :1], **arrays(s=[1, 1, 1])},
        13,
    ),
    "tiles": (
        [make("Tile", ["q", "s"], ["W"])],
        {"q": A[None, :H], **arrays(s=[1, 4, 1])},
        13,
    ),
}  # fmt: skip


def quantized(kind: int, *shape: int) -> Any:
    low, high = {INT8: (-128, 128), TensorProto.UINT8: (0, 256), TensorProto.INT4: (-8, 8)}.get(
        kind, (-1000, 1000)
    )
    values = np.random.default_rng(0).integers(low, high, shape)
    return helper.make_tensor("q", kind, shape, values.ravel())


SIZE = 4 * ROWS * I


def with_functions(*bodies: list[Any]) -> Any:
    """A model that calls the local function F0; `bodies[k]` are the nodes of function Fk."""
    model = make_model([make("F0", list("XWRB"), ["Y"], domain="own")], make_weights("LSTM", 1))
    model.opset_import.append(helper.make_opsetid("own", 1))
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    for k, body in enumerate(bodies):
        function = helper.make_function("own", f"F{k}", list("XWRB"), ["Y"], body, versions)
        model.functions.append(function)
    return model


def call(k: int) -> Any:
    return make(f"F{k}", list("XWRB"), ["Y"], domain="own")


def external(folder: Path, **entries: str) -> Path:
    """Writes a model whose W is stored in another file of its folder; returns the model's path."""
    model = prepared([], {})
    W = model.graph.initializer[0]
    (folder / "W.bin").write_bytes(W.raw_data)
    W.ClearField("raw_data")
    W.data_location = TensorProto.EXTERNAL
    for key, text in {"location": "W.bin", **entries}.items():
        W.external_data.add(key=key, value=text)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"

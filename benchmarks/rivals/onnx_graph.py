"""A torch.nn layer as an ONNX model, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ..cases import Case, live, padded
from . import Unsupported

# ONNX's order of the gates (i o f g; z r n; one gate), as indices into torch's order.
GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
OPSET, IR_VERSION = 17, 8


def model(case: Case) -> bytes:
    """Makes a serialized model of a case: from x [T, N, I] (and lengths [N]) to y [T, N, D*H].

    Raises:
        Unsupported: ONNX has no such operator.
    """
    row = case.row
    if row.P:
        raise Unsupported("ONNX has no LSTM with projection")
    if row.single:
        raise Unsupported("ONNX has layers, not cells")
    nodes, weights = [], []
    inputs = [_value("x", TensorProto.FLOAT, [row.T, row.N, row.I])]
    if row.packed:
        inputs.append(_value("lengths", TensorProto.INT32, [row.N]))
    weights.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), "form"))
    x = "x"
    for layer in range(row.L):
        names = [f"{kind}{layer}" for kind in ("W", "R", "B")]
        weights += [
            numpy_helper.from_array(array, name)
            for name, array in zip(names, _weights(case, layer), strict=True)
        ]
        y = f"y{layer}"
        options: dict[str, Any] = {"hidden_size": row.H}
        options["direction"] = "bidirectional" if row.D == 2 else "forward"
        if row.cell == "gru":
            options["linear_before_reset"] = 1  # torch's GRU: r after the product
        lengths = "lengths" if row.packed else ""
        kind = row.cell.upper()
        nodes.append(helper.make_node(kind, [x, *names, lengths], [y], **options))
        # [T, D, N, H] to [T, N, D*H]
        nodes.append(helper.make_node("Transpose", [y], [y + "t"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [y + "t", "form"], [y + "r"]))
        x = y + "r"
    outputs = [_value(x, TensorProto.FLOAT, [row.T, row.N, row.D * row.H])]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    made.ir_version = IR_VERSION
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def feeds(case: Case) -> dict[str, Any]:
    """The model's inputs as numpy arrays."""
    if not case.row.packed:
        return {"x": case.x.float().numpy()}
    x, lengths = padded(case)
    return {"x": x.float().numpy(), "lengths": lengths.to(torch.int32).numpy()}


def in_torch_form(case: Case, y: Any) -> dict[str, Tensor]:
    """Returns the model's output as torch.nn's y, or as the live data of y if it is packed."""
    return {"y": live(case, torch.from_numpy(np.array(y)))}


def _value(name: str, kind: int, shape: list[int]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _weights(case: Case, layer: int) -> list[Any]:
    """W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] in ONNX's order of the gates."""

    def of(name: str, suffix: str) -> Tensor:
        weight: Tensor = getattr(case.torch, f"{name}_l{layer}{suffix}")
        gates = weight.detach().float().chunk(case.row.G)
        return torch.cat([gates[i] for i in GATES[case.row.cell]])

    suffixes = ("", "_reverse")[: case.row.D]
    return [
        torch.stack([torch.cat([of(name, s) for name in names]) for s in suffixes]).numpy()
        for names in (("weight_ih",), ("weight_hh",), ("bias_ih", "bias_hh"))
    ]

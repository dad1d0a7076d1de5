#!/usr/bin/env bash
# openvino 2026.4.1, CPU: sequence_lens of an ONNX GRU, LSTM or RNN is ignored if T or N is dynamic.
#
# One would expect a dynamic size in the file to change only which inputs are allowed. With fixed [T, N, I]
# OpenVINO respects the lengths, as onnxruntime 1.31.1 does. With a dynamic T or N the same file and the same
# inputs give the results without lengths: Y_h is the state after the padding, without an error or a warning.
# `reshape` to fixed sizes before the model is compiled corrects this. We found no public report of it; since
# openvinotoolkit/openvino#10710 the CPU plugin no longer decomposes such a node if sizes are dynamic. On
# Linux, x86-64, Python 3.12, the script prints the largest difference of Y_h from onnxruntime's with the
# lengths, and then from onnxruntime's with every length T ("open" means dynamic):
#     GRU   fixed: 2e-07 6e-01   T open: 6e-01 2e-07   N open: 6e-01 2e-07   reshaped: 2e-07 6e-01
#     LSTM  fixed: 6e-08 2e-01   T open: 2e-01 9e-08   N open: 2e-01 9e-08   reshaped: 6e-08 2e-01
#     RNN   fixed: 1e-07 1e+00   T open: 1e+00 4e-07   N open: 1e+00 4e-07   reshaped: 1e-07 1e+00
#
# The script exits with 0 if this is still so, and with 1 if it has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.2.6

cat >"$folder/program.py" <<'PROGRAM'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, checker, helper, numpy_helper

T, N, I, H = 6, 3, 4, 5
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
X = np.random.default_rng(0).normal(size=(T, N, I)).astype(np.float32)
LENGTHS = np.array([6, 2, 3], np.int32)  # sequences 1 and 2 have padding after their lengths


def file_of(op, t, n):
    """Makes a file of one node, with sizes t and n: an int, or the name of a dynamic size."""
    random = np.random.default_rng(1)
    rows = GATES[op] * H
    weights = [
        numpy_helper.from_array(random.normal(size=size).astype(np.float32) / 2, name)
        for name, size in (("W", (1, rows, I)), ("R", (1, rows, H)), ("B", (1, 2 * rows)))
    ]
    node = helper.make_node(op, ["X", "W", "R", "B", "lengths"], ["Y", "Y_h"], hidden_size=H)
    inputs = [
        helper.make_tensor_value_info("X", TensorProto.FLOAT, [t, n, I]),
        helper.make_tensor_value_info("lengths", TensorProto.INT32, [n]),
    ]
    outputs = [
        helper.make_tensor_value_info("Y", TensorProto.FLOAT, [t, 1, n, H]),
        helper.make_tensor_value_info("Y_h", TensorProto.FLOAT, [1, n, H]),
    ]
    graph = helper.make_graph([node], "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    checker.check_model(model, full_check=True)
    return model.SerializeToString()


def final_state(file, fixed=False):
    core = openvino.Core()
    model = core.read_model(file)
    if fixed:
        model.reshape({"X": [T, N, I], "lengths": [N]})
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(model, "CPU", exact)({"X": X, "lengths": LENGTHS})["Y_h"]


def close(a, b):
    return np.abs(a - b).max() < 1e-5


same = True
for op in GATES:
    session = onnxruntime.InferenceSession(file_of(op, T, N))
    wanted = session.run(["Y_h"], {"X": X, "lengths": LENGTHS})[0]
    whole = session.run(["Y_h"], {"X": X, "lengths": np.full(N, T, np.int32)})[0]
    seen = {
        "fixed": final_state(file_of(op, T, N)),
        "T open": final_state(file_of(op, "T", N)),
        "N open": final_state(file_of(op, T, "N")),
        "reshaped": final_state(file_of(op, "T", "N"), fixed=True),
    }
    errors = (
        f"{name}: {np.abs(y - wanted).max():.0e} {np.abs(y - whole).max():.0e}"
        for name, y in seen.items()
    )
    print(f"{op:5}", "   ".join(errors))
    same &= not close(wanted, whole)
    same &= close(seen["fixed"], wanted) and close(seen["reshaped"], wanted)
    same &= close(seen["T open"], whole) and close(seen["N open"], whole)
raise SystemExit(0 if same else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"

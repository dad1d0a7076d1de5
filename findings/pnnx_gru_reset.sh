#!/usr/bin/env bash
# pnnx 20261020: an ONNX GRU becomes the same ncnn GRU for both values of linear_before_reset.
#
# One would expect a converter to keep an attribute that decides between two different equations, or to refuse
# a value for which its target has no layer. ncnn's GRU is torch's, with linear_before_reset = 1. But a node
# with 0, which is ONNX's default and Keras's reset_after=False, is converted without an error to exactly the
# same files, and ncnn 1.0.20261020 computes other results. There is a second fault: if both Y and Y_h are
# outputs, the converter takes B for initial_h, so the layer has no bias and starts from the first H elements
# of B. We found no public report of either (Tencent/ncnn#5553 introduced the conversion). On Linux, x86-64,
# Python 3.12, the script prints the following, where the errors of Y are differences from ONNX's equations in
# numpy:
#     files equal for linear_before_reset = 0 and 1: True
#     linear_before_reset = 0: error 5e-01
#     linear_before_reset = 1: error 7e-08
#     linear_before_reset = 1, Y and Y_h: error 8e-01, from a GRU without B that starts at B[:H] 7e-08
#
# The script exits with 0 if this is still so, and with 1 if it has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  onnx==1.23.2 numpy==2.2.6
# --no-deps leaves out torch, which the conversion of an ONNX file does not need, and packages for downloads.
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  pnnx==20261020 ncnn==1.0.20261020

cat >"$folder/program.py" <<'PROGRAM'
import importlib.util
import pathlib
import subprocess
import sys

import ncnn
import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

T, I, H = 5, 4, 6
FOLDER = pathlib.Path(sys.argv[1])
# The program is called directly, because the Python package imports torch.
PNNX = pathlib.Path(importlib.util.find_spec("pnnx").submodule_search_locations[0]) / "pnnx"
random = np.random.default_rng(0)
X = random.normal(size=(T, I)).astype(np.float32)
W, R, B = (
    random.normal(size=size).astype(np.float32) / 2 for size in ((3 * H, I), (3 * H, H), (6 * H,))
)


def convert(name, linear_before_reset, final):
    """Converts one GRU node of batch 1; returns the path of ncnn's files without a suffix."""
    outputs = ["Y", "Y_h"][: 1 + final]
    gru = helper.make_node(
        "GRU", ["X", "W", "R", "B"], outputs, hidden_size=H, linear_before_reset=linear_before_reset
    )
    squeeze = helper.make_node("Squeeze", ["Y", "axes"], ["y"])
    sizes = {"X": [T, 1, I], "y": [T, 1, H], "Y_h": [1, 1, H]}
    values = {k: helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in sizes.items()}
    constants = {"W": W[None], "R": R[None], "B": B[None], "axes": np.array([1])}
    graph = helper.make_graph(
        [gru, squeeze],
        "graph",
        [values["X"]],
        [values[k] for k in ["y", *outputs[1:]]],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model, full_check=True)
    file = FOLDER / f"{name}.onnx"
    file.write_bytes(model.SerializeToString())
    command = [PNNX, file.name, f"inputshape=[{T},1,{I}]f32", "fp16=0"]
    subprocess.run(
        command, cwd=FOLDER, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return FOLDER / f"{name}.ncnn"


def run(path):
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    assert net.load_param(f"{path}.param") == 0 and net.load_model(f"{path}.bin") == 0
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(X.copy()))
    return np.array(extractor.extract("out0")[1])


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def specified(linear_before_reset, bias=B, start=0.0):
    """Y by the specification's equations."""
    (w_z, w_r, w_n), (r_z, r_r, r_n) = np.split(W, 3), np.split(R, 3)
    b_z, b_r, b_n, c_z, c_r, c_n = np.split(bias, 6)
    h, y = np.zeros(H) + start, []
    for x in X:
        z = sigmoid(w_z @ x + b_z + r_z @ h + c_z)
        r = sigmoid(w_r @ x + b_r + r_r @ h + c_r)
        recurrent = r * (r_n @ h + c_n) if linear_before_reset else r_n @ (r * h) + c_n
        h = (1 - z) * np.tanh(w_n @ x + b_n + recurrent) + z * h
        y.append(h)
    return np.stack(y)


paths = [convert(f"reset_{value}", value, final=False) for value in (0, 1)]
equal = all(
    pathlib.Path(f"{paths[0]}.{kind}").read_bytes()
    == pathlib.Path(f"{paths[1]}.{kind}").read_bytes()
    for kind in ("param", "bin")
)
print("files equal for linear_before_reset = 0 and 1:", equal)
errors = [np.abs(run(paths[value]) - specified(value)).max() for value in (0, 1)]
for value in (0, 1):
    print(f"linear_before_reset = {value}: error {errors[value]:.0e}")
y = run(convert("both", 1, final=True))
wrong = np.abs(y - specified(1)).max()
from_bias = np.abs(y - specified(1, bias=np.zeros_like(B), start=B[:H])).max()
print(
    f"linear_before_reset = 1, Y and Y_h: error {wrong:.0e},"
    f" from a GRU without B that starts at B[:H] {from_bias:.0e}"
)
same = equal and errors[0] > 1e-2 and errors[1] < 1e-4 and wrong > 1e-2 and from_bias < 1e-4
raise SystemExit(0 if same else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py" "$folder"

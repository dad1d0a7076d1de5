#!/usr/bin/env bash
# onnx 1.23.2: the ReferenceEvaluator ignores sequence_lens, clip, activations and input_forget of LSTM and GRU.
#
# One would expect onnx's own evaluator to compute a node as onnx's specification says, so that other runtimes
# can be compared with it. But it accepts these parts of a node and computes as if they were absent, without
# an error: the outputs are equal bit for bit. We found no public report of this; onnx/onnx#7935 fixed the same
# fault of `direction`. On Linux, x86-64, Python 3.12, the script prints the following, where "off by" is the
# distance of Y_h from the specification's equations in numpy:
#     LSTM as it is: off by 3e-08
#     LSTM sequence_lens: bits unchanged, off by 4e-01
#     LSTM clip: bits unchanged, off by 4e-01
#     LSTM activations: bits unchanged, off by 4e-01
#     LSTM input_forget: bits unchanged, off by 2e-01
#     GRU as it is: off by 2e-07
#     GRU sequence_lens: bits unchanged, off by 8e-01
#     GRU clip: bits unchanged, off by 1e+00
#     GRU activations: bits unchanged, off by 1e+00
#
# The script exits with 0 if this is still so, and with 1 if it has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  onnx==1.23.2 numpy==2.2.6

cat >"$folder/program.py" <<'PROGRAM'
import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

T, N, I, H = 5, 3, 4, 6
GATES = {"LSTM": 4, "GRU": 3}
random = np.random.default_rng(0)
X = random.normal(size=(T, N, I)).astype(np.float32)
LENGTHS = np.array([5, 2, 3], np.int32)
FUNCTIONS = {
    "Sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "Tanh": np.tanh,
    "Relu": lambda v: np.maximum(v, 0),
    "HardSigmoid": lambda v: np.clip(0.2 * v + 0.5, 0, 1),
}


def weights_of(op):
    random = np.random.default_rng(1)
    rows = GATES[op] * H
    sizes = {"W": (1, rows, I), "R": (1, rows, H), "B": (1, 2 * rows)}
    return {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def evaluated(op, lengths=None, **attributes):
    """The outputs [Y, Y_h] of onnx's evaluator."""
    names = ["X", "W", "R", "B"] + ([] if lengths is None else ["lengths"])
    node = helper.make_node(op, names, ["Y", "Y_h"], hidden_size=H, **attributes)
    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [T, N, I])]
    feed = {"X": X}
    if lengths is not None:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [N]))
        feed["lengths"] = lengths
    outputs = [
        helper.make_tensor_value_info("Y", TensorProto.FLOAT, [T, 1, N, H]),
        helper.make_tensor_value_info("Y_h", TensorProto.FLOAT, [1, N, H]),
    ]
    weights = [numpy_helper.from_array(v, name) for name, v in weights_of(op).items()]
    graph = helper.make_graph([node], "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, feed)


def specified(op, lengths=None, clip=np.inf, activations=None, input_forget=0):
    """Y_h by the specification's equations: the state after each row's last step, in float64."""
    functions = [FUNCTIONS[name] for name in activations or ["Sigmoid", "Tanh", "Tanh"]]
    f, g, *rest = [
        lambda v, function=function: function(np.clip(v, -clip, clip)) for function in functions
    ]
    w, r, b = (v[0].astype(np.float64) for v in weights_of(op).values())
    b_w, b_r = np.split(b, 2)
    h = c = np.zeros((N, H))
    for t in range(T):
        x = np.split(X[t].astype(np.float64) @ w.T + b_w, GATES[op], axis=1)
        if op == "LSTM":
            i, o, forget, new = (
                a + u for a, u in zip(x, np.split(h @ r.T + b_r, 4, axis=1), strict=True)
            )
            forget = 1 - f(i) if input_forget else f(forget)
            next_c = forget * c + f(i) * g(new)
            next_h = f(o) * rest[0](next_c)
        else:
            (r_z, r_r, r_n), (b_z, b_reset, b_n) = np.split(r, 3), np.split(b_r, 3)
            z, reset = f(x[0] + h @ r_z.T + b_z), f(x[1] + h @ r_r.T + b_reset)
            next_c, next_h = c, (1 - z) * g(x[2] + (reset * h) @ r_n.T + b_n) + z * h
        runs = np.full((N, 1), True) if lengths is None else (t < lengths)[:, None]
        h, c = np.where(runs, next_h, h), np.where(runs, next_c, c)
    return h


same = True
for op, activations in (
    ("LSTM", ["HardSigmoid", "Relu", "Relu"]),
    ("GRU", ["HardSigmoid", "Relu"]),
):
    plain = evaluated(op)
    error = np.abs(plain[1][0] - specified(op)).max()
    print(f"{op} as it is: off by {error:.0e}")
    same &= error < 1e-5
    cases = {
        "sequence_lens": {"lengths": LENGTHS},
        "clip": {"clip": 0.1},
        "activations": {"activations": activations},
    }
    if op == "LSTM":
        cases["input_forget"] = {"input_forget": 1}
    for name, asked in cases.items():
        got = evaluated(op, **asked)
        equal = all(np.array_equal(a, b) for a, b in zip(got, plain, strict=True))
        error = np.abs(got[1][0] - specified(op, **asked)).max()
        print(f"{op} {name}: bits {'unchanged' if equal else 'changed'}, off by {error:.0e}")
        same &= equal and error > 1e-2
raise SystemExit(0 if same else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"

#!/usr/bin/env bash
# onnxruntime 1.31.1, CPU: Y_h and Y_c of a row whose length is 0 are zero, not its initial state.
#
# One would guess that a row of no steps ends where it began: at its row of initial_h and initial_c. That is
# what a stream cut into pieces needs, where a row may have nothing in one piece. LSTM, GRU and RNN give
# zeros for it, and its state is lost without an error. A row of length 1 beside it shows that the initial
# states are read. The specification is silent: sequence_lens are "lengths of the sequences", Y_h is "the last
# output value of the hidden", and a row of no steps has none. onnx/onnx#1674 asked for a definition, and says
# that TensorFlow gives the initial state; it was closed as stale. microsoft/onnxruntime#749 let lengths of 0
# in. (torch has no answer: its pack_padded_sequence refuses them.) Who needs the state puts a Where behind
# the node. Seen on Linux, x86-64, Python 3.12, with initial states of 0.5:
#     LSTM length 0: Y_h 0.0, Y_c 0.0   length 1: off the equations' by 7e-08
#     GRU  length 0: Y_h 0.0   length 1: off the equations' by 9e-10
#     RNN  length 0: Y_h 0.0   length 1: off the equations' by 4e-08
#
# Exits with 0 where that is so, with 1 where it has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  onnx==1.23.2 onnxruntime==1.31.1 numpy==2.2.6

cat >"$folder/program.py" <<'PROGRAM'
import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper

T, N, H = 2, 2, 3
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
START = np.full((1, N, H), 0.5, np.float32)  # every element of the initial states


def file_of(op):
    """A node without bias, all of whose weights are inputs of the file."""
    names = ["X", "W", "R", "", "lengths", "initial_h"] + ["initial_c"] * (op == "LSTM")
    final = ["Y_h"] + ["Y_c"] * (op == "LSTM")
    rows = GATES[op] * H
    sizes = {"X": [T, N, H], "W": [1, rows, H], "R": [1, rows, H], "lengths": [N]}
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT,
            sizes.get(name, [1, N, H]),
        )
        for name in names
        if name
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, N, H]) for name in final]
    node = helper.make_node(op, names, ["", *final], hidden_size=H)
    graph = helper.make_graph([node], "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    checker.check_model(model, full_check=True)
    return model.SerializeToString()


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def one_step(op):
    """Y_h and Y_c after one step, where x is zero, W too, and R the identity for every gate."""
    h = c = 0.5
    if op == "LSTM":
        c = sigmoid(h) * c + sigmoid(h) * np.tanh(h)
        return sigmoid(h) * np.tanh(c), c
    if op == "GRU":
        return ((1 - sigmoid(h)) * np.tanh(sigmoid(h) * h) + sigmoid(h) * h,)
    return (np.tanh(h),)


same = True
for op, gates in GATES.items():
    feed = {
        "X": np.zeros((T, N, H), np.float32),
        "W": np.zeros((1, gates * H, H), np.float32),
        "R": np.tile(np.eye(H, dtype=np.float32), (gates, 1))[None],
        "lengths": np.array([0, 1], np.int32),
        "initial_h": START,
    }
    if op == "LSTM":
        feed["initial_c"] = START
    states = onnxruntime.InferenceSession(file_of(op)).run(None, feed)
    names = ("Y_h", "Y_c")[: len(states)]
    zeros = ", ".join(f"{name} {s[0, 0, 0]}" for name, s in zip(names, states, strict=True))
    error = max(np.abs(s[0, 1] - v).max() for s, v in zip(states, one_step(op), strict=True))
    print(f"{op:4} length 0: {zeros}   length 1: off the equations' by {error:.0e}")
    same &= error < 1e-6 and all((s[0, 0] == 0).all() for s in states)
raise SystemExit(0 if same else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"

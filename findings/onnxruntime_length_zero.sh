#!/usr/bin/env bash
# onnxruntime 1.31.1, CPU: Y_h and Y_c of a sequence of length 0 are zero, not its initial state.
#
# One would expect a sequence without steps to end in its initial state, initial_h and initial_c. A stream
# that is cut into pieces needs this, because a sequence may have no step in one piece. But LSTM, GRU and RNN
# give zeros, and the state is lost without an error. A second sequence, of length 1, shows that the initial
# states are read. The specification does not define this case: sequence_lens are "lengths of the sequences",
# Y_h is "the last output value of the hidden", and a sequence without steps has no output. onnx/onnx#1674
# asked for a definition, and says that TensorFlow gives the initial state; it was closed as stale.
# microsoft/onnxruntime#749 allowed lengths of 0. (In torch, pack_padded_sequence refuses them.) To keep the
# state, add a Where after the node. On Linux, x86-64, Python 3.12, with initial states of 0.5, the script
# prints:
#     LSTM length 0: Y_h 0.0, Y_c 0.0   length 1: off the equations' by 7e-08
#     GRU  length 0: Y_h 0.0   length 1: off the equations' by 9e-10
#     RNN  length 0: Y_h 0.0   length 1: off the equations' by 4e-08
#
# The script exits with 0 if this is still so, and with 1 if it has changed.
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
    """Makes a file of one node without bias; all weights are inputs of the file."""
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
    """Y_h and Y_c after one step if x and W are zero and R is the identity for every gate."""
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

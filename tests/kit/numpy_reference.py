"""The layers in numpy, as simply as they can be written, and their derivatives.

Serves float32, float64 and complex numbers: a step of 1e-100 along the imaginary axis gives an
exact derivative in any direction (Squire & Trapp 1998), so that no gradient is derived by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Of each direction: w_ih [G*H, I], w_hh [G*H, P], b_ih, b_hh [G*H], w_hr [P, H]; None if absent.
Weights = list[list["Array | None"]]

WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
GATES = {"lstm": 4, "lstm_proj": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def relu(x: Array) -> Array:
    return np.where(x.real > 0, x, 0 * x)


def step(
    cell: str, x: Array, h: Array, c: Array | None, w: list[Array | None]
) -> tuple[Array, Array | None]:
    """One step of x [n, I], h [n, P], c [n, H]."""
    w_ih, w_hh, b_ih, b_hh, w_hr = w
    assert w_ih is not None and w_hh is not None
    b_x = np.zeros(len(w_ih), x.dtype) if b_ih is None else b_ih
    b_h = np.zeros(len(w_ih), x.dtype) if b_hh is None else b_hh
    from_x = np.split(x @ w_ih.T + b_x, GATES[cell], axis=1)
    if cell == "gru_reset_before":
        W_r, W_z, W_n = np.split(w_hh, 3)
        b_r, b_z, b_n = np.split(b_h, 3)
        r = sigmoid(from_x[0] + h @ W_r.T + b_r)
        z = sigmoid(from_x[1] + h @ W_z.T + b_z)
        n = np.tanh(from_x[2] + (r * h) @ W_n.T + b_n)
        return (1 - z) * n + z * h, None
    from_h = np.split(h @ w_hh.T + b_h, GATES[cell], axis=1)
    if cell == "gru":
        r = sigmoid(from_x[0] + from_h[0])
        z = sigmoid(from_x[1] + from_h[1])
        n = np.tanh(from_x[2] + r * from_h[2])
        return (1 - z) * n + z * h, None
    if cell.startswith("rnn"):
        return {"rnn_tanh": np.tanh, "rnn_relu": relu}[cell](from_x[0] + from_h[0]), None
    i, f, g, o = (a + b for a, b in zip(from_x, from_h, strict=True))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    return h if w_hr is None else h @ w_hr.T, c


def layer(
    cell: str, x: Array, weights: Weights, batch_sizes: list[int], h0: Array, c0: Array | None
) -> dict[str, Array]:
    """y [S, D*P], h_n [D, N, P] and c_n [D, N, H] of packed rows x [S, I]."""
    h, c = h0.copy(), None if c0 is None else c0.copy()
    first = np.concatenate([[0], np.cumsum(batch_sizes)]).astype(int)
    P = h0.shape[2]
    y = np.empty((len(x), len(weights) * P), x.dtype)
    for d, w in enumerate(weights):
        steps = range(len(batch_sizes))
        for t in reversed(steps) if d == 1 else steps:
            n = batch_sizes[t]
            rows = slice(first[t], first[t] + n)
            c_t = None if c is None else c[d, :n]
            h[d, :n], c_t = step(cell, x[rows], h[d, :n], c_t, w)
            if c is not None:
                c[d, :n] = c_t
            y[rows, d * P : (d + 1) * P] = h[d, :n]
    return {"y": y, "h_n": h} | ({} if c is None else {"c_n": c})


def derivative(
    inputs: dict[str, Any], name: str, direction: Array, loss_weights: dict[str, Array]
) -> float:
    """d/ds of Σ outputs · loss_weights, for the input `name` moved by s times a direction.

    Args:
        inputs: the arguments of `layer`.
        name: one of x, h0, c0, or a name of WEIGHTS and the number of its direction, "w_ih 1".
        direction: the shape of that input.
        loss_weights: for each output of `layer`.
    """
    tiny = 1e-100

    def moved(array: Array | None, own_name: str) -> Array | None:
        if array is None:
            return None
        return array + 1j * tiny * direction if own_name == name else array + 0j

    changed = dict(inputs)
    for own_name in ("x", "h0", "c0"):
        changed[own_name] = moved(inputs[own_name], own_name)
    changed["weights"] = [
        [moved(a, f"{own_name} {d}") for own_name, a in zip(WEIGHTS, w, strict=True)]
        for d, w in enumerate(inputs["weights"])
    ]
    outputs = layer(**changed)
    return sum(float(np.sum(outputs[k].imag * v)) for k, v in loss_weights.items()) / tiny

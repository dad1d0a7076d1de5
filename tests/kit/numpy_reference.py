"""The layers in numpy, written as simply as possible, and their derivatives.

The code works with float32, float64 and complex numbers. A step of 1e-100 along the imaginary axis
gives an exact derivative in any direction (Squire & Trapp 1998), so no gradient is derived by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fusedrnn import _reference

Array = np.ndarray[Any, Any]
# The parameters of a direction: w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh [G*H], w_hr [P, H] and
# w_ch [K*H]. An absent parameter is None.
WEIGHTS = {  # the value is the name in Python
    "w_ih": "weight_ih",
    "w_hh": "weight_hh",
    "b_ih": "bias_ih",
    "b_hh": "bias_hh",
    "w_hr": "weight_hr",
    "w_ch": "weight_ch",
}
Weights = list[list["Array | None"]]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def relu(x: Array) -> Array:
    return np.where(x.real > 0, x, 0 * x)


def products(v: Array, weight: Array, bias: Array | None, gates: int) -> list[Array]:
    """v Wᵀ + b, one array [n, H] for each gate."""
    product = v @ weight.T
    return np.split(product if bias is None else product + bias, gates, axis=1)


def sums(x: Array, h: Array, w: dict[str, Any], gates: int) -> tuple[list[Array], list[Array]]:
    """x W + b_ih and h U + b_hh."""
    return products(x, w["w_ih"], w["b_ih"], gates), products(h, w["w_hh"], w["b_hh"], gates)


def lstm(x: Array, h: Array, c: Array, w: dict[str, Any]) -> tuple[Array, Array]:
    i, f, g, o = (a + b for a, b in zip(*sums(x, h, w, 4), strict=True))
    p_i, p_f, p_o = (0, 0, 0) if w["w_ch"] is None else np.split(w["w_ch"], 3)
    before = c
    c = sigmoid(f + p_f * before) * before + sigmoid(i + p_i * before) * np.tanh(g)
    h = sigmoid(o + p_o * c) * np.tanh(c)
    return h if w["w_hr"] is None else h @ w["w_hr"].T, c


def gru(x: Array, h: Array, c: None, w: dict[str, Any]) -> tuple[Array, None]:
    from_x, from_h = sums(x, h, w, 3)
    r = sigmoid(from_x[0] + from_h[0])
    z = sigmoid(from_x[1] + from_h[1])
    n = np.tanh(from_x[2] + r * from_h[2])
    return (1 - z) * n + z * h, None


def gru_reset_before(x: Array, h: Array, c: None, w: dict[str, Any]) -> tuple[Array, None]:
    from_x = products(x, w["w_ih"], w["b_ih"], 3)
    W_r, W_z, W_n = np.split(w["w_hh"], 3)
    b_hh = np.zeros(len(w["w_hh"]), x.dtype) if w["b_hh"] is None else w["b_hh"]
    b_r, b_z, b_n = np.split(b_hh, 3)
    r = sigmoid(from_x[0] + h @ W_r.T + b_r)
    z = sigmoid(from_x[1] + h @ W_z.T + b_z)
    n = np.tanh(from_x[2] + (r * h) @ W_n.T + b_n)
    return (1 - z) * n + z * h, None


def rnn(x: Array, h: Array, w: dict[str, Any]) -> Array:
    """The argument of the activation."""
    (from_x,), (from_h,) = sums(x, h, w, 1)
    return from_x + from_h


# One step of each cell: (x [n, I], h [n, P], c [n, H], parameters by name) -> (h, c). A cell that
# takes a number with each row finds it as [n, 1] beside the parameters, with the name "row_input".
STEPS: dict[str, Callable[..., tuple[Array, Any]]] = {
    "lstm": lstm,
    "lstm_proj": lstm,
    "gru": gru,
    "gru_reset_before": gru_reset_before,
    "rnn_tanh": lambda x, h, c, w: (np.tanh(rnn(x, h, w)), None),
    "rnn_relu": lambda x, h, c, w: (relu(rnn(x, h, w)), None),
    "lstm_peephole": lstm,
}


def step_of(cell: str) -> Callable[..., tuple[Array, Any]]:
    """The step of a cell from STEPS, or from its definition in plain torch if STEPS has none."""
    if cell in STEPS:
        return STEPS[cell]

    def step(x: Array, h: Array, c: Array | None, w: dict[str, Any]) -> tuple[Array, Any]:
        named = {
            WEIGHTS[name]: torch.from_numpy(array) for name, array in w.items() if array is not None
        }
        gates_x = torch.from_numpy(x) @ named["weight_ih"].T + named.get("bias_ih", 0)
        before = None if c is None else torch.from_numpy(c)
        new_h, new_c = _reference.STEPS[cell](gates_x, torch.from_numpy(h), before, named)
        return new_h.numpy(), None if new_c is None else new_c.numpy()

    return step


def layer(
    cell: str,
    x: Array,
    weights: Weights,
    batch_sizes: list[int],
    h0: Array,
    c0: Array | None,
    row_input: Array | None = None,
    c_in_y: bool = False,
) -> dict[str, Array]:
    """y [S, D*P], h_n [D, N, P] and c_n [D, N, H] of packed rows x [S, I] and row_input [S].

    With c_in_y, y is [S, D*P + D*H] and has c of every row too.
    """
    h, c = h0.copy(), None if c0 is None else c0.copy()
    first = np.concatenate([[0], np.cumsum(batch_sizes)]).astype(int)
    P = h0.shape[2]
    y = np.empty((len(x), len(weights) * P), x.dtype)
    all_c = None if c is None else np.empty((len(x), len(weights) * c.shape[2]), x.dtype)
    for d, w in enumerate(weights):
        given = dict(zip(WEIGHTS, w, strict=True))
        steps = range(len(batch_sizes))
        for t in reversed(steps) if d == 1 else steps:
            n = batch_sizes[t]
            rows = slice(first[t], first[t] + n)
            c_t = None if c is None else c[d, :n]
            if row_input is not None:
                given["row_input"] = row_input[rows, None]
            h[d, :n], c_t = step_of(cell)(x[rows], h[d, :n], c_t, given)
            if c is not None:
                c[d, :n] = c_t
                all_c[rows, d * c.shape[2] : (d + 1) * c.shape[2]] = c_t
            y[rows, d * P : (d + 1) * P] = h[d, :n]
    if c_in_y:
        y = np.concatenate([y, all_c], axis=1)
    return {"y": y, "h_n": h} | ({} if c is None else {"c_n": c})


def derivative(
    inputs: dict[str, Any], name: str, direction: Array, loss_weights: dict[str, Array]
) -> float:
    """d/ds of Σ outputs · loss_weights, where s times a direction is added to the input `name`.

    Args:
        inputs: the arguments of `layer`.
        name: x, h0, c0, or a name of WEIGHTS and the number of the direction, as in "w_ih 1".
        direction: an array of the shape of that input.
        loss_weights: the gradient of each output of `layer`.
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

"""The layers in JAX, under jit: x W for all steps at once, then lax.scan; gradients by vjp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor

from ..cases import Case, live, padded
from ..shapes import FORWARD, Row
from . import Ready, Unsupported

VERSION_OF = ("jax", "jaxlib")
Params = dict[str, Any]  # by torch's names; matrices are transposed to [I, G*H], for x @ W


def prepare(case: Case, threads: int, mode: str) -> Ready:
    """Compiles a row. JAX uses as many threads as the process may use cores."""
    row = case.row
    if row.single:
        raise Unsupported("layers only")
    if row.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    dtype = getattr(jnp, row.dtype)

    def array(tensor: Tensor) -> Any:
        wide = tensor.detach() if row.dtype == "float64" else tensor.detach().float()
        return jnp.asarray(wide.numpy(), dtype)

    params = {name: array(p.detach().t()) for name, p in case.torch.named_parameters()}
    x_padded, lengths = padded(case)
    x, mask = array(x_padded), None
    if row.packed:
        mask = jnp.arange(row.T)[:, None, None] < jnp.asarray(lengths.numpy())[None, :, None]

    forward = jax.jit(lambda params, x: _layers(row, params, x, mask))
    if mode == FORWARD:
        return Ready(
            lambda: jax.block_until_ready(forward(params, x)),
            lambda y: {"y": live(case, _tensor(y))},
        )
    d_y = array(_unpacked(case))

    @jax.jit
    def training(params: Params, x: Any, d_y: Any) -> Any:
        y, pull = jax.vjp(lambda params, x: _layers(row, params, x, mask), params, x)
        return y, *pull(d_y)

    def read(results: Any) -> dict[str, Tensor]:
        y, d_params, d_x = results
        found = {f"d_{name}": _tensor(d).t() for name, d in d_params.items()}
        return found | {"y": live(case, _tensor(y)), "d_x": live(case, _tensor(d_x))}

    return Ready(lambda: jax.block_until_ready(training(params, x, d_y)), read)


def _layers(row: Row, params: Params, x: Any, mask: Any) -> Any:
    """Returns y [T, N, D*P] for x [T, N, I]; mask [T, N, 1] is false beyond a length."""
    for layer in range(row.L):
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: row.D]
        x = jnp.concatenate([_direction(row, params, s, x, mask) for s in suffixes], axis=-1)
    return x


def _direction(row: Row, params: Params, suffix: str, x: Any, mask: Any) -> Any:
    U, b_h = params["weight_hh" + suffix], params["bias_hh" + suffix]
    P = params.get("weight_hr" + suffix)
    gates_x = x @ params["weight_ih" + suffix] + params["bias_ih" + suffix]
    if row.cell != "gru":
        gates_x = gates_x + b_h

    def step(state: Any, now: Any) -> Any:
        gates, alive = now
        h, c = state
        if row.cell == "lstm":
            i, f, g, o = jnp.split(gates + h @ U, 4, axis=-1)
            c_next = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_next = jax.nn.sigmoid(o) * jnp.tanh(c_next)
            h_next = h_next if P is None else h_next @ P
        elif row.cell == "gru":
            gates_h = h @ U + b_h
            r, z = jnp.split(jax.nn.sigmoid((gates + gates_h)[:, : 2 * row.H]), 2, axis=-1)
            n = jnp.tanh(gates[:, 2 * row.H :] + r * gates_h[:, 2 * row.H :])
            h_next, c_next = (1 - z) * n + z * h, c
        else:
            h_next, c_next = jnp.tanh(gates + h @ U), c
        if alive is None:
            return (h_next, c_next), h_next
        state = jnp.where(alive, h_next, h), jnp.where(alive, c_next, c)
        return state, jnp.where(alive, h_next, 0)

    h = jnp.zeros((row.N, row.out), x.dtype)
    c = jnp.zeros((row.N, row.H if row.cell == "lstm" else 0), x.dtype)
    _, y = lax.scan(step, (h, c), (gates_x, mask), reverse=suffix.endswith("reverse"))
    return y


def _tensor(array: Any) -> Tensor:
    wide = array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array
    return torch.from_numpy(np.array(wide))


def _unpacked(case: Case) -> Tensor:
    """The gradient of y as [T, N, D*P], zero beyond a length."""
    if not case.row.packed:
        return case.d_y
    return padded(Case(case.row, case.torch, case.ours, case.x._replace(data=case.d_y), case.d_y))[
        0
    ]

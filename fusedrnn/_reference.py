"""The reference: a layer in plain differentiable torch operations, which defines the right results.

Double backward runs through it, and the tests compare the kernels with it. It is slow, because it
is a Python loop over the steps. Forward and the first backward of a layer do not use it. Only a
cell module does if it has no input features or no units, for which there are no kernels.

It computes in the input's dtype, and in float32 for 16-bit types, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import CELLS
from ._options import Batch, Options

# The parameters of one direction, by name.
Named = Mapping[str, Tensor]
# One step of n sequences: (x W + b_ih [n, G*H], h [n, P], c [n, H] or None, parameters) -> h, c.
Step = Callable[[Tensor, Tensor, "Tensor | None", Named], "tuple[Tensor, Tensor | None]"]


def _lstm(gates_x: Tensor, h: Tensor, c: Tensor | None, w: Named) -> tuple[Tensor, Tensor | None]:
    assert c is not None
    i, f, g, o = (gates_x + F.linear(h, w["weight_hh"], w.get("bias_hh"))).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_proj(
    gates_x: Tensor, h: Tensor, c: Tensor | None, w: Named
) -> tuple[Tensor, Tensor | None]:
    h, c = _lstm(gates_x, h, c, w)
    return F.linear(h, w["weight_hr"]), c


def _lstm_peephole(
    gates_x: Tensor, h: Tensor, c: Tensor | None, w: Named
) -> tuple[Tensor, Tensor | None]:
    assert c is not None
    i, f, g, o = (gates_x + F.linear(h, w["weight_hh"], w.get("bias_hh"))).chunk(4, dim=-1)
    p_i, p_f, p_o = w["weight_ch"].chunk(3)
    i, f = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


def _gru(gates_x: Tensor, h: Tensor, c: Tensor | None, w: Named) -> tuple[Tensor, Tensor | None]:
    x_r, x_z, x_n = gates_x.chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, w["weight_hh"], w.get("bias_hh")).chunk(3, dim=-1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h, None


def _gru_reset_before(
    gates_x: Tensor, h: Tensor, c: Tensor | None, w: Named
) -> tuple[Tensor, Tensor | None]:
    H = h.size(-1)
    bias = w.get("bias_hh")
    w_rz, w_n = w["weight_hh"].split([2 * H, H])
    b_rz, b_n = (None, None) if bias is None else bias.split([2 * H, H])
    x_rz, x_n = gates_x.split([2 * H, H], dim=-1)
    r, z = torch.sigmoid(x_rz + F.linear(h, w_rz, b_rz)).chunk(2, dim=-1)
    n = torch.tanh(x_n + F.linear(r * h, w_n, b_n))
    return (1 - z) * n + z * h, None


def _rnn(phi: Callable[[Tensor], Tensor]) -> Step:
    def step(
        gates_x: Tensor, h: Tensor, c: Tensor | None, w: Named
    ) -> tuple[Tensor, Tensor | None]:
        return phi(gates_x + F.linear(h, w["weight_hh"], w.get("bias_hh"))), None

    return step


STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "lstm_proj": _lstm_proj,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
    "rnn_tanh": _rnn(torch.tanh),
    "rnn_relu": _rnn(torch.relu),
    "lstm_peephole": _lstm_peephole,
}


def _begun(starts: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns h and c of n sequences, zero for those that begin anew; starts is [n]."""
    begins = starts.unsqueeze(1)
    zero = h.new_zeros(())
    return torch.where(begins, zero, h), None if c is None else torch.where(begins, zero, c)


def _direction(
    x: Tensor,  # [S, I]
    batch_sizes: list[int],
    starts: Tensor | None,  # [S]
    h0: Tensor,  # [N, P]
    c0: Tensor | None,  # [N, H]
    weights: Sequence[Tensor],
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Runs one direction over packed rows.

    Returns h of every row [S, P], c of every row [S, H] or None, h_n [N, P] and c_n [N, H] or None.
    """
    step = STEPS[cell]
    w = CELLS[cell].named(weights)
    w_ih, b_ih = w["weight_ih"], w.get("bias_ih")
    if not batch_sizes:  # no live row; a step of 0 rows keeps y connected to all inputs
        h_none, c_none = step(F.linear(x, w_ih, b_ih), h0[:0], None if c0 is None else c0[:0], w)
        return h_none, c_none, h0, c0

    gates_x = F.linear(x, w_ih, b_ih).split(batch_sizes)
    begins = None if starts is None else starts.split(batch_sizes)
    T = len(batch_sizes)
    n = batch_sizes[-1 if reverse else 0]
    h, c = h0[:n], None if c0 is None else c0[:n]
    ended: list[tuple[Tensor, Tensor | None]] = []
    h_rows: list[Tensor] = [h] * T
    c_rows: list[Tensor | None] = [c] * T
    for t in reversed(range(T)) if reverse else range(T):
        if reverse and begins is not None and t + 1 < T:  # nothing goes from a beginning on to t
            h, c = _begun(begins[t + 1], h, c)
        n, before = batch_sizes[t], h.size(0)
        if n < before:  # first direction: the shortest sequences have ended
            ended.append((h[n:], None if c is None else c[n:]))
            h, c = h[:n], None if c is None else c[:n]
        elif n > before:  # second direction: more sequences begin, each at its end
            h = torch.cat([h, h0[before:n]])
            c = None if c is None or c0 is None else torch.cat([c, c0[before:n]])
        if begins is not None and not reverse:  # nothing comes from before a beginning
            h, c = _begun(begins[t], h, c)
        h, c = step(gates_x[t], h, c, w)
        h_rows[t], c_rows[t] = h, c
    h_n = torch.cat([h, *(e[0] for e in reversed(ended))])
    c_n = (
        None if c is None else torch.cat([c, *(e[1] for e in reversed(ended) if e[1] is not None)])
    )
    all_c = None if c is None else torch.cat([c_t for c_t in c_rows if c_t is not None])
    return torch.cat(h_rows), all_c, h_n, c_n


def _packed(
    x: Tensor,
    batch_sizes: list[int],
    starts: Tensor | None,  # [S]
    h0: Tensor,  # [D, N, P]
    c0: Tensor | None,  # [D, N, H]
    weights: Sequence[Tensor],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    D = h0.size(0)
    k = len(weights) // D
    results = [
        _direction(
            x,
            batch_sizes,
            starts,
            h0[d],
            None if c0 is None else c0[d],
            weights[d * k : (d + 1) * k],
            options.cell,
            reverse=d == 1,
        )
        for d in range(D)
    ]
    of_steps = [r[0] for r in results]
    if options.c_in_y:
        of_steps += [r[1] for r in results if r[1] is not None]
    h_n = torch.stack([r[2] for r in results])
    c_n = None if c0 is None else torch.stack([r[3] for r in results if r[3] is not None])
    return torch.cat(of_steps, dim=-1), h_n, c_n


def _with_lengths(
    x: Tensor,  # [T, N, I]
    lengths: Tensor,  # [N]
    starts: Tensor | None,  # [T, N]
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gathers the live rows, runs them packed and scatters the results; it never reads padding."""
    T, N, I = x.shape
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    live = sorted_lengths[sorted_lengths > 0]
    order = order[: len(live)]
    steps = int(live[0]) if len(live) else 0
    t = torch.arange(steps, device=lengths.device).unsqueeze(1)
    alive = live.unsqueeze(0) > t  # [steps, live]
    rows = (t * N + order.unsqueeze(0))[alive].to(x.device)
    order = order.to(x.device)

    y_live, h_live, c_live = _packed(
        x.reshape(T * N, I)[rows],
        alive.sum(dim=1).tolist(),
        None if starts is None else starts.reshape(T * N)[rows],
        h0[:, order],
        None if c0 is None else c0[:, order],
        weights,
        options,
    )
    y = y_live.new_zeros(T * N, y_live.size(-1)).index_copy(0, rows, y_live).view(T, N, -1)
    h_n = h0.index_copy(1, order, h_live)
    c_n = None if c0 is None or c_live is None else c0.index_copy(1, order, c_live)
    return y, h_n, c_n


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch: Batch,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs one layer over a batch of sequences, in one or both directions.

    Args:
        x: input, ``[T, N, I]``, or packed rows ``[S, I]`` with ``batch.batch_sizes``.
        h0: initial h, ``[D, N, P]``; None means zeros.
        c0: initial c, ``[D, N, H]``; None means zeros; ignored for cells without c.
        weights: for each direction the cell's parameters, in the order of `CELLS`; biases may be
            left out.
        batch: the sequences.
        options: a cell of ``STEPS``, and whether there are weights and states of two directions.

    Returns:
        y ``[T, N, D*P]`` (zero beyond a sequence's length) or ``[S, D*P]``, h_n ``[D, N, P]`` and
        c_n ``[D, N, H]``, or None for cells without c. They have the dtype of x, but c_n has that
        of c0 if c0 is given. With ``options.c_in_y`` y has c of every step behind h, D*H features
        more.
    """
    cell, lengths, starts, N = options.cell, batch.lengths, batch.starts, batch.size
    D = 2 if options.bidirectional else 1
    dtype = x.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    sizes: list[int] | None = None if batch.batch_sizes is None else batch.batch_sizes.tolist()
    with torch.autocast(x.device.type, enabled=False):
        weights = [w.to(wide) for w in weights]
        rows = x.to(wide)
        H = weights[0].size(0) // CELLS[cell].gates
        h = rows.new_zeros(D, N, weights[1].size(1)) if h0 is None else h0.to(wide)
        c = None
        if CELLS[cell].has_c:
            c = rows.new_zeros(D, N, H) if c0 is None else c0.to(wide)

        if lengths is not None:
            y, h_n, c_n = _with_lengths(rows, lengths, starts, h, c, weights, options)
        elif sizes is not None:
            y, h_n, c_n = _packed(rows, sizes, starts, h, c, weights, options)
        else:
            T = x.size(0)
            rows = rows.reshape(T * N, x.size(-1))
            starts = None if starts is None else starts.reshape(T * N)
            y, h_n, c_n = _packed(rows, [N] * T, starts, h, c, weights, options)
            y = y.view(T, N, y.size(-1))
    if c_n is not None:
        c_n = c_n.to(dtype if c0 is None else c0.dtype)
    return y.to(dtype), h_n.to(dtype), c_n

"""torch.compile of an unrolled loop over the steps, with x W computed for all steps at once."""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case, with_grad
from ..shapes import FORWARD, Row
from . import Ready, Unsupported

VERSION_OF = ("torch",)
# Compiling a loop with more steps takes minutes.
LONGEST = 32


def prepare(case: Case, threads: int, mode: str) -> Ready:
    """Compiles a row, forward and backward."""
    row = case.row
    if row.single or row.packed or row.P or row.L * row.D > 1:
        raise Unsupported("only plain single layers were written as a loop")
    if row.T > LONGEST:
        raise Unsupported(f"compiles too long for T > {LONGEST}")
    # A pool of compiling processes would still run while the row is timed.
    torch._inductor.config.compile_threads = 1
    compiled = torch.compile(_loop, fullgraph=True, dynamic=False)
    weights = [p.detach().requires_grad_(mode != FORWARD) for p in case.torch.parameters()]
    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return compiled(row, case.x, *weights)

        return Ready(forward, lambda y: {"y": y})
    x, leaf = with_grad(case.x)
    names = ["d_x", *(f"d_{name}" for name, _ in case.torch.named_parameters())]
    leaves = [leaf, *weights]

    def training() -> Tensor:
        for tensor in leaves:
            tensor.grad = None
        y: Tensor = compiled(row, x, *weights)
        y.backward(case.d_y)
        return y.detach()

    def read(y: Tensor) -> dict[str, Tensor]:
        grads: dict[str, Any] = {n: t.grad for n, t in zip(names, leaves, strict=True)}
        return grads | {"y": y}

    return Ready(training, read)


def _loop(row: Row, x: Tensor, W: Tensor, U: Tensor, b: Tensor, b_h: Tensor) -> Tensor:
    """Returns y [T, N, H] for x [T, N, I] and torch's weights."""
    h = x.new_zeros(row.N, row.H)
    c = x.new_zeros(row.N, row.H)
    gates_x = F.linear(x, W, b)
    y = []
    for t in range(row.T):
        gates_h = F.linear(h, U, b_h)
        if row.cell == "lstm":
            i, f, g, o = (gates_x[t] + gates_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif row.cell == "gru":
            (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x[t].chunk(3, 1), gates_h.chunk(3, 1)
            z = (z_x + z_h).sigmoid()
            h = (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h
        else:
            h = (gates_x[t] + gates_h).tanh()
        y.append(h)
    return torch.stack(y)

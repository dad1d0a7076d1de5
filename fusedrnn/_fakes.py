"""The fake implementations of the ops, which tell the compiler the shapes of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._library import CELLS, LIBRARY, CellSpec


def _sizes(
    x: Tensor, weights: Sequence[Tensor], cell: str, bidirectional: bool
) -> tuple[int, int, int, list[Any]]:
    """Return D, H, P and the sizes of x without the last, [T, N] or [S]."""
    spec = CELLS[cell]
    directions = 2 if bidirectional else 1
    hidden = weights[0].shape[0] // spec.gates
    return directions, hidden, weights[1].shape[1], list(x.shape[:-1])


def _check_devices(x: Tensor, on_cpu: Sequence[Tensor | None], **others: Any) -> None:
    """Raise RuntimeError if one of `others` is not on x's device, or `on_cpu` not on the CPU."""
    for name, value in others.items():
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if t is not None and t.device != x.device:
                raise RuntimeError(
                    f"fusedrnn: {name} must be on {x.device} as x is, got {t.device}"
                )
    for name, t in zip(("batch_sizes", "lengths"), on_cpu, strict=True):
        if t is not None and t.device.type != "cpu":
            raise RuntimeError(f"fusedrnn: {name} must be on the CPU, got {t.device}")


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and of c inside a call."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _c_dtype(x: Tensor, c0: Tensor | None) -> torch.dtype:
    """The dtype of c_n and of the gradient of c0: that of c0, or of x if there is no c0."""
    return x.dtype if c0 is None else c0.dtype


def _in_pairs(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether the CPU engine multiplies pairs of bfloat16 and keeps bfloat16; sizes = I, H, P."""
    return (
        dtype == torch.bfloat16
        and LIBRARY.multiplies_pairs
        and all(size % 2 == 0 for size in sizes)
    )


class _Sizes(NamedTuple):
    """The sizes of a call, as ints or symbols."""

    rows: Any  # S for packed rows, else T*N
    saved_rows: Any  # rows of saved; N for cells that save h, unless sequences may begin inside
    D: int
    H: Any
    P: Any


def _reserve_bytes(
    spec: CellSpec, sizes: _Sizes, stored_bytes: int, c_bytes: int, alignment: int
) -> Any:
    """The size of the reserve in bytes, on any device; csrc/layer/reserve.h has the same layout.

    Each direction has saved [saved_rows, saved*H], h_in [rows, P], c_in [rows, H] for cells with c,
    and emit [rows, H] for cells with two stages.

    Args:
        spec: the cell.
        sizes: the sizes of the call.
        stored_bytes: the bytes of a value other than c.
        c_bytes: the bytes of a value of c.
        alignment: c_in and each direction begin at a multiple of this many bytes.
    """

    def aligned(size: Any) -> Any:
        if alignment == stored_bytes:  # without a division, which would complicate symbols
            return size
        return (size + alignment - 1) // alignment * alignment

    rows, saved_rows, D, H, P = sizes
    one = (saved_rows * spec.saved * H + rows * P) * stored_bytes
    if spec.has_c:
        one = aligned(one) + rows * H * c_bytes
    if spec.stages > 1:
        one = one + rows * H * stored_bytes
    return D * aligned(one)


def _empty_reserve(x: Tensor, cell: str, sizes: _Sizes) -> Tensor:
    """Return an empty tensor with the size and dtype of the reserve."""
    compute = _compute_dtype(x)
    stored = x.dtype
    if x.device.type != "cuda" and not _in_pairs(x.dtype, x.shape[-1], sizes.H, sizes.P):
        stored = compute
    size = _reserve_bytes(
        CELLS[cell], sizes, stored.itemsize, compute.itemsize, alignment=compute.itemsize
    )
    if x.device.type == "cuda":
        return x.new_empty([size], dtype=torch.uint8)
    return x.new_empty([size // compute.itemsize], dtype=compute)


@torch.library.register_fake("fusedrnn::forward")
def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    batch: int,
    cell: str,
    bidirectional: bool,
    keep: bool,
    starts: Tensor | None = None,
    c_in_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(x, (batch_sizes, lengths), h0=h0, c0=c0, weights=weights, starts=starts)
    spec = CELLS[cell]
    directions, hidden, width, lead = _sizes(x, weights, cell, bidirectional)
    rows: Any = 1
    for size in lead:
        rows = rows * size
    saved_rows = rows if starts is not None or not spec.saves_h else batch
    kept = _Sizes(rows, saved_rows, directions, hidden, width)
    if not keep:
        kept = kept._replace(rows=0, saved_rows=0)
    return (
        x.new_empty([*lead, directions * (width + hidden if c_in_y else width)]),
        x.new_empty([directions, batch, width]),
        x.new_empty([directions, batch, hidden], dtype=_c_dtype(x, c0))
        if spec.has_c
        else x.new_empty([0]),
        _empty_reserve(x, cell, kept),
    )


@torch.library.register_fake("fusedrnn::backward")
def _backward_fake(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    batch: int,
    cell: str,
    bidirectional: bool,
    need_x: bool,
    need_state: bool,
    need_weights: bool,
    starts: Tensor | None = None,
    c_in_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    states = {"grad_y": grad_y, "grad_h": grad_h, "grad_c": grad_c, "h0": h0, "c0": c0}
    states["starts"] = starts
    _check_devices(x, (batch_sizes, lengths), **states, weights=weights, reserve=reserve)
    directions, hidden, width, _ = _sizes(x, weights, cell, bidirectional)
    has_c = CELLS[cell].has_c
    # The CPU engine returns the gradients of weights in the dtype of their sums.
    summed = x.dtype if x.device.type == "cuda" else _compute_dtype(x)
    return (
        x.new_empty(x.shape if need_x else [0]),
        x.new_empty([directions, batch, width] if need_state else [0]),
        x.new_empty([directions, batch, hidden], dtype=_c_dtype(x, c0))
        if need_state and has_c
        else x.new_empty([0]),
        [w.new_empty(w.shape, dtype=summed) for w in weights] if need_weights else [],
    )

"""Calls of `_ops.layer` for tests of the ops, with every cell and every form of batch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn._library import CELLS
from fusedrnn._options import Batch, Options

FORMS = ("plain", "packed", "lengths")


@dataclasses.dataclass
class LayerArguments:
    """Arguments of `_ops.layer`. The tensors are leaves that require grad."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    batch: Batch
    options: Options

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.h0, self.c0, *self.weights) if t is not None]

    def with_leaves(self, leaves: Sequence[Tensor]) -> LayerArguments:
        """The same call with other tensors, which are in the order of `leaves`."""
        rest = iter(leaves)
        x, h0, c0 = (None if t is None else next(rest) for t in (self.x, self.h0, self.c0))
        assert x is not None
        return dataclasses.replace(self, x=x, h0=h0, c0=c0, weights=list(rest))

    @property
    def has_new_options(self) -> bool:
        """Whether the call has options that programs of earlier versions do not pass."""
        return self.batch.starts is not None or self.options.c_in_y

    def run(self, layer: Any) -> list[Tensor]:
        """Outputs of `_ops.layer`, or of another function with the same arguments."""
        result = layer(self.x, self.h0, self.c0, self.weights, self.batch, self.options)
        return [t for t in result if t is not None]

    def op_arguments(self, keep: bool = True) -> tuple[Any, ...]:
        """Arguments of `torch.ops.fusedrnn.forward`."""
        return (
            *(self.x, self.h0, self.c0, self.weights),
            *(self.batch.batch_sizes, self.batch.lengths, self.batch.size),
            *(self.options.cell, self.options.bidirectional, keep),
            *((self.batch.starts, self.options.c_in_y) if self.has_new_options else ()),
        )


def other_memory(t: Tensor) -> list[Tensor]:
    """Copies of a tensor in other memory: strided, and at addresses that are not aligned."""
    strided = torch.stack([t, t.neg() if t.is_floating_point() else t], -1)[..., 0]
    late = t.new_empty(1 + t.numel())[1:].view(t.shape).copy_(t)
    raw = bytearray(t.numel() * t.itemsize + 1)
    unaligned = torch.frombuffer(raw, dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)
    unaligned.copy_(t)
    assert not strided.is_contiguous() and unaligned.data_ptr() % 2
    return [strided, late, unaligned]


def make_arguments(
    cell: str,
    form: str = "plain",
    T: int = 5,
    N: int = 3,
    I: int = 4,
    H: int = 6,
    D: int = 2,
    bias: bool = True,
    states: bool = True,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
    device: torch.device | None = None,
    exact_in: torch.dtype | None = None,
    starts: float | None = None,
    c_in_y: bool = False,
) -> LayerArguments:
    """Random arguments, drawn with torch's seed. P is H / 2 if the cell projects.

    Args:
        form: one of FORMS. With "packed" the rows are packed and sorted by length, with "lengths"
            they are padded.
        exact_in: a dtype to which every number is rounded first, so that all wider dtypes hold the
            same numbers.
        starts: the probability that a sequence begins at a step; None for a call without starts.
        c_in_y: whether y also has c of every step, if the cell has c.
    """
    spec = CELLS[cell]
    P = max(1, H // 2) if spec.projects else H

    def leaf(*shape: int, scale: float = 1) -> Tensor:
        values = scale * torch.randn(*shape, dtype=torch.float64)
        rounded = values if exact_in is None else values.to(exact_in)
        return rounded.to(device, dtype).requires_grad_(requires_grad)

    # With large weights small errors grow so fast that results differ after a few steps.
    scale = H**-0.5
    weights: list[Tensor] = []
    for p in spec.parameters_with(bias) * D:
        recurrent = len(p.sizes) == 2 and p.sizes[-1] != "I"
        size = p.shape(G=spec.gates, H=H, I=I, P=P)
        weights.append(leaf(*size, scale=scale if recurrent else 1))
    batch = Batch(None, None, N)
    picked = random.Random(T * 100 + N)
    lengths = [T, *(picked.randint(0, T) for _ in range(N - 1))] if N else []
    picked.shuffle(lengths)
    if form == "packed":
        lengths = sorted((max(1, length) for length in lengths), reverse=True)
        sizes = [sum(length > t for length in lengths) for t in range(lengths[0])]
        batch = batch._replace(batch_sizes=torch.tensor(sizes))
        x = leaf(sum(lengths), I)
    else:
        x = leaf(T, N, I)
        if form == "lengths":
            batch = batch._replace(lengths=torch.tensor(lengths, dtype=torch.int64))
    if starts is not None:
        batch = batch._replace(starts=(torch.rand(x.shape[:-1]) < starts).to(device))
    h0 = leaf(D, N, P) if states else None
    c0 = leaf(D, N, H) if states and spec.has_c else None
    options = Options(cell, D == 2, c_in_y and spec.has_c)
    return LayerArguments(x, h0, c0, weights, batch, options)


CELLS_AND_FORMS = [(cell, form) for cell in CELLS for form in FORMS]

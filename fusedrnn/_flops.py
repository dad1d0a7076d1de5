"""The FLOPs that `torch.utils.flop_counter.FlopCounterMode` counts for the ops.

They follow torch's rule: a multiply-add of a product counts as two, and elementwise work as zero.
A layer has the same count as torch.nn's layer if that runs as separate torch ops, but padding is
not counted.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._library import CELLS

__all__ = ["register"]

_COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Gives the formulas to torch's counter, now or when a program imports it.

    This function does not import the counter, which few programs use: with CUDA the counter imports
    triton, which takes a few tenths of a second.
    """
    if _COUNTER in sys.modules:
        _add_formulas(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """An import hook, which adds the formulas to torch's counter after its import."""

    searching = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _add_formulas(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _add_formulas(counter: ModuleType) -> None:
    for name, formula in (
        ("forward", _forward),
        ("backward", _backward),
        ("double_backward", _double_backward),
    ):
        op = getattr(torch.ops.fusedrnn, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


def _steps(x: Tensor, batch: int, batch_sizes: Tensor | None, lengths: Tensor | None) -> Any:
    """The number of rows without padding, and the number of sequences that are not empty."""
    if batch_sizes is not None:
        return x.shape[0], batch
    # The values of a fake tensor are unknown. Then every sequence counts with T steps.
    if type(lengths) is Tensor and not lengths.is_meta:
        return int(lengths.sum()), int((lengths > 0).sum())
    return x.shape[0] * x.shape[1], batch if x.shape[0] > 0 else 0


def _products(weights: Sequence[Tensor], cell: str) -> tuple[int, int, int]:
    """The multiply-adds of one row in one direction: with W, with U and in the projection."""
    P, H = weights[1].shape[1], weights[0].shape[0] // CELLS[cell].gates
    return weights[0].numel(), weights[1].numel(), P * H if CELLS[cell].projects else 0


def _forward(
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
    *_others: Any,
    **_: Any,
) -> Any:
    steps, _sequences = _steps(x, batch, batch_sizes, lengths)
    return 2 * (2 if bidirectional else 1) * steps * sum(_products(weights, cell))


def _backward(
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
    *_others: Any,
    **_: Any,
) -> Any:
    steps, sequences = _steps(x, batch, batch_sizes, lengths)
    of_x, of_h, of_projection = _products(weights, cell)
    count = steps * (of_h + of_projection)  # products that lead from a step to the one before
    if not need_state:
        # Without gradients of the states the first step needs no product with U. A GRU with reset
        # before the product still needs that with U_n, because the delta of r depends on it.
        inner = of_h // CELLS[cell].gates if CELLS[cell].stages > 1 and not of_projection else 0
        count -= sequences * (of_h - inner)
    if need_x:
        count += steps * of_x
    if need_weights:
        count += steps * (of_x + of_h + of_projection)
    return 2 * (2 if bidirectional else 1) * count


def _double_backward(
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    bidirectional: bool,
    *_others: Any,
    **_: Any,
) -> Any:
    """9 times forward: forward again (1), its backward (2), and the derivative of both (6).

    It counts as if all gradients were wanted.
    """
    x, h0, c0, *weights = primals
    assert x is not None
    batch = x.shape[1] if batch_sizes is None else 0
    once = _forward(x, h0, c0, weights, batch_sizes, lengths, batch, cell, bidirectional, True)  # type: ignore[arg-type]
    return 9 * once

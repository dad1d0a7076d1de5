"""Runs every cell with the instruction set of this process, for comparisons between processes.

    FUSEDRNN_ISA=avx2 python -m tests.kit.isa_results FILE

saves the name of the instruction set and all results in the file.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _ops
from fusedrnn._library import CELLS, LIBRARY
from tests.kit.arguments import LayerArguments, make_arguments

# "even sizes" is a packed batch too. Kernels that multiply pairs of bfloat16 need even sizes.
BATCHES = ["plain", "packed", "lengths", "even sizes"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(cell: str, batch: str, dtype: torch.dtype) -> LayerArguments:
    """Arguments of _ops.layer, bidirectional, the same in every dtype but for rounding."""
    torch.manual_seed(list(CELLS).index(cell))
    even = batch == "even sizes"
    I, H = (6, 36) if even else (5, 37)
    form = "packed" if even else batch
    return make_arguments(cell, form, 6, 7, I, H, dtype=dtype, exact_in=torch.bfloat16)


def run(layer: Any, cell: str, batch: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then the gradients of every input."""
    arguments = make(cell, batch, dtype)
    outputs = arguments.run(layer)
    torch.manual_seed(0)
    loss = sum((t * torch.randn(t.shape, dtype=torch.float64).to(dtype)).sum() for t in outputs)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(loss, arguments.leaves))]


def main() -> None:
    results = {
        (cell, batch, dtype): run(_ops.layer, cell, batch, dtype)
        for cell in CELLS
        for batch in BATCHES
        for dtype in DTYPES
    }
    torch.save({"isa": LIBRARY.isa, "results": results}, sys.argv[1])


if __name__ == "__main__":
    main()

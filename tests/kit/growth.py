"""Measures how much memory grows over 1000 calls; test_robustness.py runs it as a process.

    python -m tests.kit.growth

prints JSON, {"lstm training": {"resident": bytes, "allocated": bytes, "objects": count}, ...}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
from pathlib import Path

import torch
from torch.nn.utils.rnn import PackedSequence

from tests.kit.arguments import FORMS
from tests.kit.layers import CELLS, LENGTHS, Cell, make_input, ragged


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2, in which uordblks is the number of allocated bytes."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def allocated_bytes() -> int:
    """The exact number of bytes that malloc has allocated, or 0 with glibc before 2.33."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def growth(cell: Cell, training: bool) -> dict[str, int]:
    """The growth of resident memory, allocated memory and Python objects over 1000 calls."""
    module, _ = cell.make(16, 64, bidirectional=True)
    inputs = [make_input(form, ragged(LENGTHS, 16, torch.float32)) for form in FORMS]

    def calls(count: int) -> None:
        for i in range(count):
            input, kwargs = inputs[i % len(inputs)]
            with torch.set_grad_enabled(training):
                y = module(input, **kwargs)[0]
                if training:
                    (y.data if isinstance(y, PackedSequence) else y).sum().backward()

    def now() -> dict[str, int]:
        gc.collect()
        return {
            "resident": resident_bytes(),
            "allocated": allocated_bytes(),
            "objects": len(gc.get_objects()),
        }

    calls(60)
    before = now()
    calls(1000)
    return {name: after - before[name] for name, after in now().items()}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{cell} {mode}": growth(cell, mode == "training")
                for cell in CELLS
                for mode in ("training", "inference")
            }
        )
    )

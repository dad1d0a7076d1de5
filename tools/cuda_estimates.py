"""Writes the tables of docs/cuda.md: what the plan's model says a layer should take on a GPU.

python -m tools.cuda_estimates docs/cuda.md replaces what stands between the file's markers;
--check exits with 1 where that is not what the model says now.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import fusedrnn

BEGIN, END = "<!-- estimates -->", "<!-- /estimates -->"
T = 100
GPUS = {"H100 SXM": "sm_90", "A100 SXM": "sm_80"}
CELLS = ("lstm", "gru")
HIDDEN = (256, 512, 1024, 2048)
BATCHES = (1, 8, 32, 128)


def cell_of(cell: str, arch: str, N: int, H: int, backward: bool) -> str:
    """One place in a table: regime, microseconds a step, and what limits it."""
    text, step, _, limit = torch.ops.fusedrnn._plan(
        cell, "bf16", [T, N, H, H, H, 1], arch, backward, False, ""
    )
    regime = "resident" if "\nresident" in text else "per step"
    return f"{step:.1f} ({regime}, {limit})"


def tables() -> Iterator[str]:
    """The lines between the markers."""
    for gpu, arch in GPUS.items():
        for cell in CELLS:
            for backward in (False, True):
                which = "backward" if backward else "forward"
                yield ""
                yield f"**{cell.upper()}, {which}, {gpu}** (estimates: µs a step)"
                yield ""
                yield f"| H | {' | '.join(f'N = {N}' for N in BATCHES)} |"
                yield f"| --: |{' :-- |' * len(BATCHES)}"
                for H in HIDDEN:
                    row = [cell_of(cell, arch, N, H, backward) for N in BATCHES]
                    yield f"| {H} | {' | '.join(row)} |"
    yield ""


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    before = options.file.read_text()
    head, rest = before.split(BEGIN)
    tail = rest.split(END)[1]
    after = head + BEGIN + "\n" + "\n".join(tables()) + "\n" + END + tail
    if options.check:
        if before != after:
            print(f"{options.file} is not what `python {sys.argv[0]} {options.file}` makes of it")
        return int(before != after)
    options.file.write_text(after)
    print(f"{options.file}: estimates of fusedrnn {fusedrnn.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

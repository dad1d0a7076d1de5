"""Loads the compiled library and says what is in it."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

import torch

from ._version import __version__


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """Constants of a cell, as the C++ struct of the same name states them."""

    name: str
    gates: int  # G: rows of weight_ih are G*H
    saved: int  # values per unit and step that forward keeps for backward
    has_c: bool  # whether there is a cell state beside h
    stages: int  # products in a step
    projects: bool  # whether h is projected to P < H


@dataclasses.dataclass(frozen=True)
class Library:
    """What the compiled library says of itself."""

    path: Path
    isa: str
    compiled: dict[str, bool]  # instruction set -> whether this processor has it
    cells: dict[str, CellSpec]


def _load() -> Library:
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        raise ImportError(
            f"fusedrnn: the compiled library {path.name} is not in {path.parent}; build it with "
            "`pip install --no-build-isolation .` (or `python setup.py build_ext --inplace`)"
        )
    torch.ops.load_library(str(path))
    isa = ""
    compiled: dict[str, bool] = {}
    cells: dict[str, CellSpec] = {}
    # Raises where FUSEDRNN_ISA names an instruction set that cannot run.
    for line in torch.ops.fusedrnn.info().splitlines():
        key, *words = line.split()
        if key == "isa":
            isa = words[0]
        elif key == "compiled":
            compiled[words[0]] = words[1] == "supported"
        elif key == "cell":
            gates, saved, has_c, stages, projects = map(int, words[1:])
            cells[words[0]] = CellSpec(words[0], gates, saved, bool(has_c), stages, bool(projects))
    return Library(path, isa, compiled, cells)


LIBRARY = _load()
CELLS = LIBRARY.cells


def config() -> str:
    """Versions, instruction sets, threads and what is known of CUDA, one fact a line."""
    sets = [
        name + ("" if supported else " (this processor lacks it)")
        for name, supported in LIBRARY.compiled.items()
    ]
    forced = os.environ.get("FUSEDRNN_ISA")
    lines = {
        "fusedrnn": __version__,
        "torch": f"{torch.__version__} (tested with 2.13.0 and 2.14.1)",
        "python": platform.python_version(),
        "library": str(LIBRARY.path),
        "instruction sets compiled": ", ".join(sets),
        "instruction set chosen": LIBRARY.isa + (" (FUSEDRNN_ISA)" if forced else ""),
        "threads": str(torch.get_num_threads()),
        "cells": ", ".join(CELLS),
        "CUDA library": "not there: this version computes on the CPU only",
    }
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def show_config() -> None:
    """Prints versions, the instruction sets compiled and chosen, threads, and CUDA's state."""
    print(config())

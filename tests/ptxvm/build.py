"""Builds and imports the interpreter's native module."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD_DIR = ROOT / "build" / "ptxvm"

sys.path.insert(0, str(ROOT))
import setup_build
from tests.modules import load, pybind_flags, turn


def build() -> Path:
    """Brings build/ptxvm/_ptxvm.so up to date and returns its path."""
    own = {"rounding": ["-frounding-math"]}
    units = {source: own.get(source.stem, []) for source in sorted(HERE.glob("*.cpp"))}
    flags = [
        # Warnings are errors whether or not FUSEDRNN_WERROR is set, so that the command never
        # changes and nothing is rebuilt.
        *(flag for flag in setup_build.common_flags() if flag != "-Werror"),
        "-Werror",
        *pybind_flags(),
    ]
    with turn(BUILD_DIR):
        return setup_build.ninja_build(BUILD_DIR, "_ptxvm.so", units, flags, ["-shared"])


@functools.cache
def native() -> ModuleType:
    """The native module; it is built first if a source is newer."""
    return load(build())

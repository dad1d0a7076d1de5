"""Builds and imports the interpreter's native module."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import setup_build
from tests.kit.build import extension_flags, load, turn

HERE = Path(__file__).resolve().parent
BUILD_DIR = setup_build.ROOT / "build" / "ptxvm"


def build() -> Path:
    """Brings build/ptxvm/_ptxvm.so up to date and returns its path."""
    own = {"rounding": ["-frounding-math"]}
    units = {source: own.get(source.stem, []) for source in sorted(HERE.glob("*.cpp"))}
    # Warnings are errors whether or not FUSEDRNN_WERROR is set, so that the command never changes
    # and nothing is rebuilt.
    flags = [*(flag for flag in extension_flags() if flag != "-Werror"), "-Werror"]
    with turn(BUILD_DIR):
        return setup_build.ninja_build(BUILD_DIR, "_ptxvm.so", units, flags, ["-shared"])


@functools.cache
def native() -> ModuleType:
    """The native module; it is built first if a source is newer."""
    return load(build())

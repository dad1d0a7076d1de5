"""Builds and imports the native test module, tests/native/module.cpp on the CPU engine."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD_DIR = ROOT / "build" / "native"

sys.path.insert(0, str(ROOT))
import setup_build
from tests.modules import load, pybind_flags, turn


def build() -> Path:
    """Brings build/native/_native.so up to date and returns its path."""
    isas = setup_build.isa_flags()
    units = setup_build.engine_units()
    for source in sorted(HERE.glob("*.cpp")):
        units[source] = isas.get(source.stem.removeprefix("vecmath_"), [])
    flags = [
        *setup_build.common_flags(),
        *pybind_flags(),
    ]
    with turn(BUILD_DIR):
        return setup_build.ninja_build(BUILD_DIR, "_native.so", units, flags, ["-shared"])


@functools.cache
def native() -> ModuleType:
    """The module, built first where a source is newer."""
    return load(build())

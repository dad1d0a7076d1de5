"""Builds and imports the native test module, tests/native/module.cpp on the CPU engine."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD_DIR = ROOT / "build" / "native"

sys.path.insert(0, str(ROOT))
import setup_build


def build() -> Path:
    """Brings build/native/_native.so up to date and returns its path."""
    isas = setup_build.isa_flags()
    units = setup_build.engine_units()
    for source in sorted(HERE.glob("*.cpp")):
        units[source] = isas.get(source.stem.removeprefix("vecmath_"), [])
    # Not ours to keep free of warnings.
    headers = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        *setup_build.common_flags(),
        *(word for path in headers for word in ("-isystem", path)),
    ]
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with open(BUILD_DIR / "lock", "w") as lock:
        # Test processes that run side by side take turns.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return setup_build.ninja_build(BUILD_DIR, "_native.so", units, flags, ["-shared"])


@functools.cache
def native() -> ModuleType:
    """The module, built first where a source is newer."""
    spec = importlib.util.spec_from_file_location("_native", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Builds and imports the interpreter's native module."""

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
BUILD_DIR = ROOT / "build" / "ptxvm"

sys.path.insert(0, str(ROOT))
import setup_build


def build() -> Path:
    """Brings build/ptxvm/_ptxvm.so up to date and returns its path."""
    own = {"rounding": ["-frounding-math"]}
    units = {source: own.get(source.stem, []) for source in sorted(HERE.glob("*.cpp"))}
    # Not ours to keep free of warnings.
    headers = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        # Warnings are errors with and without FUSEDRNN_WERROR: one command, one build.
        *(flag for flag in setup_build.common_flags() if flag != "-Werror"),
        "-Werror",
        *(word for path in headers for word in ("-isystem", path)),
    ]
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with open(BUILD_DIR / "lock", "w") as lock:
        # Test processes that run side by side take turns.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return setup_build.ninja_build(BUILD_DIR, "_ptxvm.so", units, flags, ["-shared"])


@functools.cache
def native() -> ModuleType:
    """The module, built first where a source is newer."""
    spec = importlib.util.spec_from_file_location("_ptxvm", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

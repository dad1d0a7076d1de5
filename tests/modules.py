"""What the tests' native modules share: flags for pybind11, turns in building, the import."""

from __future__ import annotations

import fcntl
import importlib.util
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11


def pybind_flags() -> list[str]:
    """Where the headers of pybind11 and Python are, which are not ours to keep free of warnings."""
    headers = [pybind11.get_include(), sysconfig.get_path("include")]
    return [word for path in headers for word in ("-isystem", path)]


@contextmanager
def turn(build_dir: Path) -> Iterator[None]:
    """Test processes that run side by side take turns in a folder, which is made where missing."""
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(path: Path) -> ModuleType:
    """Imports a module named as its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

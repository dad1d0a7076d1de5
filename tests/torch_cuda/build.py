"""Builds and imports tests/torch_cuda/module.cpp, and compiles the kernels it starts to PTX."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11
import torch

import setup_build
from tests.cuda import build as engine

HERE = Path(__file__).resolve().parent
CSRC = setup_build.CSRC
BUILD_DIR = setup_build.ROOT / "build" / "cuda_binding"
OPS = ("forward", "backward", "_step", "_step_backward")


@contextmanager
def _lock() -> Iterator[None]:
    """Test processes that run side by side take turns."""
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with open(BUILD_DIR / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def binding() -> ModuleType:
    """The module; torch.ops.fusedrnn_gpu has the ops of torch.ops.fusedrnn from then on."""
    # All of the bindings but what needs the CUDA runtime.
    sources = [CSRC / "torch_cuda" / "torch_launcher.cpp", HERE / "module.cpp"]
    units = dict.fromkeys([*sorted((CSRC / "cuda").glob("*.cpp")), *sources], ())
    # Not ours to keep free of warnings.
    headers = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        *setup_build.common_flags(),
        *setup_build.torch_flags(),
        *(word for path in headers for word in ("-isystem", path)),
    ]
    link = ["-shared", f"-L{setup_build.torch_dir() / 'lib'}", "-ltorch_cpu"]
    with _lock():
        path = setup_build.ninja_build(BUILD_DIR, "_cuda_binding.so", units, flags, link)
    library = torch.library.Library("fusedrnn_gpu", "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.fusedrnn, op).default._schema)
        library.define(schema.removeprefix("fusedrnn::"))
    spec = importlib.util.spec_from_file_location("_cuda_binding", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.library = library  # its ops live as long
    return module


@functools.cache
def ptx(arch: int) -> tuple[Path, ...]:
    """The kernels of the engine and of the bindings."""
    folder = BUILD_DIR / f"ptx_{arch}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = list(engine.ptx(arch))
    for source in sorted((CSRC / "torch_cuda").glob("*.cu")):
        output = folder / f"{source.stem}.ptx"
        partial = output.with_suffix(".partial")
        with _lock():
            engine.compile_kernel(source, partial, f"-arch=compute_{arch}", "-ptx")
            partial.rename(output)
        paths.append(output)
    return tuple(paths)

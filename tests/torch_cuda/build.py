"""Builds and imports tests/torch_cuda/module.cpp, and compiles the kernels it starts to PTX."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch

import setup_build
from tests.cuda import build as engine
from tests.cuda.build import nvcc
from tests.modules import load, pybind_flags, turn

HERE = Path(__file__).resolve().parent
CSRC = setup_build.CSRC
BUILD_DIR = setup_build.ROOT / "build" / "cuda_binding"
RUNTIME_DIR = setup_build.ROOT / "build" / "cuda_runtime"
OPS = ("forward", "backward", "_step", "_step_backward")


@functools.cache
def binding() -> ModuleType:
    """The module; torch.ops.fusedrnn_gpu has the ops of torch.ops.fusedrnn from then on."""
    # All of the bindings but what needs the CUDA runtime.
    sources = [CSRC / "torch_cuda" / "torch_launcher.cpp", HERE / "module.cpp"]
    units = dict.fromkeys([*sorted((CSRC / "cuda").glob("*.cpp")), *sources], ())
    flags = [
        *setup_build.common_flags(),
        # First: torch 2.11 has a pybind11 of its own, which refuses the stable ABI.
        *pybind_flags(),
        *setup_build.torch_flags(),
    ]
    link = ["-shared", f"-L{setup_build.torch_dir() / 'lib'}", "-ltorch_cpu"]
    with turn(BUILD_DIR):
        path = setup_build.ninja_build(BUILD_DIR, "_cuda_binding.so", units, flags, link)
    library = torch.library.Library("fusedrnn_gpu", "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.fusedrnn, op).default._schema)
        library.define(schema.removeprefix("fusedrnn::"))
    module = load(path)
    module.library = library  # its ops live as long
    return module


def runtime() -> ModuleType:
    """The module of runtime.cpp, with nothing loaded yet: what runs CUDA kernels on no GPU."""
    compiler = nvcc()
    assert compiler is not None
    includes, _ = setup_build.cuda_folders(compiler)
    sources = [
        CSRC / "torch_cuda" / "cuda_launcher.cpp",
        CSRC / "torch_cuda" / "torch_launcher.cpp",
    ]
    units = dict.fromkeys((*sources, HERE / "runtime.cpp"), includes)
    flags = [
        *setup_build.common_flags(),
        # First: some builds of torch have a pybind11 of their own, which refuses the stable ABI.
        *pybind_flags(),
        *setup_build.torch_flags(),
        '-DFUSEDRNN_CUDA_ARCHITECTURES="90"',
    ]
    link = ["-shared", f"-L{setup_build.torch_dir() / 'lib'}", "-ltorch_cpu"]
    with turn(RUNTIME_DIR):
        path = setup_build.ninja_build(RUNTIME_DIR, "_cuda_runtime.so", units, flags, link)
    return load(path)


@functools.cache
def ptx(arch: int) -> tuple[Path, ...]:
    """The kernels of the engine and of the bindings."""
    folder = BUILD_DIR / f"ptx_{arch}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = list(engine.ptx(arch))
    for source in sorted((CSRC / "torch_cuda").glob("*.cu")):
        output = folder / f"{source.stem}.ptx"
        partial = output.with_suffix(".partial")
        with turn(BUILD_DIR):
            engine.compile_kernel(source, partial, f"-arch=compute_{arch}", "-ptx")
            partial.rename(output)
        paths.append(output)
    return tuple(paths)

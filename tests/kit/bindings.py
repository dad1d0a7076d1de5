"""Builds the tests' modules of the CUDA bindings, and compiles their kernels to PTX."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch

import setup_build
from tests.kit import build
from tests.kit.build import (
    CSRC,
    KIT,
    ROOT,
    extension_flags,
    load,
    turn,
)

SOURCES = KIT / "torch_cuda"
BUILD_DIR = ROOT / "build" / "cuda_binding"
RUNTIME_DIR = ROOT / "build" / "cuda_runtime"
OPS = ("forward", "backward", "_step", "_step_backward")


def _flags() -> list[str]:
    # pybind11's folder comes first, since torch 2.11 has another pybind11, which refuses the stable
    # ABI.
    return [*extension_flags(), *setup_build.torch_flags()]


def _link_flags() -> list[str]:
    return ["-shared", f"-L{setup_build.torch_dir() / 'lib'}", "-ltorch_cpu"]


@functools.cache
def binding() -> ModuleType:
    """Builds and loads the module, which defines torch.ops.fusedrnn_gpu."""
    # The sources of the bindings that need no CUDA runtime.
    sources = [CSRC / "torch_cuda" / "torch_launcher.cpp", SOURCES / "module.cpp"]
    host = build.cuda_host()
    with turn(BUILD_DIR):
        path = setup_build.ninja_build(
            *(BUILD_DIR, "_cuda_binding.so", dict.fromkeys(sources, ()), _flags()),
            *([str(host), *_link_flags()], [host]),
        )
    library = torch.library.Library("fusedrnn_gpu", "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.fusedrnn, op).default._schema)
        library.define(schema.removeprefix("fusedrnn::"))
    module = load(path)
    module.library = library  # the ops exist as long as this object
    return module


def runtime() -> ModuleType:
    """The module of runtime.cpp, a fake CUDA runtime. No kernels are loaded yet."""
    compiler = setup_build.nvcc()
    assert compiler is not None
    includes, _ = setup_build.cuda_folders(compiler)
    sources = [
        CSRC / "torch_cuda" / "cuda_launcher.cpp",
        CSRC / "torch_cuda" / "torch_launcher.cpp",
    ]
    units = dict.fromkeys((*sources, SOURCES / "runtime.cpp"), includes)
    flags = [*_flags(), '-DFUSEDRNN_CUDA_ARCHITECTURES="90"']
    with turn(RUNTIME_DIR):
        path = setup_build.ninja_build(RUNTIME_DIR, "_cuda_runtime.so", units, flags, _link_flags())
    return load(path)


@functools.cache
def ptx(arch: int, clusters: bool = False) -> tuple[Path, ...]:
    """Files of PTX with the kernels of the engine and of the bindings.

    Args:
        clusters: whether those with clusters are for sm_90.
    """
    engine = build.ptx_with_clusters() if clusters else build.ptx(arch)
    return (*engine, *build.ptx(arch, "torch_cuda"))

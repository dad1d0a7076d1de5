"""Loads the compiled libraries and says what is in them."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ._version import __version__

Weight = TypeVar("Weight")

_HERE = Path(__file__).resolve().parent
# Whether this is the repository, or an sdist, and no installed package.
_IN_SOURCES = (_HERE.parent / "setup_build.py").exists()


@dataclasses.dataclass(frozen=True)
class CellParameter:
    """A parameter of a cell, and its sizes in letters."""

    name: str
    sizes: tuple[str, ...]  # each a letter, a number or several joined by "*", such as "G*H"

    @property
    def is_bias(self) -> bool:
        """Whether a layer with bias=False is without it."""
        return self.name.startswith("bias")

    def shape(self, **letters: int) -> tuple[int, ...]:
        """Its sizes, from those of the letters G, H, I and P."""
        shape = []
        for size in self.sizes:
            product = 1
            for factor in size.split("*"):  # and not math.prod, which Dynamo cannot trace here
                product = product * (letters[factor] if factor in letters else int(factor))
            shape.append(product)
        return tuple(shape)


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """The facts of a cell, as the C++ library states them."""

    name: str
    gates: int  # G: rows of weight_ih are G*H
    saved: int  # values per unit and step that forward keeps for backward
    saves_h: bool  # whether that is h_t, which is then kept once
    has_c: bool  # whether there is a cell state beside h
    stages: int  # products in a step
    projects: bool  # whether h is projected to P < H
    parameters: tuple[CellParameter, ...]  # of one direction, in torch.nn's order

    def parameters_with(self, bias: bool) -> list[CellParameter]:
        """The parameters of a layer with biases or without."""
        return [p for p in self.parameters if bias or not p.is_bias]

    def named(self, weights: Sequence[Weight]) -> dict[str, Weight]:
        """The weights of one direction by name; biases may be left out."""
        parameters = self.parameters_with(len(weights) == len(self.parameters))
        return {p.name: w for p, w in zip(parameters, weights, strict=True)}


# Compute capabilities of NVIDIA's systems on a chip: Xavier, Orin, Thor (in CUDA 12 and in 13).
TEGRA = {72, 87, 101, 110}


@dataclasses.dataclass(frozen=True)
class CudaLibrary:
    """The library of the CUDA kernels, or why there is none."""

    path: Path | None  # None where it is not loaded
    missing: str = ""  # why it is not
    codes: tuple[int, ...] = ()  # architectures that it has machine code for: 80 is sm_80
    ptx: int | None = None  # architecture of its PTX, which the driver compiles for later ones
    runtime: str = ""  # version of the CUDA runtime in it

    def runs_on(self, capability: int) -> bool:
        """Whether there are kernels for a compute capability, 86 for 8.6."""
        # Machine code runs on the same major version from its own minor version on; between Tegra
        # and other GPUs, and from one Tegra to the next, it does not (CUDA C++ Programming Guide,
        # "Binary Compatibility").
        served = (
            code == capability
            or (code // 10 == capability // 10 and code < capability and capability not in TEGRA)
            for code in self.codes
            if code == capability or code not in TEGRA
        )
        return any(served) or (self.ptx is not None and self.ptx <= capability)

    def architectures(self) -> str:
        """Returns the architectures that it was compiled for, in words."""
        words = [f"sm_{code}" for code in self.codes]
        return ", ".join(words + ([f"PTX of sm_{self.ptx}"] if self.ptx else []))


@dataclasses.dataclass(frozen=True)
class Library:
    """The facts that the compiled library states about itself."""

    path: Path
    isa: str
    multiplies_pairs: bool  # whether bfloat16 layers multiply pairs; else they compute in float32
    compiled: dict[str, bool]  # instruction set -> whether this processor has it
    cells: dict[str, CellSpec]


def _find(name: str, built: str) -> Path:
    """A library's path: beside this file, or in the source tree's folder `built`.

    Where Python is run in the source tree, its folder `fusedrnn` comes before the installed one. A
    `pip install .` there leaves what it compiled in `built`, of these very sources.
    """
    beside = _HERE / name
    in_tree = _HERE.parent / built / name
    return in_tree if _IN_SOURCES and in_tree.exists() and not beside.exists() else beside


def _not_compiled(name: str) -> str:
    """Why a library is not there, and what to do."""
    if not _IN_SOURCES:
        return (
            f"the compiled library {name} is not in {_HERE}: this installation is not complete. "
            "Install fusedrnn again"
        )
    tree = _HERE.parent
    said = f"{_HERE} holds the sources of fusedrnn, and nothing was compiled there yet. "
    for entry in sys.path:
        installed = Path(entry).resolve() / _HERE.name
        if installed != _HERE and (installed / name).exists():
            return said + (
                f"They hide the fusedrnn that is installed in {installed}: run Python in another "
                f"folder than {tree}"
            )
    return said + f"Compile and install them with `pip install -v --no-build-isolation {tree}`"


def _load() -> Library:
    path = _find("_C.so", "build/library")
    if not path.exists():
        raise ImportError(f"fusedrnn: {_not_compiled(path.name)}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"fusedrnn: {path} cannot be loaded with torch {torch.__version__} (2.11 or later is "
            f"needed): {error}"
        ) from error
    isa = ""
    pairs = False
    compiled: dict[str, bool] = {}
    cells: dict[str, CellSpec] = {}
    # Raises where FUSEDRNN_ISA names an instruction set that cannot run.
    for line in torch.ops.fusedrnn.info().splitlines():
        key, *words = line.split()
        if key == "isa":
            isa = words[0]
        elif key == "pairs":
            pairs = words[0] == "1"
        elif key == "compiled":
            compiled[words[0]] = words[1] == "supported"
        elif key == "cell":
            spec = _cell_spec(dict(word.split("=", 1) for word in words))
            cells[spec.name] = spec
    return Library(path, isa, pairs, compiled, cells)


def _cell_spec(facts: dict[str, str]) -> CellSpec:
    """A cell from the words of its line, `key=value`."""
    parameters = [entry.split(":") for entry in facts["parameters"].split(";")]
    return CellSpec(
        name=facts["name"],
        gates=int(facts["gates"]),
        saved=int(facts["saved"]),
        saves_h=facts["saves_h"] == "1",
        has_c=facts["has_c"] == "1",
        stages=int(facts["stages"]),
        projects=facts["projects"] == "1",
        parameters=tuple(CellParameter(name, tuple(form.split(","))) for name, form in parameters),
    )


def torch_lacks_cuda() -> str:
    """Why this build of torch cannot run CUDA kernels; "" where it can."""
    if torch.version.cuda is not None:
        return ""
    if torch.version.hip is not None:
        return (
            f"torch {torch.__version__} is built for ROCm, and fusedrnn knows NVIDIA's GPUs alone"
        )
    return f"torch {torch.__version__} is built without CUDA; install a build that has it"


def _load_cuda() -> CudaLibrary:
    path = _find("_cuda.so", "build/cuda")
    if lacks := torch_lacks_cuda():
        return CudaLibrary(None, lacks)
    if not path.exists():
        return CudaLibrary(
            None,
            f"{path.name} is not in {path.parent}; build fusedrnn again where nvcc is on PATH, "
            "with FUSEDRNN_CUDA=1",
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return CudaLibrary(None, f"{path} cannot be loaded: {error}")
    said = dict(line.split(" ", 1) for line in torch.ops.fusedrnn.cuda_info().splitlines())
    words = said["architectures"].split(";")
    codes = tuple(int(word.removesuffix("+PTX")) for word in words)
    ptx = [code for code, word in zip(codes, words, strict=True) if word.endswith("+PTX")]
    return CudaLibrary(path, "", codes, ptx[0] if ptx else None, said["runtime"])


def _allow_tf32() -> bool:
    """Whether torch is set to compute float32 products in TF32; asked by the CUDA kernels."""
    # torch has three settings for this. This one can be read, whichever of them was set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


LIBRARY = _load()
CUDA = _load_cuda()
CELLS = LIBRARY.cells

_implementations = torch.library.Library("fusedrnn", "IMPL")
_implementations.impl("_allow_tf32", _allow_tf32, "CompositeExplicitAutograd")


def cuda_problem(index: int) -> str:
    """Returns why the kernels cannot run on a GPU and what to do, or "" if they can."""
    if CUDA.path is None:
        return f"the CUDA library of fusedrnn is not loaded: {CUDA.missing}"
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    if CUDA.runs_on(capability):
        return ""
    name = f"cuda:{index} is {torch.cuda.get_device_name(index)} (sm_{capability})"
    if capability < 75:
        return f"{name}; fusedrnn needs sm_75 or later"
    return (
        f"{name}, and the CUDA library was compiled for {CUDA.architectures()}: build fusedrnn "
        f"again with FUSEDRNN_CUDA_ARCH={capability}"
    )


def _cuda_devices() -> str:
    """The GPUs that are there, and whether the kernels run on them."""
    if torch_lacks_cuda():
        return "none: this torch has no CUDA"
    if not torch.cuda.is_available():
        return "none: torch finds no GPU or no driver"
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        fit = "" if CUDA.path and CUDA.runs_on(10 * major + minor) else " (no kernels for it)"
        found.append(f"{torch.cuda.get_device_name(index)} sm_{major}{minor}{fit}")
    return ", ".join(found)


def config() -> str:
    """Versions, instruction sets, threads and what is known of CUDA, one fact a line."""
    sets = [
        name + ("" if supported else " (this processor lacks it)")
        for name, supported in LIBRARY.compiled.items()
    ]
    forced = os.environ.get("FUSEDRNN_ISA")
    lines = {
        "fusedrnn": __version__,
        "torch": f"{torch.__version__} (tested with 2.11.0, 2.13.0 and 2.14.1)",
        "python": platform.python_version(),
        "library": str(LIBRARY.path),
        "instruction sets compiled": ", ".join(sets),
        "instruction set chosen": LIBRARY.isa + (" (FUSEDRNN_ISA)" if forced else ""),
        "threads": str(torch.get_num_threads()),
        "cells": ", ".join(CELLS),
        "CUDA library": (
            f"{CUDA.architectures()}, CUDA runtime {CUDA.runtime}, {CUDA.path}"
            if CUDA.path
            else f"not loaded: {CUDA.missing}"
        ),
        "CUDA devices": _cuda_devices(),
    }
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def show_config() -> None:
    """Prints versions, the instruction sets compiled and chosen, threads, and CUDA's state."""
    print(config())

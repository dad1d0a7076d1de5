"""Loads the compiled libraries and gives facts about them."""

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
# Whether this file is in the repository or in an sdist, and not in an installed package.
_IN_SOURCES = (_HERE.parent / "setup_build.py").exists()


@dataclasses.dataclass(frozen=True)
class CellParameter:
    """A parameter of a cell, with its sizes as letters."""

    name: str
    sizes: tuple[str, ...]  # each is a letter, a number, or a product such as "G*H"
    is_bias: bool = False  # whether a layer with bias=False lacks it

    def shape(self, **letters: int) -> tuple[int, ...]:
        """Its sizes as numbers, from the values of the letters G, H, I and P."""
        shape = []
        for size in self.sizes:
            product = 1
            for factor in size.split("*"):  # Dynamo cannot trace math.prod here
                product = product * (letters[factor] if factor in letters else int(factor))
            shape.append(product)
        return tuple(shape)


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """Facts about a cell, which the C++ library reports."""

    name: str
    gates: int  # G; weight_ih is [G*H, I]
    saved: int  # values per unit and step that forward keeps for backward
    saves_h: bool  # whether the saved value is h_t, which is then stored once
    has_c: bool  # whether there is a state c beside h
    stages: int  # stages of a step, each with one product
    projects: bool  # whether h is projected to P < H
    takes_row: bool  # whether it takes a number with each row of x; the ops refuse such a cell
    parameters: tuple[CellParameter, ...]  # of one direction, in torch.nn's order

    def parameters_with(self, bias: bool) -> list[CellParameter]:
        """The parameters of one direction, with biases or without."""
        return [p for p in self.parameters if bias or not p.is_bias]

    def named(self, weights: Sequence[Weight]) -> dict[str, Weight]:
        """The weights of one direction by name; biases may be left out."""
        parameters = self.parameters_with(len(weights) == len(self.parameters))
        return {p.name: w for p, w in zip(parameters, weights, strict=True)}


# The compute capabilities of Tegra, NVIDIA's systems on a chip: Xavier, Orin, and Thor, which has
# another number in CUDA 12 than in CUDA 13.
TEGRA = {72, 87, 101, 110}


@dataclasses.dataclass(frozen=True)
class CudaLibrary:
    """The library of the CUDA kernels, or the reason why it is not loaded."""

    path: Path | None  # None if it is not loaded
    missing: str = ""  # the reason
    codes: tuple[int, ...] = ()  # the architectures of its machine code; 80 is sm_80
    ptx: int | None = None  # the architecture of its PTX, which drivers compile for later ones
    runtime: str = ""  # the version of its CUDA runtime

    def runs_on(self, capability: int) -> bool:
        """Whether it has kernels for a compute capability, such as 86 for 8.6."""
        # Machine code runs on GPUs with the same major version and the same or a higher minor
        # version. Code for a Tegra runs on this Tegra only, and a Tegra runs no other code (CUDA
        # C++ Programming Guide, "Binary Compatibility").
        served = (
            code == capability
            or (code // 10 == capability // 10 and code < capability and capability not in TEGRA)
            for code in self.codes
            if code == capability or code not in TEGRA
        )
        return any(served) or (self.ptx is not None and self.ptx <= capability)

    def architectures(self) -> str:
        """Returns the architectures for which it was compiled, as text."""
        words = [f"sm_{code}" for code in self.codes]
        return ", ".join(words + ([f"PTX of sm_{self.ptx}"] if self.ptx else []))


@dataclasses.dataclass(frozen=True)
class Library:
    """The compiled CPU library, with the facts that it reports."""

    path: Path
    isa: str
    multiplies_pairs: bool  # whether bfloat16 is multiplied in pairs, not in float32
    compiled: dict[str, bool]  # instruction set -> whether this processor has it
    cells: dict[str, CellSpec]


def _find(name: str, built: str) -> Path:
    """Returns the path of a library: beside this file, or in the source tree's folder `built`.

    If Python runs in the source tree, it imports the tree's folder `fusedrnn` and not the installed
    package. `pip install .` leaves the library that it compiled from the tree in `built`.
    """
    beside = _HERE / name
    in_tree = _HERE.parent / built / name
    return in_tree if _IN_SOURCES and in_tree.exists() and not beside.exists() else beside


def _not_compiled(name: str) -> str:
    """Says why a library is missing, and what to do."""
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
    # This raises if FUSEDRNN_ISA names an instruction set that cannot be used.
    text: str = torch.ops.fusedrnn.info()
    try:
        return _library_of(path, text)
    except (LookupError, ValueError) as error:
        raise ImportError(
            f"fusedrnn: {path} was compiled from other sources than those in {_HERE}, which cannot "
            f"read its list of cells ({error}). Compile it again"
        ) from error


def _library_of(path: Path, text: str) -> Library:
    """The library at this path, which reports this text."""
    isa = ""
    pairs = False
    compiled: dict[str, bool] = {}
    cells: dict[str, CellSpec] = {}
    for line in text.splitlines():
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
    """Makes the spec of a cell from the `key=value` words of its line."""
    parameters = [entry.split(":") for entry in facts["parameters"].split(";")]
    return CellSpec(
        name=facts["name"],
        gates=int(facts["gates"]),
        saved=int(facts["saved"]),
        saves_h=facts["saves_h"] == "1",
        has_c=facts["has_c"] == "1",
        stages=int(facts["stages"]),
        projects=facts["projects"] == "1",
        takes_row=facts["takes_row"] == "1",
        parameters=tuple(
            CellParameter(name, tuple(sizes.split(",")), is_bias == "1")
            for name, sizes, is_bias in parameters
        ),
    )


def torch_lacks_cuda() -> str:
    """The reason why this build of torch cannot run CUDA kernels; "" if it can."""
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
    """Whether torch's settings allow TF32 in float32 products. The CUDA library calls this."""
    # torch has three settings for this. This one can be read whichever of the three was set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


LIBRARY = _load()
CUDA = _load_cuda()
CELLS = LIBRARY.cells

_implementations = torch.library.Library("fusedrnn", "IMPL")
_implementations.impl("_allow_tf32", _allow_tf32, "CompositeExplicitAutograd")


def cuda_problem(index: int) -> str:
    """The reason why the kernels cannot run on a GPU, with advice; "" if they can."""
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
    """The GPUs of this machine, and whether there are kernels for them."""
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
    """Versions, instruction sets, threads and facts about CUDA, one per line."""
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
    """Prints versions, instruction sets, threads, and facts about CUDA and GPUs."""
    print(config())

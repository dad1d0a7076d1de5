"""Builds the C++ of the tests: modules for the CPU engine and for the host side of the CUDA engine,
and the CUDA kernels as PTX. The compilers and their flags come from setup_build.

What the build of the library has made of the same sources with the same flags is not made again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pybind11

import setup_build

KIT = Path(__file__).resolve().parent
ROOT, CSRC = setup_build.ROOT, setup_build.CSRC
CUDA_DIR = ROOT / "build" / "cuda_tests"
NATIVE_DIR = ROOT / "build" / "native"


def pybind_flags() -> list[str]:
    """Flags for the headers of pybind11 and Python, in which warnings are ignored."""
    headers = [pybind11.get_include(), sysconfig.get_path("include")]
    return [word for path in headers for word in ("-isystem", path)]


@contextmanager
def turn(build_dir: Path, name: str = "lock") -> Iterator[None]:
    """Makes a folder, and lets one test process at a time build in it what the lock is for."""
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(path: Path) -> ModuleType:
    """Imports a module from its file, which has its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension_flags() -> list[str]:
    """The flags of every source of a module that Python imports."""
    return [*setup_build.common_flags(), *pybind_flags()]


def engine(build_dir: Path, units: setup_build.Units) -> Path:
    """Sources without torch as one object file, linked from the objects of the library.

    Args:
        build_dir: where setup_build compiles the library, BUILD_DIR or CUDA_BUILD_DIR.
    """
    with turn(build_dir):
        return setup_build.ninja_build(
            build_dir, "engine.o", units, setup_build.common_flags(), ["-r", "-nostdlib"]
        )


@functools.cache
def native() -> ModuleType:
    """The module of kit/native with the CPU engine. It is built first if a source is newer."""
    isas = setup_build.isa_flags()
    library = engine(setup_build.BUILD_DIR, setup_build.engine_units())
    units = {
        source: isas.get(source.stem.removeprefix("vecmath_"), [])
        for source in sorted((KIT / "native").glob("*.cpp"))
    }
    with turn(NATIVE_DIR):
        path = setup_build.ninja_build(
            *(NATIVE_DIR, "_native.so", units, extension_flags()),
            *(["-shared", str(library)], [library]),
        )
    return load(path)


def nvcc_flags() -> list[str]:
    """The flags of every kernel. Warnings are errors whether or not FUSEDRNN_WERROR is set."""
    strict = "-Werror=all-warnings"
    return [*(flag for flag in setup_build.nvcc_flags() if flag != strict), strict]


def cuda_host() -> Path:
    """The host side of the CUDA engine as one object file."""
    units = dict.fromkeys(sorted((CSRC / "cuda").glob("*.cpp")), ())
    return engine(setup_build.CUDA_BUILD_DIR, units)


@functools.cache
def host() -> ModuleType:
    """The module of kit/cuda with the CUDA engine's host side, built if a source is newer."""
    library = cuda_host()
    units = {KIT / "cuda" / "module.cpp": ()}
    with turn(CUDA_DIR):
        path = setup_build.ninja_build(
            *(CUDA_DIR, "_cuda_host.so", units, extension_flags()),
            *(["-shared", str(library)], [library]),
        )
    return load(path)


def kernel_sources(folder: str = "cuda") -> list[Path]:
    return sorted((CSRC / folder).glob("*.cu"))


@functools.cache
def _digest() -> str:
    """A digest of every file from which a kernel may be compiled."""
    digest = hashlib.sha256(" ".join(nvcc_flags()).encode())
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _library_keeps() -> bool:
    """Whether the build of the CUDA library, which is brought up to date, keeps PTX and figures of
    kernels that are compiled with the flags of the tests.
    """
    if os.environ.get("FUSEDRNN_CUDA_KEEP") != "1" or not setup_build.cuda_choice()[0]:
        return False
    if set(setup_build.nvcc_flags()) != set(nvcc_flags()):
        return False
    # What is printed is no output of the test that is the first to ask.
    with turn(setup_build.CUDA_BUILD_DIR), redirect_stdout(io.StringIO()):
        setup_build.build_cuda_library()
    return True


def kept_ptx(folder: Path, stem: str, arch: int) -> Path | None:
    """The PTX in a folder of setup_build.kept_folder, if there is any for the architecture. nvcc
    names it so if it compiles for more than one.
    """
    path = folder / f"{stem}.compute_{arch}.ptx"
    return path if path.exists() else None


def kept_figures(folder: Path, arch: int) -> str:
    """What ptxas -v said of the kernels in such a folder; "" if there are none for sm_`arch`."""
    said = (folder / "said.txt").read_text()
    entries = re.split(r"^(?=.*Compiling entry function ')", said, flags=re.M)
    return "".join(entry for entry in entries if f"' for 'sm_{arch}'\n" in entry)


def compile_kernel(source: Path, output: Path, *flags: str) -> str:
    """Runs nvcc on a file of kernels and returns its messages."""
    compiler = setup_build.nvcc()
    assert compiler is not None
    # The source may be in a changed copy of the tree, whose headers must come first.
    command = [compiler, f"-I{source.parent.parent}", *nvcc_flags(), *flags]
    done = subprocess.run(
        [*command, str(source), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class Kernel(NamedTuple):
    """The figures of ptxas for a kernel. All but the registers are in bytes."""

    registers: int  # of each thread
    shared: int  # static shared memory of a block
    stack: int
    spills: int


def kernels_of(said: str) -> dict[str, Kernel]:
    """The kernels in the output of ptxas -v. There must be at least one."""
    kernels = {}
    for entry in said.split("Compiling entry function '")[1:]:

        def number(pattern: str, absent: int | None = None, text: str = entry) -> int:
            found = re.search(pattern, text)
            assert found is not None or absent is not None, f"no {pattern!r} in:\n{text}"
            return int(found[1]) if found else int(absent or 0)

        kernels[entry.split("'")[0]] = Kernel(
            registers=number(r"Used (\d+) registers"),
            # ptxas does not mention shared memory if there is none.
            shared=number(r"(\d+) bytes smem", absent=0),
            stack=number(r"(\d+) bytes stack frame"),
            spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        )
    assert kernels, f"ptxas names no kernel:\n{said}"
    return kernels


def assembled(source: Path, arch: int) -> dict[str, Kernel]:
    """The figures of ptxas for the kernels of a file of PTX. They are kept in a file beside it, so
    that test processes share them. Of an architecture for which the library was compiled, they are
    the figures of the library's own kernels.
    """
    said = source.with_suffix(f".sm_{arch}.txt")
    with turn(source.parent, f"{said.name}.lock"):
        if not said.exists():
            figures = ""
            if _library_keeps():
                kernels = CSRC / "cuda" / f"{source.stem}.cu"
                folder = setup_build.kept_folder(setup_build.CUDA_BUILD_DIR, kernels)
                figures = kept_figures(folder, arch)
            flags = (f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v")
            partial = said.with_suffix(".partial")
            partial.write_text(figures or compile_kernel(source, Path("/dev/null"), *flags))
            partial.rename(said)
    return kernels_of(said.read_text())


def ptx_with_clusters(arch: int = 90) -> list[Path]:
    """PTX of all kernels for sm_80, but for those with clusters, which is for sm_90 or `arch`."""
    clustered = ptx(arch, only="clustered")
    names = {path.name for path in clustered}
    return [*(path for path in ptx(80) if path.name not in names), *clustered]


def ptx(arch: int, folder: str = "cuda", only: str = "") -> list[Path]:
    """PTX of the kernels for an architecture (80 is sm_80), one file for each source.

    Args:
        folder: the folder of csrc with the sources.
        only: how the names of the sources begin that are compiled.
    """
    made = CUDA_DIR / "_".join(filter(None, ("ptx", str(arch), folder, only, _digest())))
    with turn(CUDA_DIR):
        if not made.exists():
            partial = made.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            library_keeps = _library_keeps()

            def compile_one(source: Path) -> None:
                output = partial / f"{source.stem}.ptx"
                kept = setup_build.kept_folder(setup_build.CUDA_BUILD_DIR, source)
                if library_keeps and (made_before := kept_ptx(kept, source.stem, arch)):
                    shutil.copy(made_before, output)
                else:
                    compile_kernel(source, output, f"-arch=compute_{arch}", "-ptx")

            with ThreadPoolExecutor(setup_build.jobs()) as pool:
                sources = [s for s in kernel_sources(folder) if s.name.startswith(only)]
                list(pool.map(compile_one, sources))
            partial.rename(made)
    return sorted(made.glob("*.ptx"))

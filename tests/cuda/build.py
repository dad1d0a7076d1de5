"""Builds what the tests of the CUDA engine need: its host side as a module, its kernels as PTX."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD_DIR = ROOT / "build" / "cuda_tests"

sys.path.insert(0, str(ROOT))
import setup_build
from tests.modules import load, pybind_flags, turn

NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-lineinfo", "-Werror=all-warnings"),
    # Cells' constants are constexpr functions.
    "--expt-relaxed-constexpr",
    # A multiply-add is fused only where the source says so, as on the CPU.
    "-fmad=false",
]


def nvcc() -> str | None:
    """The CUDA compiler; None where there is none."""
    return shutil.which("nvcc")


def cuda_include() -> Path:
    """The folder of the CUDA toolkit's headers, as nvcc names it."""
    compiler = nvcc()
    assert compiler is not None
    done = subprocess.run(
        [compiler, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    found = re.search(r'INCLUDES="-I([^"]+)"', done.stderr)
    assert found is not None, done.stderr
    return Path(found[1].strip())


@functools.cache
def host() -> ModuleType:
    """The module of tests/cuda/module.cpp, built first where a source is newer."""
    units = {key: [] for key in [*sorted((CSRC / "cuda").glob("*.cpp")), HERE / "module.cpp"]}
    flags = [
        *setup_build.common_flags(),
        *pybind_flags(),
    ]
    with turn(BUILD_DIR):
        path = setup_build.ninja_build(BUILD_DIR, "_cuda_host.so", units, flags, ["-shared"])
    return load(path)


def kernel_sources(csrc: Path = CSRC) -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def _digest(csrc: Path) -> str:
    """Of every file that a kernel may be made of."""
    digest = hashlib.sha256(" ".join(NVCC_FLAGS).encode())
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_kernel(source: Path, output: Path, *flags: str) -> str:
    """Runs nvcc on one file of kernels; what it printed."""
    compiler = nvcc()
    assert compiler is not None
    command = [compiler, *NVCC_FLAGS, f"-I{source.parent.parent}", *flags]
    done = subprocess.run(
        [*command, str(source), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class Kernel(NamedTuple):
    """What ptxas says of a kernel; bytes but for the registers."""

    registers: int  # of a thread
    shared: int  # static
    stack: int
    spills: int


def kernels_of(said: str) -> dict[str, Kernel]:
    """The kernels in what ptxas printed under -v, at least one."""
    kernels = {}
    for entry in said.split("Compiling entry function '")[1:]:

        def number(pattern: str, absent: int | None = None, text: str = entry) -> int:
            found = re.search(pattern, text)
            assert found is not None or absent is not None, f"no {pattern!r} in:\n{text}"
            return int(found[1]) if found else int(absent or 0)

        kernels[entry.split("'")[0]] = Kernel(
            registers=number(r"Used (\d+) registers"),
            # What there is none of is not mentioned.
            shared=number(r"(\d+) bytes smem", absent=0),
            stack=number(r"(\d+) bytes stack frame"),
            spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        )
    assert kernels, f"ptxas names no kernel:\n{said}"
    return kernels


def ptx(arch: int, csrc: Path = CSRC, build_dir: Path = BUILD_DIR) -> list[Path]:
    """The kernels' PTX for an architecture (80 is sm_80), one file for each source."""
    folder = build_dir / f"ptx_{arch}_{_digest(csrc)}"
    with turn(BUILD_DIR):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

            def compile_one(source: Path) -> None:
                output = partial / f"{source.stem}.ptx"
                compile_kernel(source, output, f"-arch=compute_{arch}", "-ptx")

            with ThreadPoolExecutor(setup_build.jobs()) as pool:
                list(pool.map(compile_one, kernel_sources(csrc)))
            partial.rename(folder)
    return sorted(folder.glob("*.ptx"))

"""A PTX interpreter, which runs CUDA kernels on the CPU and checks their accesses (README.md)."""

from tests.ptxvm.build import native
from tests.ptxvm.vm import CHECKS, KernelInfo, Memory, Program, Run, compile_ptx

__all__ = [
    "CHECKS",
    "Fault",
    "KernelInfo",
    "Memory",
    "Program",
    "Run",
    "compile_ptx",
]


def __getattr__(name: str) -> type:
    # The native module is built when Fault is first used, not when this package is imported.
    if name == "Fault":
        return native().Fault
    raise AttributeError(name)

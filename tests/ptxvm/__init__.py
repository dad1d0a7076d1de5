"""Runs the PTX that nvcc emits on the CPU and checks what it does. README.md says how and what."""

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
    # Building waits until a fault is first asked for.
    if name == "Fault":
        return native().Fault
    raise AttributeError(name)

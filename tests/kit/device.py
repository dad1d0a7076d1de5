"""A GPU made of the PTX interpreter and numpy, on which the CUDA engine's host side runs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptxvm import Memory, Program

Array = np.ndarray[Any, Any]

# The numpy dtype in which values of each dtype are stored. bfloat16 is stored as its bits.
STORAGE = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.uint16}


def to_device(values: Array, dtype: str) -> Array:
    """Values in their stored type, rounded to nearest even."""
    if dtype != "bf16":
        return np.ascontiguousarray(values, STORAGE[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_device(values: Array, dtype: str) -> Array:
    """Stored values as float32 or float64."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64 if dtype == "f64" else np.float32)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a device, with the names of csrc/cuda/launcher.h."""

    capability: int = 80
    sms: int = 4
    threads_per_sm: int = 2048
    registers_per_sm: int = 65536
    shared_per_block: int = 166912
    shared_per_sm: int = 167936
    shared_reserved: int = 1024
    l2_bytes: int = 40_000_000
    cluster_blocks: tuple[int, int, int] = (0, 0, 0)


@functools.cache
def _program(path: Path) -> Program:
    return Program(path.read_text())


class Device:
    """Starts kernels in the interpreter. The host side uses it as a Launcher.

    Args:
        ptx: files of kernels.
        seed: decides the order in which threads run.
        limits: the limits that the host side sees.
    """

    # Registers of a thread, the same for every kernel. The resident kernels may use them all.
    REGISTERS = 255

    def __init__(self, ptx: list[Path], seed: int = 1, limits: Limits | None = None) -> None:
        self.device = limits or Limits()
        self.seed = seed
        self.memory = Memory()
        self.launches: list[str] = []
        self.instructions = 0
        programs = [_program(path) for path in ptx]
        self._kernels = {name: p for p in programs for name in p.kernels}
        self._scratch: list[Array] = []

    @property
    def kernels(self) -> list[str]:
        return list(self._kernels)

    def put(self, values: Array | None, dtype: str, name: str, writable: bool = False) -> Any:
        """A rounded copy on the device, or None for None."""
        if values is None:
            return None
        return self.memory.copy(to_device(values, dtype), name, writable=writable)

    def _matrix(self, operand: tuple[int, int, int, int, bool], dtype: str) -> Array:
        address, rows, columns, ld, _ = operand
        assert rows > 0 and columns > 0 and ld >= columns, operand
        flat = self.memory.view(address, (rows - 1) * ld + columns, STORAGE[dtype])
        return np.lib.stride_tricks.as_strided(
            flat, (rows, columns), (ld * flat.itemsize, flat.itemsize)
        )

    # --- The methods of a Launcher --------------------------------------------------------------

    def scratch(self, parts: list[tuple[int, bool]]) -> list[int]:
        """Addresses of new arrays, of the given bytes. A part that must be zero is zeroed."""
        arrays = [self.memory.empty((size,), np.uint8, "scratch") for size, _ in parts]
        self._scratch += arrays
        for array, (size, zero) in zip(arrays, parts, strict=True):
            if zero:
                self.zero(array.ctypes.data, size)
        return [int(array.ctypes.data) for array in arrays]

    def zero(self, address: int, size: int) -> None:
        view = self.memory.view(address, size, np.uint8)
        view[:] = 0
        self.memory.mark_written(view)

    def registers_of(self, kernel: str) -> int:
        return self.REGISTERS

    def multiply(self, dtype: str, c_dtype: str, a: Any, b: Any, c: Any, accumulate: bool) -> None:
        # Values that no kernel wrote are NaN, which spreads to the product.
        left, right = (from_device(self._matrix(m, dtype), dtype) for m in (a, b))
        left, right = left.T if a[4] else left, right.T if b[4] else right
        out = self._matrix(c, c_dtype)
        product = left @ right
        if accumulate:
            product = product + from_device(out, c_dtype)
        out[...] = to_device(product, c_dtype)
        for row in out:
            self.memory.mark_written(row)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        args: bytes,
        cooperative: bool,
        cluster: int,
    ) -> None:
        limits = self.device
        self.launches.append(kernel)
        assert shared <= limits.shared_per_block, (kernel, shared)
        assert not cooperative or np.prod(grid) <= limits.sms, (kernel, grid)
        assert cooperative == kernel.startswith(("resident", "clustered", "streamed"))
        assert (cluster > 1) == kernel.startswith("clustered")
        run = self._kernels[kernel].launch(
            kernel,
            grid,
            block,
            [args],
            shared=shared,
            memory=self.memory,
            seed=self.seed,
            cluster=cluster if cluster > 1 else None,
        )
        self.instructions += run.instructions

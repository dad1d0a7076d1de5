"""Programs of PTX, the memory that their kernels may touch, and launches."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import setup_build
from tests.ptxvm.build import native

Array = np.ndarray[Any, Any]

# The checks that a launch can leave out. Bounds, alignment, barriers and deadlocks are always
# checked. "stale" lets an unordered volatile or relaxed load return the previous value.
CHECKS = ("races", "uninitialised", "stale")

# Unused bytes before and after each array that Memory allocates. An index that is wrong by less
# than this hits no other array.
_GAP = 1 << 16
# The alignment of cudaMalloc, in bytes.
_ALIGN = 256


def compile_ptx(
    source: Path, out_dir: Path, *, arch: str = "compute_80", flags: Sequence[str] = ()
) -> str:
    """Compiles a .cu file to PTX with source lines.

    A second call with the same source, flags and out_dir returns the PTX of the first. A change of
    an included header goes unnoticed, so each test session needs a fresh out_dir.

    Raises:
        RuntimeError: nvcc is missing or refuses the source.
    """
    compiler = setup_build.nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not on PATH: install the CUDA toolkit")
    command = [compiler, "-ptx", "-lineinfo", "-std=c++17", f"-arch={arch}", *flags]
    key = hashlib.sha256(repr(command).encode() + source.read_bytes()).hexdigest()[:16]
    out = out_dir / f"{source.stem}-{arch}-{key}.ptx"
    if not out.exists():
        out_dir.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run(
            [*command, str(source), "-o", str(part)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"nvcc refuses {source}:\n{done.stdout}{done.stderr}")
        part.rename(out)
    return out.read_text()


class Memory:
    """The arrays that kernels may touch. It also knows which of their bytes were written so far.

    One Memory can serve many launches.
    """

    def __init__(self) -> None:
        self._native = native().Memory()
        self._arrays: dict[int, Array] = {}

    def add(
        self, array: Array, name: str = "", *, written: bool = True, writable: bool | None = None
    ) -> Array:
        """Lets kernels touch a contiguous array. The array is not copied.

        Args:
            array: the array. Memory keeps it alive.
            name: the array's name in error messages.
            written: False if its values count as uninitialised until a kernel writes them.
            writable: whether kernels may write it; None takes numpy's `writeable` flag.
        """
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            raise ValueError(f"{name or 'the array'} must be contiguous")
        if writable is None:
            writable = array.flags.writeable
        if array.nbytes:
            address = array.ctypes.data
            self._native.add(
                name or f"array {len(self._arrays)}", address, array.nbytes, written, writable
            )
            self._arrays[address] = array
        return array

    def empty(self, shape: int | tuple[int, ...], dtype: Any, name: str = "") -> Array:
        """A new array that counts as uninitialised, with unused addresses around it.

        Its bytes are 0xFF, which is NaN in every floating-point type.
        """
        array = _apart(np.empty(shape, dtype))
        array.view(np.uint8)[...] = 0xFF
        return self.add(array, name, written=False)

    def copy(self, array: Any, name: str = "", *, writable: bool = True) -> Array:
        """A copy of an array, with unused addresses around it."""
        values = np.asarray(array)
        out = _apart(values)
        out[...] = values
        return self.add(out, name, writable=writable)

    def remove(self, array: Array) -> None:
        if self._arrays.pop(array.ctypes.data, None) is not None:
            self._native.remove(array.ctypes.data)

    def __contains__(self, array: Array) -> bool:
        return not array.nbytes or self._holder(array.ctypes.data, array.nbytes) is not None

    def _holder(self, address: int, nbytes: int) -> Array | None:
        for start, array in self._arrays.items():
            if start <= address and address + nbytes <= start + array.nbytes:
                return array
        return None

    def written(self, array: Array) -> Array:
        """Which elements of an array were written: a bool array of the same shape.

        The array must come from add, empty or copy.
        """
        if not array.nbytes:
            return np.ones(array.shape, bool)
        flags = self._native.written(array.ctypes.data)
        return flags.reshape(-1, array.itemsize).all(-1).reshape(array.shape)

    def mark_written(self, array: Array) -> None:
        """Marks `array`, a contiguous part of an array in this Memory, as written by the host."""
        if array.nbytes:
            self._native.mark_written(array.ctypes.data, array.nbytes)

    def view(self, address: int, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """The array at an address, for host code that gets pointers."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        holder = self._holder(address, size)
        if holder is None:
            raise ValueError(f"no array holds {size} bytes at {address:#x}")
        raw = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)


def _apart(like: Array) -> Array:
    """A new array of the same shape and dtype, with unused addresses on both sides."""
    raw = np.empty(like.nbytes + 2 * _GAP + _ALIGN, np.uint8)
    start = _GAP + -(raw.ctypes.data + _GAP) % _ALIGN
    return raw[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


@dataclass(frozen=True)
class KernelInfo:
    parameter_sizes: tuple[int, ...]  # bytes
    shared_bytes: int  # of static shared memory
    max_threads: int  # of a block, by __launch_bounds__; 0 if there is no bound
    cluster: tuple[int, int, int]  # blocks, by __cluster_dims__; zeros if it does not say


@dataclass(frozen=True)
class Run:
    instructions: int  # how many instructions all threads ran together
    stale_loads: int  # how many loads returned the previous value


class Program:
    """The kernels of one PTX text."""

    def __init__(self, text: str) -> None:
        self._native = native().Module(text)
        self.target: int = self._native.target  # 80 for sm_80
        self.kernels: dict[str, KernelInfo] = {
            name: KernelInfo(tuple(sizes), shared, threads, tuple(cluster))
            for name, (sizes, shared, threads, cluster) in self._native.kernels().items()
        }

    def name_of(self, *parts: str) -> str:
        """The name of the one kernel whose mangled name contains all of `parts`."""
        found = [name for name in self.kernels if all(part in name for part in parts)]
        if len(found) != 1:
            raise ValueError(f"{parts} must name one kernel, found {found or 'none'}")
        return found[0]

    def unknown(self, name: str) -> list[str]:
        """The instructions of a kernel that the interpreter does not know."""
        return self._native.unknown(name)

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        *,
        cluster: int | Sequence[int] | None = None,
        shared: int = 0,
        memory: Memory | None = None,
        buffers: Iterable[Array] = (),
        seed: int = 1,
        quantum: int = 64,
        checks: Iterable[str] = CHECKS,
        max_steps: int = 0,
    ) -> Run:
        """Runs a kernel to its end.

        Args:
            name: the kernel's name in the PTX.
            grid: blocks, in up to three dimensions. All of them are alive at once.
            block: threads of a block.
            args: one for each parameter: an array for a pointer to it, None for a null pointer, a
                number, bytes or a ctypes or numpy structure. Arrays that are not in `memory` are
                added to it for this launch.
            cluster: blocks of a cluster. None takes the number that the kernel requires, or 1.
            shared: bytes of dynamic shared memory.
            memory: the arrays that the kernel may touch beside those of `args` and `buffers`.
            buffers: more arrays to add for this launch; the kernel finds them through pointers in
                a structure.
            seed: sets the order in which threads run; with 0 they take turns in a fixed order.
            quantum: how many instructions a thread runs at most before another thread's turn.
            checks: some of CHECKS.
            max_steps: how many instructions all threads may run together; more are reported as a
                deadlock. 0 for the interpreter's own limit.

        Raises:
            Fault: the kernel did something wrong. The exception has the attributes kind, block,
                thread, ptx_line and source.
        """
        info = self.kernels.get(name)
        if info is None:
            raise ValueError(f"no kernel is named {name!r}, there are {sorted(self.kernels)}")
        if len(args) != len(info.parameter_sizes):
            raise ValueError(f"{name} takes {len(info.parameter_sizes)} arguments, got {len(args)}")
        unknown = set(checks) - set(CHECKS)
        if unknown:
            raise ValueError(f"checks must be of {CHECKS}, got {sorted(unknown)}")
        clusters = (0, 0, 0) if cluster is None else _three(cluster)
        if cluster is not None and min(clusters) < 1:
            raise ValueError(f"a cluster has at least one block, got {clusters}")
        memory = Memory() if memory is None else memory
        lent = [a for a in (*args, *buffers) if isinstance(a, np.ndarray) and a.ndim > 0]
        lent = [memory.add(a) for a in {id(a): a for a in lent}.values() if a not in memory]
        try:
            out = self._native.launch(
                name,
                _three(grid),
                _three(block),
                clusters,
                shared,
                [_as_bytes(a, size) for a, size in zip(args, info.parameter_sizes, strict=True)],
                memory._native,
                seed,
                quantum,
                max_steps,
                *(check in checks for check in CHECKS),
            )
        finally:
            for array in lent:
                memory.remove(array)
        return Run(out["instructions"], out["stale_loads"])


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int | np.integer) else tuple(size)
    x, y, z = (*(int(n) for n in sizes), 1, 1, 1)[:3]
    return x, y, z


def _as_bytes(value: Any, size: int) -> bytes:
    """The bytes that an argument has as a kernel parameter of `size` bytes."""
    if value is None:
        return bytes(size)
    if isinstance(value, np.ndarray) and value.ndim > 0:
        return int(value.ctypes.data).to_bytes(8, "little")
    if isinstance(value, bool):
        return int(value).to_bytes(size, "little")
    if isinstance(value, int):
        return (value % (1 << 8 * size)).to_bytes(size, "little")
    if isinstance(value, float):
        return np.array(value, np.float32 if size == 4 else np.float64).tobytes()
    if isinstance(value, np.generic | np.ndarray):
        return value.tobytes()
    return bytes(value)

"""The probes (tests/ptxvm/probes), inputs for them, and the faults that they must raise."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import setup_build
from tests import ptxvm
from tests.ptxvm import Fault, Program

PROBES = Path(__file__).parent / "probes"
SEEDS = [0, 1, 2, 3, 4]

Array = np.ndarray[Any, Any]

needs_nvcc = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: it compiles the probes"
)
each_seed = pytest.mark.parametrize("seed", SEEDS)


@functools.cache
def load(name: str, arch: str = "compute_80") -> Program:
    """Compiles a file of probes for an architecture, once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        return Program(ptxvm.compile_ptx(PROBES / f"{name}.cu", Path(folder), arch=arch))


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Random numbers in [-1, 1)."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def bfloat_bits(x: Array) -> Array:
    """The bits of float32 numbers that are rounded to bfloat16, to the nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bfloats(bits: Array) -> Array:
    """The bfloat16 numbers that have these bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def int32(x: int) -> int:
    """x, reduced to 32 bits with a sign."""
    return (x + 2**31) % 2**32 - 2**31


def faulty(kind: str, program: Program, *args: Any, **kwargs: Any) -> Any:
    """Runs a launch that must raise a fault of this kind, and returns the fault."""
    with pytest.raises(Fault) as raised:
        program.launch(*args, **kwargs)
    assert raised.value.kind == kind, str(raised.value)
    return raised.value


def racy(program: Program, *args: Any, **kwargs: Any) -> Any:
    """Runs a launch that must race, without the check of uninitialised reads.

    Under some seeds the racing read comes before the write, and would be reported first.
    """
    return faulty("race", program, *args, checks=("races",), **kwargs)

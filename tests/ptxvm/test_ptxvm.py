"""The PTX interpreter: launches, their arguments and errors."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from tests.ptxvm import Memory, Program
from tests.ptxvm.kit import faulty, load, needs_nvcc, numbers

pytestmark = needs_nvcc


def test_faults_of_the_kernel_itself() -> None:
    program, out = load("memory"), np.zeros(64, np.int32)
    x = np.arange(64).astype(np.int32)
    program.launch("asserts", 1, 64, [x, out])
    np.testing.assert_array_equal(out, x)
    failed = faulty("assert", program, "asserts", 1, 64, [x + 60, out])
    assert failed.thread >= 40
    assert re.search(r"hold: x\[threadIdx.x\] < 100, in .*asserts", str(failed))
    assert faulty("division by zero", program, "divides", 1, 64, [x, out]).thread == 0
    assert "inlined" in str(faulty("unsupported", program, "calls", 1, 64, [x, out]))


class Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("scale", ctypes.c_float * 3),
    )


def test_structures_by_value() -> None:
    program, x, out = load("memory"), numbers(60), np.zeros(60, np.float32)
    args = Args(x.ctypes.data, out.ctypes.data, 60, (ctypes.c_float * 3)(1, 2, 3))
    assert program.kernels["takes_struct"].parameter_sizes == (ctypes.sizeof(Args),)
    program.launch("takes_struct", 1, 64, [args], buffers=[x, out])
    np.testing.assert_array_equal(out, x * (np.arange(60) % 3 + 1).astype(np.float32))
    faulty("out of bounds", program, "takes_struct", 1, 64, [args], buffers=[out])


def test_every_instruction_is_known() -> None:
    newer = ("cluster", "mbarrier", "bulk")
    for name in ("arithmetic", "warp", "memory", "order", "words", *newer):
        program = load(name, "compute_90") if name in newer else load(name)
        unknown = {kernel: program.unknown(kernel) for kernel in program.kernels}
        assert not any(unknown.values()), unknown
    text = (
        ".version 9.0\n.target sm_90\n.visible .entry k()\n{\nwgmma.fence.sync.aligned;\nret;\n}\n"
    )
    program = Program(text)
    assert program.unknown("k") == ["wgmma.fence.sync.aligned"]
    faulty("unsupported", program, "k", 1, 1, [])


def test_launch_errors() -> None:
    program, x = load("memory"), np.ones(64, np.int32)
    with pytest.raises(ValueError, match="no kernel is named 'absent'"):
        program.launch("absent", 1, 1, [])
    with pytest.raises(ValueError, match="divides takes 2 arguments, got 1"):
        program.launch("divides", 1, 64, [x])
    with pytest.raises(ValueError, match="limited to 64 threads a block, got 65"):
        program.launch("divides", 1, 65, [x, x.copy()])
    with pytest.raises(ValueError, match=r"argument 0 of takes_struct has 32 bytes, got 31"):
        program.launch("takes_struct", 1, 64, [bytes(31)])
    with pytest.raises(ValueError, match="overlaps"):
        program.launch("divides", 1, 64, [x[:40], x[30:]])
    with pytest.raises(ValueError, match="checks must be of"):
        program.launch("divides", 1, 64, [x, x.copy()], checks=["speed"])
    with pytest.raises(RuntimeError, match="what is this"):
        Program(".version 9.0\n.target sm_80\n.visible .entry k()\n{\n.what is this;\nret;\n}\n")


def test_memory_behind_pointers() -> None:
    memory = Memory()
    x = memory.copy(np.arange(12).reshape(3, 4), "x")
    view = memory.view(x[1].ctypes.data, (2, 4), x.dtype)
    np.testing.assert_array_equal(view, x[1:])
    view[0, 0] = 99
    assert x[1, 0] == 99
    with pytest.raises(ValueError, match="no array holds"):
        memory.view(x.ctypes.data + 8, (3, 4), x.dtype)

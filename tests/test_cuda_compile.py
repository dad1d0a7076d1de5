"""What the compiler makes of the kernels: registers, shared memory, no spills, tensor cores."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda import build

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason="no nvcc: kernels cannot be compiled")

DTYPES = ["f32", "f64", "f16", "bf16"]
# Registers of a thread. The resident kernels hold weights in them, in one block of 256 threads on a
# multiprocessor, which has 65,536; the others leave room for at least four blocks.
BUDGETS = {
    **{f"step_{way}_{dtype}": 64 for way in ("forward", "backward") for dtype in DTYPES},
    **{f"sum_rows_{dtype}": 64 for dtype in DTYPES},
    **{f"round_{dtype}": 32 for dtype in ("f16", "bf16")},
    "write_offsets": 40,
    **{
        f"resident_{way}_{cores}_{dtype}": 255
        for way in ("forward", "backward")
        for cores, dtypes in (("fma", ("f32", "f16", "bf16")), ("mma", ("tf32", "f16", "bf16")))
        for dtype in dtypes
    },
}


class Kernel(NamedTuple):
    registers: int
    shared: int  # static
    stack: int
    spills: int


@functools.cache
def assembled(arch: int) -> dict[str, Kernel]:
    """The kernels as ptxas makes them for an architecture, from the PTX of the tests."""
    kernels = {}
    for path in build.ptx(80):
        command = [build.nvcc() or "", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", str(path)]
        done = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
        for entry in done.stderr.split("Compiling entry function '")[1:]:

            def number(pattern: str, text: str = entry) -> int:
                found = re.search(pattern, text)
                return int(found[1]) if found else 0

            kernels[entry.split("'")[0]] = Kernel(
                registers=number(r"Used (\d+) registers"),
                shared=number(r"(\d+) bytes smem"),
                stack=number(r"(\d+) bytes stack frame"),
                spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
    return kernels


def bodies(path: Path) -> dict[str, str]:
    """The text of each kernel in a file of PTX."""
    parts = path.read_text().split(".entry ")[1:]
    return {part.split("(")[0].strip(): part for part in parts}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_registers_and_spills(arch: int) -> None:
    kernels = assembled(arch)
    assert kernels.keys() == BUDGETS.keys()
    assert len(kernels) <= 40
    for name, kernel in kernels.items():
        assert 0 < kernel.registers <= BUDGETS[name], (name, kernel)
        assert kernel.spills == 0, (name, kernel)
        # ptxas keeps a number of the f64 kernels on the stack for sm_90: a call, not a spill.
        assert kernel.stack <= (16 if name.endswith("f64") else 0), (name, kernel)
        # Nothing but sum_rows has shared memory of its own: the plan counts the rest.
        assert (kernel.shared > 0) == name.startswith("sum_rows"), (name, kernel)
        assert kernel.shared <= 48 << 10


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_the_grids_fit(arch: int) -> None:
    """With the registers that the kernels have, blocks of a resident launch run together."""
    device = build.host().architectures()[f"sm_{arch}"]
    resident = 0
    for cores, dtype, way, H, N, D in itertools.product(
        ["fma", "mma"],
        ["f32", "f16", "bf16"],
        ["forward", "backward"],
        [64, 512, 1024],
        [4, 32],
        [1, 2],
    ):
        name = f"resident_{way}_{cores}_{'tf32' if (cores, dtype) == ('mma', 'f32') else dtype}"
        registers = assembled(arch)[name].registers
        plan = build.host().plan(
            *("lstm", dtype, [150, N, H, H, H, D], f"sm_{arch}"),
            backward=way == "backward",
            allow_tf32=True,
            registers=registers,
        )
        if plan["regime"] == "per_step" or plan["cores"] != cores:
            continue
        resident += 1
        together = build.host().blocks_per_sm(f"sm_{arch}", registers, plan["shared_bytes"])
        x, y, z = plan["grid"]
        assert x * y * z <= together * device["sms"], (name, plan)
    assert resident > 40


def test_tensor_cores_are_used_where_the_plan_says_so() -> None:
    instructions = {
        "mma_tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "mma_f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma_bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    }
    found = {name: body for path in build.ptx(80) for name, body in bodies(path).items()}
    assert found.keys() == BUDGETS.keys()
    for name, body in found.items():
        wanted = next((i for cores, i in instructions.items() if name.endswith(cores)), None)
        used = set(re.findall(r"mma\.sync\S*", body))
        assert used == ({wanted} if wanted and "mma" in name else set()), name


def test_the_barrier_is_what_it_should_be() -> None:
    """One arrival and one poll with the order they need, and no fence of the whole system."""
    for path in build.ptx(80):
        for name, body in bodies(path).items():
            resident = name.startswith("resident")
            assert ("red.release.gpu.global.add.u32" in body) == resident, name
            assert ("ld.acquire.gpu.global.u32" in body) == resident, name
            assert "membar" not in body, name
            assert "fence" not in body, name


def test_it_compiles_for_the_oldest_gpu() -> None:
    """sm_75 has no bfloat16 and no TF32 tensor cores: its kernels that use them stop at once."""
    found = {name: body for path in build.ptx(75) for name, body in bodies(path).items()}
    assert found.keys() == BUDGETS.keys()
    for name, body in found.items():
        assert "mma.sync" not in body
        assert ("trap" in body) == ("_mma_" in name), name


def test_the_table_of_kernels_is_complete() -> None:
    listed = set()
    for source in build.kernel_sources():
        listed |= set(re.findall(r"FUSEDRNN_KERNEL\((\w+)\)", source.read_text()))
    assert listed == BUDGETS.keys()

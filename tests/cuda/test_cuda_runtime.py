"""The calls of the CUDA runtime that the bindings make, recorded by a fake runtime without a GPU.

Each program runs in its own process, in which no device has been used yet.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

import setup_build
from tests.kit.bindings import runtime
from tests.kit.build import ROOT

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: there are no headers of CUDA"
)

CLUSTERED = "clustered_backward_mma_bf16"
KERNELS = ("step", "rows", "resident_fma", CLUSTERED, "store")
SHARED = 232448  # bytes that a block may have
BLOCKS = {2: 128, 4: 128, 8: 128}  # that run together in clusters
LOADED = [
    *(f"load {name} (relaxed)" for name in KERNELS),
    f"allow {CLUSTERED} {SHARED} (relaxed)",
    *(f"clusters {CLUSTERED} {n}x1 in {n} of 256, {SHARED} (relaxed)" for n in (2, 4, 8)),
]
ASSERT = 710  # cudaErrorAssert


@cache
def module_path() -> str:
    return str(runtime().__file__)


def run(program: str) -> list[str]:
    """The lines that a program prints. `cuda` is the module of tests/kit/torch_cuda/runtime.cpp."""
    head = (
        "import torch\nfrom pathlib import Path\nfrom tests.kit.build import load\n"
        f"cuda = load(Path({module_path()!r}))\n"
        "def show(): print(*cuda.calls(), sep='\\n')\n"
        "def error(function, *args):\n"
        "    try: function(*args)\n"
        "    except RuntimeError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_all_kernels_are_loaded_at_the_first_use_of_a_device() -> None:
    """They are loaded in a mode that does not break a capture. Launches then find their kernels."""
    lines = run("cuda.launch('step', 0, False); cuda.launch('rows', 0, False); show()")
    first, second = "launch step 2x3x1 of 256, 0 bytes", "launch rows 2x3x1 of 256, 0 bytes"
    assert lines == ["guard 0", *LOADED, first, "guard 0", second]


def test_each_device_loads_the_kernels() -> None:
    lines = run("cuda.describe_device(0); cuda.calls(); cuda.describe_device(1); show()")
    assert lines == ["count", "guard 1", "set 1", *LOADED]


def test_the_current_device_is_not_set_again() -> None:
    """cudaSetDevice would replace the current context by the primary one."""
    lines = run("cuda.make_current(1); cuda.launch('step', 0, False); show()")
    assert lines[1] == "set 0"
    lines = run("cuda.launch('step', 0, False); show()")
    assert not any(line.startswith("set") for line in lines)


def test_shared_memory_is_allowed_once_and_relaxed() -> None:
    lines = run(
        "cuda.launch('step', 0, False); cuda.calls()\n"
        "for size in (49152, 49153, 60000, 50000): cuda.launch('resident_fma', size, True)\n"
        "show()"
    )
    assert [line for line in lines if line != "guard 0"] == [
        "launch resident_fma 2x3x1 of 256, 49152 bytes, cooperative",
        "allow resident_fma 49153 (relaxed)",
        "launch resident_fma 2x3x1 of 256, 49153 bytes, cooperative",
        "allow resident_fma 60000 (relaxed)",
        "launch resident_fma 2x3x1 of 256, 60000 bytes, cooperative",
        "launch resident_fma 2x3x1 of 256, 50000 bytes, cooperative",
    ]


def test_a_launch_in_clusters() -> None:
    lines = run(f"cuda.launch({CLUSTERED!r}, 0, True, 2); show()")
    assert lines[-1] == f"launch {CLUSTERED} 2x3x1 of 256, 0 bytes, cooperative, clusters of 2"
    for code, advice in ((720, "the device cannot hold all blocks"), (912, "leave cluster= out")):
        (line,) = run(f"cuda.fail('launch', {code}); error(cuda.launch, {CLUSTERED!r}, 0, True, 2)")
        assert f"0 bytes of shared memory, cooperative, in clusters of 2; {advice}" in line


def test_kernels_from_ptx_for_an_older_architecture() -> None:
    """On a newer device they still have no clusters, or no tensor cores."""
    lines = run("cuda.compile_for(80); print(cuda.describe_device(0), end='')")
    assert lines[1] == "capability 80"
    assert lines[9:12] == [f"blocks_in_clusters_of_{n} 0" for n in BLOCKS]


@pytest.mark.parametrize("function", ["allow", "clusters"])
def test_a_device_that_does_not_tell_about_clusters_has_none(function: str) -> None:
    lines = run(f"cuda.fail({function!r}, 1); print(cuda.describe_device(0), end='')")
    assert lines[9:12] == [f"blocks_in_clusters_of_{n} 0" for n in BLOCKS]


@pytest.mark.parametrize(
    ("function", "told"),
    [("launch", "CUDA kernel step did not start"), ("set", "cudaSetDevice failed")],
)
def test_a_failed_assert_is_explained(function: str, told: str) -> None:
    """The first call that returns the error explains it."""
    (line,) = run(
        f"cuda.make_current(1); cuda.fail({function!r}, {ASSERT})\n"
        "error(cuda.launch, 'step', 0, False)"
    )
    assert f"{told}: cudaErrorAssert" in line
    assert "its blocks waited too long for each other" in line
    assert "FUSEDRNN_CUDA_REGIME=per_step" in line and "start it again" in line


def test_a_kernel_that_cannot_be_loaded_is_tried_again() -> None:
    lines = run(
        "cuda.fail('load', 209); error(cuda.launch, 'step', 0, False); cuda.calls()\n"
        "cuda.fail('load', 0); cuda.launch('step', 0, False); show()"
    )
    assert "CUDA kernel step cannot be loaded" in lines[0]
    assert "compiled for 90, the device is Made-up GPU (sm_90)" in lines[0]
    assert lines[1 : 2 + len(LOADED)] == ["guard 0", *LOADED]


def test_device_facts() -> None:
    lines = run("print(cuda.describe_device(0), end='')")
    assert lines[:3] == ["name Made-up GPU", "capability 90", "sms 132"]
    keys = [line.split()[0] for line in lines]
    assert keys == [
        *("name", "capability", "sms", "threads_per_sm", "registers_per_sm", "shared_per_block"),
        *(
            "shared_per_sm",
            "shared_reserved",
            "l2_bytes",
            *(f"blocks_in_clusters_of_{blocks}" for blocks in (2, 4, 8)),
            "cooperative_launch",
            "driver",
            "runtime",
        ),
        *["kernel"] * 5,
    ]
    assert lines[9:12] == [f"blocks_in_clusters_of_{n} {blocks}" for n, blocks in BLOCKS.items()]
    assert lines[12:15] == ["cooperative_launch 1", "driver 13.1", "runtime 13.0"]
    assert "kernel step registers 200 shared 0 local 0 constant 0 max_threads 256" in lines


def test_occupancy() -> None:
    lines = run("print(cuda.blocks_together('resident_fma', 60000, 0)); show()")
    assert lines[0] == "1"
    assert lines[-2:] == ["allow resident_fma 60000 (relaxed)", "occupancy resident_fma 60000"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("cuda.describe_device, 2", "index must be that of one of 2 GPUs, got 2"),
        ("cuda.describe_device, -1", "index must be that of one of 2 GPUs, got -1"),
        ("cuda.blocks_together, 'fast', 0, 0", "no CUDA kernel is named fast"),
        ("cuda.blocks_together, 'step', -1, 0", "shared_bytes must not be negative, got -1"),
        ("cuda.blocks_together, 'step', 232449, 0", "must be at most 232448 on this device, got"),
    ],
)
def test_wrong_arguments(call: str, message: str) -> None:
    (line,) = run(f"error({call})")
    assert message in line


def test_a_machine_without_a_gpu() -> None:
    (line,) = run("cuda.fail('count', 100); error(cuda.describe_device, 0)")
    assert line == "fusedrnn: there is no GPU: cudaErrorOther (made up)"

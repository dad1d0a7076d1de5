"""A lack of memory at any place raises an error that says so. Nothing hangs, and the next call
computes the right results.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
import setup_build
from tests.kit.build import turn

ROOT = Path(__file__).resolve().parents[2]
BUILD_DIR = ROOT / "build" / "memory"


@pytest.fixture(scope="module")
def failing() -> Path:
    """The library that refuses allocations."""
    source = ROOT / "tests" / "memory" / "failing.cpp"
    flags = [*setup_build.common_flags(), "-fvisibility=default"]
    with turn(BUILD_DIR):
        return setup_build.ninja_build(BUILD_DIR, "failing.so", {source: []}, flags, ["-shared"])


def test_pieces_that_throw() -> None:
    """In any thread of a team. The leader throws the exception when all pieces are done."""
    flags = [*setup_build.common_flags(), "-pthread"]
    source = ROOT / "tests" / "memory" / "team.cpp"
    with turn(BUILD_DIR / "team"):
        program = setup_build.ninja_build(
            BUILD_DIR / "team", "team", {source: []}, flags, ["-pthread"]
        )
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "64 caught, 0 wrong, helpers took some\n", done


def run(module: str, *arguments: str, preload: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # malloc returns the memory of a call to the system.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    if preload:
        environment["LD_PRELOAD"] = str(preload)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


# Threads share a single sequence by units, and several sequences by rows.
SHARED = ("lstm, plain, torch.float32", "lstm, lengths, torch.float32", "FusedRNNCell")


@pytest.mark.parametrize(("threads", "calls"), [("1", ()), ("2", SHARED)], ids=["1", "2"])
def test_every_allocation_refused_in_turn(
    failing: Path, threads: str, calls: tuple[str, ...]
) -> None:
    """The library allocates by operator new, and torch for tensors, in forward and backward."""
    said = run("tests.memory.refusals", threads, *calls, preload=failing)
    counts = [int(n) for n in re.findall(r"(\d+) allocations$", said, re.MULTILINE)]
    assert len(counts) == (len(calls) or 13) and min(counts) > 40, said


def test_limits_of_memory() -> None:
    """Large tensors are copies, conversions, scratch memory, outputs and gradients."""
    said = run("tests.memory.limits")
    counts = [int(n) for n in re.findall(r"(\d+) errors$", said, re.MULTILINE)]
    assert len(counts) == 6 and min(counts) >= 2 and said.endswith("done\n"), said


@pytest.mark.parametrize("T", [1 << 45, 1 << 57])
def test_the_error_has_the_type_and_words_of_torch(T: int) -> None:
    """Programs that retry with a smaller batch recognise a lack of memory by them."""
    x = torch.zeros(1, 1, 1).expand(T, 1, 4)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        fusedrnn.FusedGRU(4, 6)(x)

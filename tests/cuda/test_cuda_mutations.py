"""The interpreter's checks find faults in our kernels: each test removes or moves one statement."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

import setup_build
from tests.cuda.mutations import (
    COUNT,
    FMA,
    MMA,
    MUTATIONS,
    STREAMED_FMA,
    STREAMED_MMA,
    WORDS,
    Mutation,
)
from tests.cuda.starts_mutations import STARTS_MUTATIONS
from tests.kit import build
from tests.kit.device import Device, Limits
from tests.kit.device_cases import DeviceCase, assert_right, run_on, tight
from tests.kit.starts import StartsCase, assert_as_expected
from tests.ptxvm import Fault

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

ALL = [*MUTATIONS, *STARTS_MUTATIONS]
# How lines that define kernels begin.
DEFINE = ("FUSEDRNN_RESIDENT", "FUSEDRNN_CLUSTERED", "FUSEDRNN_STREAMED")
# The kernels of each file that are compiled. The lines of the other kernels are removed.
KEPT = {
    "resident_fma.cu": "fma_f32",
    "resident_mma.cu": "mma_bf16",
    "clustered_fma.cu": "fma_f32",
    "clustered_mma.cu": "mma_bf16",
    "streamed_fma.cu": "fma_f32",
    "streamed_mma.cu": "mma_bf16",
    "around_loop.cu": "",
    "step.cu": "",
}


def mutated(csrc: Path, mutation: Mutation) -> Path:
    """Copies the sources with the change. Only kernels and cells that the case runs are kept."""
    shutil.copytree(build.CSRC, csrc, ignore=shutil.ignore_patterns("*.cpp", "*.inl"))
    header = csrc / "cuda" / mutation.header
    text = header.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old!r} must stand once in {header.name}"
    header.write_text(text.replace(mutation.old, mutation.new))
    kinds = {"lstm": "kLstm, Lstm", "gru": "kGru, Gru", "rnn_tanh": "kRnnTanh, RnnTanh"}
    storage = csrc / "cuda" / "storage.cuh"
    all_cells, one_cell = "FUSEDRNN_CELLS(FUSEDRNN_CASE)", kinds[mutation.case.cell]
    assert all_cells in storage.read_text()
    storage.write_text(storage.read_text().replace(all_cells, f"FUSEDRNN_CASE({one_cell})"))
    source = csrc / "cuda" / mutation.kernels
    kept = KEPT[mutation.kernels]
    lines = source.read_text().split("\nconst std::vector")[0].splitlines(keepends=True)
    source.write_text(
        "".join(line for line in lines if not line.startswith(DEFINE) or kept in line)
    )
    return source


def judge(mutation: Mutation, ptx: list[Path]) -> str:
    """The first sign under several orders of threads: a kind of fault, "numbers", or ""."""
    seeds = range(20 if mutation.case is WORDS else 3)
    return next(filter(None, (sign_of(mutation, ptx, seed) for seed in seeds)), "")


def limits_of(mutation: Mutation) -> Limits | None:
    """The limits of the device: of the streamed cases, those with which they stream weights."""
    if mutation.kernels.startswith("clustered"):
        return Limits(capability=90, sms=8, cluster_blocks=(8, 8, 8))
    if mutation.case is STREAMED_FMA:
        return tight(STREAMED_FMA, 4, "fma_f32")
    return tight(STREAMED_MMA, 10, "mma_bf16") if mutation.case is STREAMED_MMA else None


def sign_of(mutation: Mutation, ptx: list[Path], seed: int) -> str:
    regime = mutation.kernels.split("_")[0]
    resident = regime in ("resident", "clustered") or mutation.kernels == "around_loop.cu"
    regime = "resident" if resident else "streamed" if regime == "streamed" else "per_step"
    device = Device(ptx, seed, limits_of(mutation))
    choice = "exchange=words" if mutation.case is WORDS else ""
    choice = "cluster=2,arrive=clusters" if mutation.kernels.startswith("clustered") else choice
    try:
        got = run_on(mutation.case, device, regime=regime, choice=choice, spin_limit=1 << 12)
        if isinstance(mutation.case, StartsCase):
            assert_as_expected(got, mutation.case)
        else:
            assert_right(got, mutation.case)
    except Fault as fault:
        return str(fault.kind)
    except AssertionError:
        return "numbers"
    return ""


def compiled(mutation: Mutation, tmp_path: Path) -> list[Path]:
    """The PTX of all kernels, with the change."""
    source = mutated(tmp_path / "csrc", mutation)
    output = tmp_path / f"{source.stem}.ptx"
    clusters = mutation.kernels.startswith("clustered")
    build.compile_kernel(source, output, f"-arch=compute_{90 if clusters else 80}", "-ptx")
    return [*(path for path in build.ptx(80) if path.name != output.name), output]


@pytest.mark.parametrize("mutation", ALL, ids=lambda m: m.name)
def test_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    assert judge(mutation, compiled(mutation, tmp_path)) in mutation.sign


@pytest.mark.parametrize(
    "mutation",
    [*{(m.kernels, m in STARTS_MUTATIONS): m for m in ALL}.values()],
    ids=lambda m: m.kernels,
)
def test_nothing_is_caught_without_a_change(mutation: Mutation, tmp_path: Path) -> None:
    same = dataclasses.replace(mutation, new=mutation.old)
    assert judge(same, compiled(same, tmp_path)) == ""


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("case", [FMA, MMA], ids=["fma_f32", "mma_bf16"])
def test_a_block_that_never_arrives_ends_in_an_error(
    case: DeviceCase, way: str, tmp_path: Path
) -> None:
    """The other blocks stop polling, and the error names the kernel and what to do."""
    cores = "mma" if case is MMA else "fma"
    block = f"if (threadIdx.x == 0 && (blockIdx.x != 1 || kernel_[9] != '{way[0]}'))"
    absent = Mutation(
        "a block never arrives",
        f"resident_{cores}.cu",
        "barrier.cuh",
        COUNT,
        COUNT.replace("if (threadIdx.x == 0)", block),
        ("assert",),
        case,
    )
    device = Device(compiled(absent, tmp_path))
    with pytest.raises(Fault) as failed:
        run_on(case, device, regime="resident", spin_limit=1 << 12)
    kernel = f"resident_{way}_{cores}_{case.dtype}"
    assert device.launches[-1] == kernel
    assert failed.value.kind == "assert"
    assert re.search(
        rf"arrive; FUSEDRNN_CUDA_REGIME=per_step .*, in {kernel}$", failed.value.args[0], re.M
    )

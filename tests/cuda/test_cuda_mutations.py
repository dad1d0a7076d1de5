"""The interpreter's checks find faults in our kernels: each test removes or moves one statement."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

import setup_build
from tests.kit import build
from tests.kit.device import Device, Limits
from tests.kit.device_cases import DeviceCase, assert_right, run_on, tight
from tests.ptxvm import Fault

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

FMA = DeviceCase("gru", 3, 3, 18, 18, 1, True, (3, 3, 2, 1))
# More rows than a range of sum_rows has.
SUMS = DeviceCase("gru", 9, 3, 18, 18, 1, True, (9,) * 9)
MMA = DeviceCase("lstm", 9, 3, 18, 18, 1, True, (9, 9, 4), "bf16")
WORDS = DeviceCase("gru", 3, 3, 18, 18, 2, True, (3, 3, 3, 2, 2, 2, 1, 1, 1))
# Their blocks are in clusters, which arrive as one.
CLUSTERS_FMA = DeviceCase("gru", 5, 3, 18, 18, 1, True, (5, 5, 4, 2))
CLUSTERS_MMA = DeviceCase("lstm", 9, 3, 18, 18, 1, True, (9, 9, 4), "bf16")
# Their weights are streamed, and there is more than one group of sequences.
STREAMED_FMA = DeviceCase("gru", 11, 3, 110, 110, 2, True, (11, 9, 2))
STREAMED_MMA = DeviceCase("rnn_tanh", 25, 3, 580, 580, 1, True, (25, 25), "bf16")
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


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change of `header`, which the file `kernels` includes: `old` becomes `new`.

    `sign` lists how the change may show: a kind of fault, or "numbers" for wrong results.
    """

    name: str
    kernels: str
    header: str
    old: str
    new: str
    sign: tuple[str, ...]
    case: DeviceCase


COUNT = """    if (threadIdx.x == 0)
      asm volatile("red.release"""
MUTATIONS = [
    Mutation(
        "arrives before all threads of the block have written",
        "resident_fma.cu",
        "barrier.cuh",
        "    __syncthreads();\n    count();\n",
        "    count();\n",
        ("race", "weak memory"),
        FMA,
    ),
    Mutation(
        "no release before the arrival",
        "resident_fma.cu",
        "barrier.cuh",
        "red.release.gpu",
        "red.relaxed.gpu",
        ("weak memory",),
        FMA,
    ),
    Mutation(
        "no acquire after the spin",
        "resident_fma.cu",
        "barrier.cuh",
        "ld.acquire.gpu",
        "ld.relaxed.gpu",
        ("weak memory",),
        FMA,
    ),
    Mutation(
        "no barrier after the spin",
        "resident_fma.cu",
        "barrier.cuh",
        "    poll();\n    __syncthreads();\n",
        "    poll();\n",
        ("race", "weak memory"),
        FMA,
    ),
    Mutation(
        "waits for all blocks but one",
        "resident_fma.cu",
        "barrier.cuh",
        "while (arrived < expected_ &&",
        "while (arrived + 1 < expected_ &&",
        ("race",),
        FMA,
    ),
    Mutation(
        "one buffer instead of two",
        "resident_fma.cu",
        "resident_forward.cuh",
        "s == kLast ? turn ^ 1 : turn, j",
        "turn, j",
        ("race",),
        FMA,
    ),
    Mutation(
        "sums before the source is in shared memory",
        "resident_fma.cu",
        "product_fma.cuh",
        "      __syncthreads();\n      sum<s>",
        "      sum<s>",
        ("race", "uninitialised read"),
        FMA,
    ),
    Mutation(
        "reads sums before they are complete",
        "resident_fma.cu",
        "product_fma.cuh",
        "      sum<s>(begin, count);\n      __syncthreads();\n",
        "      sum<s>(begin, count);\n",
        ("race", "uninitialised read"),
        FMA,
    ),
    Mutation(
        "hands on a neighbour's unit",
        "resident_fma.cu",
        "resident_forward.cuh",
        "turn ^ 1 : turn, j, place.first_u + u}",
        "turn ^ 1 : turn, j, place.first_u + u + 1}",
        ("race", "numbers", "out of bounds"),
        FMA,
    ),
    Mutation(
        "one sequence too many",
        "resident_fma.cu",
        "resident.cuh",
        "if (j < n && place.first_u + u < a.H)",
        "if (j <= n && place.first_u + u < a.H)",
        ("race", "numbers", "out of bounds", "uninitialised read"),
        FMA,
    ),
    Mutation(
        "leaves out a slice of K",
        "resident_fma.cu",
        "shared_memory.cuh",
        "for (int slice = 0; slice < tile.slices; ++slice)",
        "for (int slice = 1; slice < tile.slices; ++slice)",
        ("numbers",),
        FMA,
    ),
    Mutation(
        "takes the gradient of sequences that are not there yet",
        "resident_fma.cu",
        "resident_backward.cuh",
        "      pending = step.n;\n",
        "      pending = place.rows;\n",
        ("numbers",),
        dataclasses.replace(FMA, cell="lstm"),
    ),
    Mutation(
        "reads sums of tensor cores before they are complete",
        "resident_mma.cu",
        "product_mma.cuh",
        "sum<s>(source.values, begin, n);\n    shared_.wait_for_sums(s, n);\n",
        "sum<s>(source.values, begin, n);\n",
        ("race", "uninitialised read"),
        MMA,
    ),
    Mutation(
        "a fragment of the wrong row",
        "resident_mma.cu",
        "product_mma.cuh",
        "f.high = packed(weight, rt * 16 + quad() + 8, k)",
        "f.high = packed(weight, rt * 16 + quad() + 7, k)",
        ("numbers",),
        MMA,
    ),
    Mutation(
        "operands that do not agree on the order of K",
        "resident_mma.cu",
        "product_mma.cuh",
        "{f.low.z, f.high.z, f.low.w, f.high.w}",
        "{f.low.w, f.high.w, f.low.z, f.high.z}",
        ("numbers",),
        MMA,
    ),
    Mutation(
        "hands sums on before they are complete",
        "clustered_mma.cu",
        "cluster.cuh",
        "int n) const {\n    __syncthreads();\n",
        "int n) const {\n",
        ("race", "uninitialised read"),
        CLUSTERS_MMA,
    ),
    Mutation(
        "takes sums of a cluster before they are there",
        "clustered_fma.cu",
        "cluster.cuh",
        "    arrive_in_cluster();\n    wait_in_cluster();\n",
        "    __syncthreads();\n",
        ("race", "uninitialised read"),
        CLUSTERS_FMA,
    ),
    Mutation(
        "no release before a block arrives in its cluster",
        "clustered_fma.cu",
        "cluster.cuh",
        "barrier.cluster.arrive.release",
        "barrier.cluster.arrive.relaxed",
        ("race", "weak memory"),
        CLUSTERS_FMA,
    ),
    Mutation(
        "hands sums to itself",
        "clustered_mma.cu",
        "cluster.cuh",
        "store_in_block(to, owner,",
        "store_in_block(to, rank,",
        ("race", "numbers", "uninitialised read"),
        CLUSTERS_MMA,
    ),
    Mutation(
        "leaves out the sums of a block of the cluster",
        "clustered_fma.cu",
        "cluster.cuh",
        "for (int rank = 0; rank < shape.cluster; ++rank)",
        "for (int rank = 1; rank < shape.cluster; ++rank)",
        ("numbers",),
        CLUSTERS_FMA,
    ),
    Mutation(
        "every block of a cluster multiplies the first part of K",
        "clustered_mma.cu",
        "resident.cuh",
        "rank_in_cluster(a.shape) * a.shape.tile[s].K_part : 0",
        "0 * a.shape.tile[s].K_part : 0",
        ("numbers",),
        CLUSTERS_MMA,
    ),
    Mutation(
        "counts a cluster before its blocks have arrived",
        "clustered_fma.cu",
        "barrier.cuh",
        "      wait_in_cluster();\n      count();\n",
        "      count();\n      wait_in_cluster();\n",
        ("race", "weak memory"),
        CLUSTERS_FMA,
    ),
    Mutation(
        "a word by a plain store",
        "resident_fma.cu",
        "words.cuh",
        "st.relaxed.gpu.global.u64",
        "st.global.u64",
        ("race",),
        WORDS,
    ),
    Mutation(
        "a word by a plain load",
        "resident_fma.cu",
        "words.cuh",
        "ld.relaxed.gpu.global.u64",
        "ld.global.u64",
        ("race",),
        WORDS,
    ),
    Mutation(
        "a word for the threads of a block alone",
        "resident_fma.cu",
        "words.cuh",
        "st.relaxed.gpu.global.u64",
        "st.relaxed.cta.global.u64",
        ("race",),
        WORDS,
    ),
    Mutation(
        "takes a word with any number but zero",
        "resident_fma.cu",
        "words.cuh",
        "!= source.number &&",
        "== 0 &&",
        ("numbers",),
        WORDS,
    ),
    Mutation(
        "the number does not grow",
        "resident_fma.cu",
        "resident_forward.cuh",
        "      ++number;\n",
        "",
        ("numbers", "assert"),
        WORDS,
    ),
    Mutation(
        "one buffer of words instead of two",
        "resident_fma.cu",
        "resident_forward.cuh",
        "s == kLast ? turn ^ 1 : turn, j",
        "turn, j",
        ("numbers", "assert"),
        WORDS,
    ),
    Mutation(
        "waits for words that nobody writes",
        "resident_fma.cu",
        "product_fma.cuh",
        "k + v < K ?",
        "k + v <= K ?",
        ("assert",),
        WORDS,
    ),
    Mutation(
        "hands on no words of sequences that enter",
        "resident_fma.cu",
        "resident_forward.cuh",
        "rows = next_n;",
        "rows = step.n;",
        ("assert",),
        WORDS,
    ),
    Mutation(
        "takes streamed weights before they have arrived",
        "streamed_fma.cu",
        "weight_stream.cuh",
        "    wait_for_copies<kSlots - 1>();\n",
        "",
        ("race", "uninitialised read"),
        STREAMED_FMA,
    ),
    Mutation(
        "waits for one copy too few",
        "streamed_mma.cu",
        "weight_stream.cuh",
        "wait_for_copies<kSlots - 1>()",
        "wait_for_copies<kSlots>()",
        ("race", "uninitialised read"),
        STREAMED_MMA,
    ),
    Mutation(
        "leaves out the last streamed weights",
        "streamed_fma.cu",
        "weight_stream.cuh",
        "item_ + 1 == items_",
        "item_ + 2 == items_",
        ("numbers",),
        STREAMED_FMA,
    ),
    Mutation(
        "streams to the place that was not taken",
        "streamed_mma.cu",
        "weight_stream.cuh",
        "    copy();\n    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;",
        "    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;\n    copy();",
        ("numbers", "race", "uninitialised read"),
        STREAMED_MMA,
    ),
    Mutation(
        "overwrites the sums of the group before",
        "streamed_mma.cu",
        "streamed_forward.cuh",
        "        __syncthreads();  // the next product overwrites the sums\n",
        "",
        ("race",),
        STREAMED_MMA,
    ),
    Mutation(
        "one buffer instead of two, streamed",
        "streamed_fma.cu",
        "streamed_forward.cuh",
        "s == kLast ? turn ^ 1 : turn;",
        "turn;",
        ("race",),
        STREAMED_FMA,
    ),
    Mutation(
        "puts h of sequences that enter later into one buffer",
        "streamed_fma.cu",
        "streamed_forward.cuh",
        "buffer < 2;",
        "buffer < 1;",
        ("numbers",),
        STREAMED_FMA,
    ),
    Mutation(
        "loses the gradient of sequences that have ended",
        "streamed_fma.cu",
        "streamed_backward.cuh",
        "            gradient(j, span.first + u) = d_emit;\n",
        "",
        ("numbers",),
        STREAMED_FMA,
    ),
    Mutation(
        "adds sums of warps before they are there",
        "around_loop.cu",
        "around_loop.cu",
        "  __syncthreads();\n\n  // From here on",
        "\n  // From here on",
        ("race", "uninitialised read"),
        FMA,
    ),
    Mutation(
        "adds a row beyond the last",
        "around_loop.cu",
        "around_loop.cu",
        "if (row + i * kWarps < end)",
        "if (row + i * kWarps <= end)",
        ("numbers", "out of bounds", "uninitialised read"),
        FMA,
    ),
    Mutation(
        "counts a block before all its threads have written",
        "around_loop.cu",
        "around_loop.cu",
        "  __shared__ bool last;\n  __syncthreads();\n",
        "  __shared__ bool last;\n",
        ("race", "weak memory"),
        SUMS,
    ),
    Mutation(
        "no fence before and after the block is counted",
        "around_loop.cu",
        "around_loop.cu",
        "atom.acq_rel.gpu",
        "atom.relaxed.gpu",
        ("weak memory",),
        SUMS,
    ),
    Mutation(
        "no fence before the block is counted",
        "around_loop.cu",
        "around_loop.cu",
        "atom.acq_rel.gpu",
        "atom.acquire.gpu",
        ("weak memory",),
        SUMS,
    ),
    Mutation(
        "no fence after the block is counted",
        "around_loop.cu",
        "around_loop.cu",
        "atom.acq_rel.gpu",
        "atom.release.gpu",
        ("weak memory",),
        SUMS,
    ),
    Mutation(
        "reads whether the block is the last before that is known",
        "around_loop.cu",
        "around_loop.cu",
        "    last = before == blocks - 1;\n  }\n  __syncthreads();\n",
        "    last = before == blocks - 1;\n  }\n",
        ("race", "uninitialised read"),
        SUMS,
    ),
    Mutation(
        "the last block but one adds the sums of ranges",
        "around_loop.cu",
        "around_loop.cu",
        "last = before == blocks - 1;",
        "last = before == blocks - 2;",
        ("race", "weak memory", "uninitialised read"),
        SUMS,
    ),
    Mutation(
        "a unit beyond the last",
        "step.cu",
        "step.cu",
        "i < n * width;",
        "i <= n * width;",
        ("race", "out of bounds", "read-only memory"),
        FMA,
    ),
]


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


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    assert judge(mutation, compiled(mutation, tmp_path)) in mutation.sign


@pytest.mark.parametrize(
    "mutation", list({m.kernels: m for m in MUTATIONS}.values()), ids=lambda m: m.kernels
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

"""The compiled kernels: their registers, shared memory, spills, and use of tensor cores."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import setup_build
from tests.kit import build

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

DTYPES = ["f32", "f64", "f16", "bf16"]
ARCHITECTURES = [75, 80, 90, 100, 120]
SOURCES = [path.stem for path in build.kernel_sources()]
WAYS = ("forward", "backward")
# Limits of the registers of a thread: the number that nvcc 13.0 uses and up to eight more, since
# registers are allocated in groups of eight. The resident kernels keep weights in registers, with
# one block of 256 threads on a multiprocessor, which has 65,536 registers. The kernels for tensor
# cores use all that a thread can have; for them the test that nothing spills is the limit. On sm_75
# they stop at once, and so do the kernels with clusters before sm_90.
#                   sm_75, 80, 90, 100, 120
BUDGETS = {
    "resident_fma": (232, 232, 248, 248, 248),
    "resident_mma": (16, 255, 255, 255, 255),
    "clustered_fma": (16, 16, 208, 208, 208),
    "clustered_mma": (16, 16, 255, 255, 255),
    "streamed_fma": (255, 255, 255, 255, 255),
    "streamed_mma": (16, 255, 255, 255, 255),
    # With 64 registers as many blocks run on a multiprocessor as with 56: four.
    "step": (64, 64, 64, 64, 64),
    # With 48 registers five blocks run on a multiprocessor, and each thread of them has several
    # loads of 16 bytes on the way.
    "sum_rows": (64, 48, 48, 48, 48),
    "round": (24, 16, 16, 16, 16),
    "write_numbers": (48, 32, 40, 40, 40),
    "drop_states": (32, 32, 32, 32, 32),
}
KERNELS = {
    **{f"step_{way}_{dtype}": "step" for way in WAYS for dtype in DTYPES},
    **{f"sum_rows_{dtype}": "sum_rows" for dtype in DTYPES},
    **{f"round_{dtype}": "round" for dtype in ("f16", "bf16")},
    "write_numbers": "write_numbers",
    "drop_states": "drop_states",
    **{
        f"{regime}_{way}_{cores}_{dtype}": f"{regime}_{cores}"
        for way in WAYS
        for regime, fma in (
            ("resident", ("f32", "f16", "bf16")),
            ("clustered", ("f32", "f16", "bf16")),
            ("streamed", tuple(DTYPES)),
        )
        for cores, dtypes in (("fma", fma), ("mma", ("tf32", "f16", "bf16")))
        for dtype in dtypes
    },
}


def ptx_of(source: str, arch: int) -> Path:
    """The PTX from which the kernels of a file are compiled for an architecture."""
    return next(path for path in ptx_for(arch) if path.stem == source)


def ptx_for(arch: int) -> list[Path]:
    return build.ptx_with_clusters(arch) if arch >= 90 else build.ptx(arch)


def kernels_of(source: str) -> set[str]:
    """The kernels of a file."""
    text = (build.CSRC / "cuda" / f"{source}.cu").read_text()
    return set(re.findall(r"FUSEDRNN_KERNEL\((\w+)\)", text))


def bodies(path: Path) -> dict[str, str]:
    """The text of each kernel in a file of PTX."""
    parts = path.read_text().split(".entry ")[1:]
    return {part.split("(")[0].strip(): part for part in parts}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_and_spills(arch: int, source: str) -> None:
    kernels = build.assembled(ptx_of(source, arch), arch)
    assert kernels.keys() == kernels_of(source)
    for name, kernel in kernels.items():
        budget = BUDGETS[KERNELS[name]][ARCHITECTURES.index(arch)]
        assert 0 < kernel.registers <= budget, (name, kernel)
        assert kernel.spills == 0, (name, kernel)
        assert kernel.stack == 0, (name, kernel)
        # Only sum_rows has static shared memory: the sums of 8 warps, in the compute type, for as
        # many columns as 512 bytes hold, and a bool. The plan counts the dynamic one.
        sums = 8 * 512 * (1 if name.endswith(("f32", "f64")) else 2) + 1
        assert kernel.shared == (sums if name.startswith("sum_rows") else 0), (name, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_grids_fit(arch: int) -> None:
    """All blocks of a resident launch fit on the card at once, with the kernels' real registers."""
    device = build.host().device(f"sm_{arch}")
    resident = 0
    for cores, dtype, way, H, N, D in itertools.product(
        ["fma", "mma"], ["f32", "f16", "bf16"], WAYS, [64, 512, 1024], [4, 32], [1, 2]
    ):
        name = f"resident_{way}_{cores}_{'tf32' if (cores, dtype) == ('mma', 'f32') else dtype}"
        kernel = build.assembled(ptx_of(f"resident_{cores}", arch), arch)[name]
        plan = build.host().plan(
            *("lstm", dtype, [150, N, H, H, H, D], f"sm_{arch}"),
            backward=way == "backward",
            allow_tf32=True,
            registers=kernel.registers,
        )
        if plan["regime"] == "per_step" or plan["cores"] != cores:
            continue
        resident += 1
        shared = kernel.shared + plan["shared_bytes"]
        assert shared <= device["shared_per_block"], (name, plan)
        together = build.host().blocks_per_sm(f"sm_{arch}", kernel.registers, shared)
        x, y, z = plan["grid"]
        assert x * y * z <= together * device["sms"], (name, plan)
    assert resident > (15 if arch == 75 else 40)


def test_tensor_cores_are_used_where_the_plan_says_so() -> None:
    instructions = {
        "mma_tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "mma_f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma_bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    }
    files = build.ptx_with_clusters()
    found = {name: body for path in files for name, body in bodies(path).items()}
    assert found.keys() == KERNELS.keys()
    for name, body in found.items():
        wanted = next((i for cores, i in instructions.items() if name.endswith(cores)), None)
        used = set(re.findall(r"mma\.sync\S*", body))
        assert used == ({wanted} if wanted and "mma" in name else set()), name


def test_instructions_between_blocks() -> None:
    """The barrier needs a release for arriving and an acquire for polling, and the counter of
    sum_rows an atomic that is both. The barrier of a cluster needs both too. There are no fences.
    """
    for path in build.ptx_with_clusters():
        for name, body in bodies(path).items():
            loops = name.startswith(("resident", "clustered", "streamed"))
            clusters = name.startswith("clustered")
            for way in ("arrive.release", "wait.acquire"):
                assert (f"barrier.cluster.{way}.aligned" in body) == clusters, name
            assert ("st.shared::cluster.f32" in body) == clusters, name
            assert ("red.release.gpu.global.add.u32" in body) == loops, name
            assert ("ld.acquire.gpu.global.u32" in body) == loops, name
            sums = name.startswith("sum_rows")
            assert ("atom.acq_rel.gpu.global.inc.u32" in body) == sums, name
            assert ("ld.global.v4" in body) >= sums, name
            assert not re.search(r"membar|fence\.", body), name


def test_it_compiles_for_the_oldest_gpu() -> None:
    """sm_75 has no tensor cores for bfloat16 and TF32, and no clusters: kernels that use them stop
    at once.
    """
    found = {name: body for path in build.ptx(75) for name, body in bodies(path).items()}
    assert found.keys() == KERNELS.keys()
    for name, body in found.items():
        assert "mma.sync" not in body
        assert ("trap" in body) == ("_mma_" in name or name.startswith("clustered")), name


SMALL = """
#ifdef __CUDA_ARCH__
constexpr int kSize = __CUDA_ARCH__;
#else
constexpr int kSize = 1;
#endif
extern "C" __global__ void small(float* p) {
  __shared__ float values[kSize];
  values[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = values[threadIdx.x ^ 1];
}
"""


def test_what_the_build_keeps_is_what_tests_would_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_KEEP", "1")
    monkeypatch.setenv("FUSEDRNN_CUDA_ARCH", "80;90")
    source, made = tmp_path / "sources" / "small.cu", tmp_path / "build"
    source.parent.mkdir()
    folder = setup_build.kept_folder(made, source)
    units = {source: [*build.nvcc_flags(), *setup_build.architecture_flags()]}

    def compile_it(text: str) -> str:
        source.write_text(text)
        setup_build.ninja_build(made, "small.so", units, [], ["-shared"])
        return capfd.readouterr().out

    assert "ptxas" not in compile_it(SMALL)
    for arch in (80, 90):
        ptx = tmp_path / f"small_{arch}.ptx"
        build.compile_kernel(source, ptx, f"-arch=compute_{arch}", "-ptx")
        kept = build.kept_ptx(folder, "small", arch)
        assert kept is not None
        assert kept.read_text() == ptx.read_text()
        flags = (f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v")
        alone = build.kernels_of(build.compile_kernel(ptx, Path("/dev/null"), *flags))
        assert build.kernels_of(build.kept_figures(folder, arch)) == alone
        assert alone["small"].shared == arch * 10 * 4
    assert build.kept_ptx(folder, "small", 75) is None
    assert build.kept_figures(folder, 75) == ""
    # Nothing is left of an earlier build, and the compiler's message is printed.
    with pytest.raises(setup_build.BuildError):
        compile_it(SMALL.replace("float* p", "float* q"))
    assert 'identifier "p" is undefined' in capfd.readouterr().out
    assert build.kept_ptx(folder, "small", 80) is None


def test_the_table_of_kernels_is_complete() -> None:
    listed = [kernels_of(source) for source in SOURCES]
    assert set().union(*listed) == KERNELS.keys()
    assert sum(map(len, listed)) == len(KERNELS) <= 60

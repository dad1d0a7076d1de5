"""The CUDA engine's plan of a layer: a pure function, here of random sizes and limits."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import setup_build
from fusedrnn._library import CELLS
from tests.kit import build

DTYPES = ["f32", "f64", "f16", "bf16"]
SIZE = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}
# Multiprocessors, and bytes of shared memory that a block may have.
CARDS = {
    "T4": (40, 65536),
    "A100": (108, 166912),
    "A100 80GB": (108, 166912),
    "RTX 3090": (82, 101376),
    "RTX 4090": (128, 101376),
    "L4": (58, 101376),
    "H100": (132, 232448),
    "H200": (132, 232448),
    "B200": (148, 232448),
    "RTX 5090": (170, 101376),
}
# The number of gates of each stage's product in the resident regime. No projection runs in it, so
# the second of two stages computes one gate.
STAGES = {
    cell: [spec.gates] if spec.stages == 1 else [spec.gates - 1, 1]
    for cell, spec in CELLS.items()
    if not spec.projects
}
THREADS, PAIRS = 256, 2 * 256
FMA_HELD, MMA_HELD = 16, 2


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def random_request(rng: np.random.Generator) -> dict[str, Any]:
    cell = list(CELLS)[rng.integers(len(CELLS))]
    H = int(2 ** rng.uniform(0, 12))
    sizes = {
        "T": int(2 ** rng.uniform(0, 14)),
        "N": int(2 ** rng.uniform(0, 11)),
        "I": int(2 ** rng.uniform(0, 12)),
        "H": H,
        "P": max(1, int(H * rng.uniform(0.1, 1))) if CELLS[cell].projects else H,
        "D": int(rng.integers(1, 3)),
    }
    return {
        "cell": cell,
        "dtype": DTYPES[rng.integers(len(DTYPES))],
        "arch": list(CARDS)[rng.integers(len(CARDS))],
        "sizes": list(sizes.values()),
        "backward": bool(rng.integers(2)),
        "allow_tf32": bool(rng.integers(2)),
        "registers": int(rng.integers(32, 256)),
    }


def assert_layout(request: dict[str, Any], plan: dict[str, Any]) -> None:
    """Asserts that the parts of shared memory are large enough and do not overlap."""
    H, value = request["sizes"][3], SIZE[request["dtype"]]
    units, rows, mma = plan["units"], plan["rows"], plan["cores"] == "mma"
    end = 0
    partials = staged = 0
    for s, (gates, tile) in enumerate(zip(STAGES[request["cell"]], plan["tiles"], strict=True)):
        R = units if request["backward"] else gates * units
        K = gates * H if request["backward"] else H
        assert tile["R"] == R
        assert tile["K_pad"] >= K
        assert tile["weights"] == end
        held = (MMA_HELD if mma else FMA_HELD) if s == 0 else 0
        in_shared = max(0, tile["steps"] - held)
        if mma:
            group, row_tiles = 64 // value, ceil_div(R, 16)
            assert row_tiles <= 4
            assert tile["slices"] == THREADS // 32
            assert tile["K_pad"] % group == 0
            assert tile["steps"] * tile["slices"] * group >= tile["K_pad"]
            assert tile["ld"] >= row_tiles * 16
            end += in_shared * tile["slices"] * row_tiles * 16 * 64
        else:
            assert tile["slices"] >= 1
            assert tile["slices"] * R <= THREADS
            assert tile["K_pad"] % 4 == 0
            assert tile["steps"] * tile["slices"] * 4 >= tile["K_pad"]
            assert tile["ld"] >= R
            end += in_shared * THREADS * 4 * value
            staged = max(staged, min(rows, 8) * tile["K_pad"] * 4)
        partials = max(partials, tile["slices"] * plan["rows_pad"] * tile["ld"] * 4)
    assert plan["rows_pad"] >= rows
    assert not mma or plan["rows_pad"] % 8 == 0
    assert plan["partials"] == end
    assert plan["staged"] % 16 == 0
    assert plan["staged"] >= plan["partials"] + partials
    assert plan["bias"] >= plan["staged"] + staged
    bias = 0 if request["backward"] else 2 * CELLS[request["cell"]].gates * units * 4
    assert plan["params"] >= plan["bias"] + bias
    weight_ch = [p for p in CELLS[request["cell"]].parameters if p.name == "weight_ch"]
    params = sum(p.shape(H=units)[0] for p in weight_ch) * 4
    assert plan["shared_bytes"] >= plan["params"] + params


@pytest.mark.parametrize("seed", range(20))
def test_fits_and_covers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    resident = 0
    for _ in range(500):
        request = random_request(rng)
        plan = build.host().plan(**request)
        _, N, _, H, _, D = request["sizes"]
        if plan["regime"] == "per_step":
            assert plan["why_per_step"]
            continue
        resident += 1
        device = build.host().device(request["arch"])
        assert not CELLS[request["cell"]].projects
        assert request["dtype"] != "f64"
        if plan["cores"] == "mma":
            assert device["capability"] >= 80
            assert N >= 8
            assert request["dtype"] != "f32" or request["allow_tf32"]
        # Every unit of every sequence belongs to one block.
        x, y, z = plan["grid"]
        assert (x - 1) * plan["units"] < H <= x * plan["units"]
        assert (y - 1) * plan["rows"] < N <= y * plan["rows"]
        assert z == D
        assert plan["units"] * plan["rows"] <= PAIRS
        # All blocks fit on the card at once.
        assert plan["shared_bytes"] <= device["shared_per_block"]
        together = build.host().blocks_per_sm(
            request["arch"], request["registers"], plan["shared_bytes"]
        )
        assert x * y * z <= together * device["sms"], (request, plan)
        assert_layout(request, plan)
    assert resident > 100


def test_estimates() -> None:
    limits = set()
    rng = np.random.default_rng(0)
    for _ in range(500):
        request = random_request(rng)
        plan = build.host().plan(**request)
        assert 0 < plan["step_us"] <= plan["total_us"] < 1e10
        limits.add(plan["limit"])
        assert plan["limit"] in plan["text"]
        assert request["cell"] in plan["text"]
    assert limits <= {"barrier", "launches", "L2", "memory", "cores", "shared memory"}
    assert len(limits) >= 4


def test_the_cards_are_those_of_the_table() -> None:
    assert build.host().cards() == list(CARDS)
    for name, (sms, shared) in CARDS.items():
        device = build.host().device(name)
        assert (device["sms"], device["shared_per_block"]) == (sms, shared), name


@pytest.mark.parametrize(
    ("arch", "card"),
    {
        "sm_75": "T4",
        "sm_80": "A100",
        "sm_86": "RTX 3090",
        "sm_89": "RTX 4090",
        "sm_90": "H100",
        "sm_100": "B200",
        "sm_120": "RTX 5090",
    }.items(),
)
def test_an_architecture_is_its_first_card(arch: str, card: str) -> None:
    sizes = [10, 4, 32, 32, 32, 1]
    assert build.host().plan("lstm", "f32", sizes, arch) == build.host().plan(
        "lstm", "f32", sizes, card
    )
    assert f" on {card} ({arch}): " in build.host().plan("lstm", "f32", sizes, arch)["text"]


@pytest.mark.parametrize("card", CARDS)
def test_no_plan_asks_for_more_than_the_card_has(card: str) -> None:
    """The test counts from the figures of the card, and does not use the plan's count of blocks."""
    sms, shared_per_block = CARDS[card]
    device = build.host().device(card)
    seen = set()
    for cell, dtype, H, N, D, backward, tf32, registers in itertools.product(
        list(STAGES),
        DTYPES,
        [64, 100, 256, 512, 1000, 1024, 1536, 2048],
        [1, 3, 8, 32, 100, 128],
        [1, 2],
        [False, True],
        [False, True],
        [128, 255],
    ):
        plan = build.host().plan(
            *(cell, dtype, [50, N, H, H, H, D], card),
            backward=backward,
            allow_tf32=tf32,
            registers=registers,
        )
        if plan["regime"] == "per_step":
            seen.add("per step")
            continue
        seen.add(plan["cores"])
        assert dtype != "f64"
        assert plan["cores"] == "fma" or card != "T4"
        blocks, together = int(np.prod(plan["grid"])), plan["blocks_per_sm"]
        assert blocks <= sms * together, plan
        assert 0 < plan["shared_bytes"] <= shared_per_block, plan
        of_block = plan["shared_bytes"] + device["shared_reserved"]
        assert together * of_block <= device["shared_per_sm"], plan
        assert together * THREADS <= device["threads_per_sm"], plan
        # A warp gets registers in groups of 256, 8 for each thread.
        assert together * THREADS * ceil_div(registers, 8) * 8 <= 65536, plan
    assert seen == {"per step", "fma"} | ({"mma"} if card != "T4" else set())


def test_peaks_equal_those_of_the_vendor() -> None:
    """TFLOPS of products in float32, 16 bits, TF32 and float64. estimate.h names the sources."""
    published = {
        "T4": (8.1, 65, 0, 8.1 / 32),
        "A100": (19.5, 312, 156, 19.5),
        "A100 80GB": (19.5, 312, 156, 19.5),
        "RTX 3090": (35.6, 71, 35.6, 35.6 / 64),
        "RTX 4090": (82.6, 165.2, 82.6, 82.6 / 64),
        "L4": (30.3, 121, 60, 30.3 / 64),
        "H100": (66.9, 989.4, 494.7, 66.9),
        "H200": (66.9, 989.4, 494.7, 66.9),
        "B200": (75, 2250, 1125, 37),
        "RTX 5090": (104.8, 209.5, 104.8, 104.8 / 64),
    }
    assert published.keys() == CARDS.keys()
    for card, tflops in published.items():
        # For some figures the vendor assumes a clock up to 8 % faster than ours.
        np.testing.assert_allclose(build.host().peaks(card), tflops, rtol=0.08, err_msg=card)


def test_bandwidths_of_the_memory() -> None:
    """A bandwidth is the width of the bus in bits times Gbit/s of a pin."""
    memory = {
        "T4": (256, 10),
        "A100": (5120, 2.43),
        "A100 80GB": (5120, 3.186),
        "RTX 3090": (384, 19.5),
        "RTX 4090": (384, 21),
        "L4": (192, 12.5),
        "H100": (5120, 5.238),
        "H200": (6144, 6.25),
        "B200": (7680, 7.992),
        "RTX 5090": (512, 28),
    }
    assert memory.keys() == CARDS.keys()
    for card, (bits, rate) in memory.items():
        assert build.host().bandwidth(card) == pytest.approx(bits / 8 * rate, rel=0.01), card


@pytest.mark.parametrize("cell", CELLS)
def test_a_regime_may_be_asked_for(cell: str) -> None:
    sizes = [10, 4, 32, 32, 16 if CELLS[cell].projects else 32, 1]
    plan = build.host().plan(cell, "f32", sizes, "sm_80", regime="per_step")
    assert plan["regime"] == "per_step"
    assert plan["why_per_step"] == "asked for"
    plan = build.host().plan(cell, "f32", sizes, "sm_80", regime="resident")
    assert plan["regime"] == ("per_step" if CELLS[cell].projects else "resident")


def test_known_sizes() -> None:
    def plan(dtype: str, N: int, H: int, arch: str, **options: Any) -> dict[str, Any]:
        return build.host().plan("lstm", dtype, [150, N, H, H, H, 1], arch, **options)

    h100 = plan("bf16", 32, 1024, "sm_90")
    assert (h100["regime"], h100["cores"]) == ("resident", "mma")
    assert plan("f32", 32, 512, "sm_90")["cores"] == "fma"
    assert plan("f32", 32, 512, "sm_90", allow_tf32=True)["cores"] == "mma"
    assert plan("bf16", 1, 1024, "sm_90")["cores"] == "fma"
    assert plan("bf16", 32, 512, "sm_75")["cores"] == "fma"
    assert plan("f32", 32, 4096, "sm_90")["why_per_step"].startswith("the recurrent weights do")


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_names_what_does_not_fit(seed: int) -> None:
    """If sequences are named, fewer of them fit. If weights are named, not even one does."""
    rng = np.random.default_rng(seed)
    blamed = {"sequences": 0, "weights": 0}
    while min(blamed.values()) < 20:
        request = random_request(rng)
        T, N, I, H, P, D = request.pop("sizes")
        plan = build.host().plan(sizes=[T, N, I, H, P, D], **request)
        why = plan["why_per_step"]
        if "do not fit" not in why:
            continue
        # Tensor cores need at least 8 sequences.
        regimes = [
            build.host().plan(sizes=[T, n, I, H, P, D], **request)["regime"] for n in (1, min(N, 8))
        ]
        if why.startswith(f"{N} sequences do not fit"):
            blamed["sequences"] += 1
            assert "resident" in regimes
        else:
            blamed["weights"] += 1
            assert why.startswith("the recurrent weights do not fit")
            assert "resident" not in regimes


def test_facts_that_the_plan_assumes_can_be_read() -> None:
    """They have the same keys as the facts that the driver gives, so programs can compare them."""
    for card in (*CARDS, "sm_90"):
        device = build.host().device(card)
        lines = torch.ops.fusedrnn._plan_device(card).splitlines()
        assert {key: int(value) for key, value in map(str.split, lines)} == device
        for registers, shared in [
            (32, 0),
            (200, 0),
            (255, 60000),
            (40, device["shared_per_block"]),
        ]:
            assert torch.ops.fusedrnn._plan_blocks_per_sm(
                card, registers, shared
            ) == build.host().blocks_per_sm(card, registers, shared)
    for call, message in [
        (lambda: torch.ops.fusedrnn._plan_device("sm_70"), r"arch must be one of T4 \(sm_75\), "),
        (
            lambda: torch.ops.fusedrnn._plan_blocks_per_sm("x", 1, 0),
            r"arch must be one of T4 \(sm_75\), ",
        ),
        (lambda: torch.ops.fusedrnn._plan_blocks_per_sm("sm_80", 0, 0), "from 1 to 255, got 0"),
        (lambda: torch.ops.fusedrnn._plan_blocks_per_sm("sm_80", 9, -1), "negative, got -1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of T4 \(sm_75\), .*, got 'sm_70'"):
        build.host().plan("lstm", "f32", [1] * 6, "sm_70")
    with pytest.raises(ValueError, match="regime must be resident or per_step, got 'fast'"):
        build.host().plan("lstm", "f32", [1] * 6, "sm_80", regime="fast")


@pytest.mark.skipif(setup_build.nvcc() is None, reason="no nvcc: no cuda_occupancy.h")
def test_occupancy_is_at_most_that_of_nvidia(tmp_path: Path) -> None:
    """The number of blocks on a multiprocessor is compared with NVIDIA's header."""
    program = tmp_path / "occupancy"
    compiler = setup_build.nvcc()
    assert compiler is not None
    includes, _ = setup_build.cuda_folders(compiler)
    source = build.KIT / "cuda" / "occupancy.cpp"
    command = [*setup_build.compiler(), "-std=c++20", *includes, str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    rng = np.random.default_rng(0)
    for card in CARDS:
        d = build.host().device(card)
        registers = [*range(16, 256), *(255,) * 200]
        shared = [int(rng.integers(0, d["shared_per_block"] + 1)) for _ in registers]
        shared[:3] = [0, d["shared_per_block"], d["shared_per_block"] // 2]
        major, minor = divmod(d["capability"], 10)
        sizes = [d[k] for k in ("threads_per_sm", "shared_per_block", "shared_per_sm")]
        done = subprocess.run(
            [program, *map(str, (major, minor, *sizes, d["shared_reserved"]))],
            input="\n".join(f"{r} {THREADS} {s}" for r, s in zip(registers, shared, strict=True)),
            capture_output=True,
            text=True,
            check=True,
        )
        wanted = [int(line) for line in done.stdout.split()]
        ours = [
            build.host().blocks_per_sm(card, r, s) for r, s in zip(registers, shared, strict=True)
        ]
        # NVIDIA's finer rules may allow more blocks than ours, and never fewer.
        assert len(wanted) == len(ours)
        assert all(mine <= theirs for mine, theirs in zip(ours, wanted, strict=True)), card
        exact = sum(mine == theirs for mine, theirs in itertools.zip_longest(ours, wanted))
        assert exact > 0.95 * len(ours), card

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
from tests.kit.plans import CARDS, DTYPES, random_request

SIZE = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}
# The number of gates of each stage's product. The second of two stages computes one gate, or the
# projection.
STAGES = {
    cell: [spec.gates]
    if spec.stages == 1
    else [spec.gates, 1]
    if spec.projects
    else [spec.gates - 1, 1]
    for cell, spec in CELLS.items()
}
THREADS, PAIRS = 256, 2 * 256
# How many iterations of the first stage have their weights in registers.
HELD = {
    ("resident", "fma"): 16,
    ("resident", "mma"): 2,
    ("streamed", "fma"): 16,
    ("streamed", "mma"): 1,
}
RING = 128 * THREADS  # bytes of a stage's ring


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def products(request: dict[str, Any], plan: dict[str, Any]) -> list[tuple[int, int]]:
    """The weight rows and K of the product of each stage."""
    _, _, _, H, P, _ = request["sizes"]
    units, proj_units = plan["units"], plan["proj_units"]
    projects = CELLS[request["cell"]].projects
    pairs = []
    for s, gates in enumerate(STAGES[request["cell"]]):
        last = projects and s == 1
        source, of_source = (P, proj_units) if s == 0 else (H, units)
        emitted, of_emit = (P, proj_units) if last else (gates * H, gates * units)
        pairs.append((of_source, emitted) if request["backward"] else (of_emit, source))
    return pairs


def assert_layout(request: dict[str, Any], plan: dict[str, Any]) -> None:
    """Asserts that the parts of shared memory are large enough and do not overlap."""
    value = SIZE[request["dtype"]]
    real = max(value, 4)
    units, mma = plan["units"], plan["cores"] == "mma"
    parts = []  # begin and size of each part of shared memory
    partials = staged = streamed = 0
    for s, ((R, K), tile) in enumerate(zip(products(request, plan), plan["tiles"], strict=True)):
        assert tile["R"] == R
        assert tile["K_pad"] >= K
        held = HELD[plan["regime"], plan["cores"]] if s == 0 else 0
        held = 4 if held and request["dtype"] == "f64" else held
        in_shared = max(0, tile["on_chip"] - held)
        left = tile["steps"] - tile["on_chip"]
        assert left >= 0
        if mma:
            group, row_tiles = 64 // value, ceil_div(R, 16)
            assert row_tiles <= 4
            assert tile["slices"] == THREADS // 32
            assert tile["K_pad"] % group == 0
            assert tile["steps"] * tile["slices"] * group >= tile["K_pad"]
            assert tile["ld"] >= row_tiles * 16
            iteration = tile["slices"] * row_tiles * 16 * 64
        else:
            assert tile["slices"] >= 1
            assert tile["slices"] * R <= THREADS
            assert tile["K_pad"] % 4 == 0
            assert tile["steps"] * tile["slices"] * 4 >= tile["K_pad"]
            assert tile["ld"] >= R
            iteration = THREADS * 4 * value
            staged = max(staged, min(plan["group"], 8) * tile["K_pad"] * real)
        parts.append((tile["weights"], in_shared * iteration))
        if left:
            assert plan["regime"] == "streamed"
            assert tile["on_chip"] >= min(held, tile["steps"])
            parts.append((tile["ring"], RING))
            assert 0 <= tile["streamed"] <= plan["streamed_bytes"] - left * iteration
        streamed += left * iteration
        partials = max(partials, tile["slices"] * plan["partial_rows"] * tile["ld"] * real)
    assert plan["streamed_bytes"] == streamed
    assert plan["rows_pad"] >= plan["rows"]
    assert plan["partial_rows"] >= plan["group"]
    assert not mma or plan["rows_pad"] % 8 == plan["partial_rows"] % 8 == 0
    parts += [(plan["partials"], partials), (plan["staged"], staged)]
    if plan["regime"] == "resident":
        cell = CELLS[request["cell"]]
        bias = 0 if request["backward"] else 2 * cell.gates * units * 4
        weight_ch = [p for p in cell.parameters if p.name == "weight_ch"]
        params = sum(p.shape(H=units)[0] for p in weight_ch) * 4
        parts += [(plan["bias"], bias), (plan["params"], params)]
        assert plan["params"] == plan["bias"] + bias  # the kernel relies on this
    assert all(begin % 16 == 0 for begin, size in parts[:-2] if size)
    parts = sorted(part for part in parts if part[1])
    for (begin, size), (after, _) in itertools.pairwise(parts):
        assert begin + size <= after
    assert sum(parts[-1]) <= plan["shared_bytes"]


@pytest.mark.parametrize("regime", ["", "streamed"])
@pytest.mark.parametrize("seed", range(10))
def test_fits_and_covers(seed: int, regime: str) -> None:
    rng = np.random.default_rng(seed)
    seen = {"resident": 0, "streamed": 0, "per_step": 0}
    for _ in range(500):
        request = random_request(rng)
        plan = build.host().plan(regime=regime, **request)
        _, N, _, H, P, D = request["sizes"]
        seen[plan["regime"]] += 1
        if plan["regime"] == "per_step":
            assert plan["why_per_step"]
            continue
        device = build.host().device(request["arch"])
        if plan["regime"] == "resident":
            assert not CELLS[request["cell"]].projects
            assert request["dtype"] != "f64"
        if plan["cores"] == "mma":
            assert device["capability"] >= 80
            assert N >= 8
            assert request["dtype"] not in ("f64", *(() if request["allow_tf32"] else ("f32",)))
        # Every unit of every sequence belongs to one block, and so does every output of a
        # projection. Some blocks may have units and no outputs.
        x, y, z = plan["grid"]
        assert (x - 1) * plan["units"] < H <= x * plan["units"]
        assert x * plan["proj_units"] >= P and plan["proj_units"] <= plan["units"]
        assert (y - 1) * plan["rows"] < N <= y * plan["rows"]
        assert z == D
        assert plan["units"] * plan["group"] <= PAIRS
        assert plan["group"] <= plan["rows"]
        # All blocks fit on the card at once.
        assert plan["shared_bytes"] <= device["shared_per_block"]
        together = 1
        if plan["regime"] == "resident":
            assert plan["group"] == plan["rows"]
            together = build.host().blocks_per_sm(
                request["arch"], request["registers"], plan["shared_bytes"]
            )
        assert x * y * z <= together * device["sms"], (request, plan)
        assert_layout(request, plan)
    assert seen["streamed"] > 30
    assert seen["resident"] > 100 or regime
    assert not (regime and seen["resident"])


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
            *(cell, dtype, [50, N, H, H, H // 2 if CELLS[cell].projects else H, D], card),
            backward=backward,
            allow_tf32=tf32,
            registers=registers,
        )
        seen.add(plan["regime"])
        if plan["regime"] == "per_step":
            continue
        seen.add(plan["cores"])
        assert plan["cores"] == "fma" or card != "T4"
        blocks, together = int(np.prod(plan["grid"])), plan["blocks_per_sm"]
        assert blocks <= sms * together, plan
        assert 0 < plan["shared_bytes"] <= shared_per_block, plan
        of_block = plan["shared_bytes"] + device["shared_reserved"]
        assert together * of_block <= device["shared_per_sm"], plan
        assert together * THREADS <= device["threads_per_sm"], plan
        # A warp gets registers in groups of 256, 8 for each thread.
        assert together * THREADS * ceil_div(registers, 8) * 8 <= 65536, plan
    mma = {"mma"} if card != "T4" else set()
    assert seen == {"per_step", "streamed", "resident", "fma"} | mma


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
    assert build.host().plan(cell, "f32", sizes, "sm_80", regime="streamed")["regime"] == "streamed"
    wanted = "streamed" if CELLS[cell].projects else "resident"
    assert build.host().plan(cell, "f32", sizes, "sm_80")["regime"] == wanted
    assert build.host().plan(cell, "f64", sizes, "sm_80")["regime"] == "streamed"


def test_parts_of_a_plan_may_be_chosen() -> None:
    def plan(choice: str, regime: str = "", N: int = 32) -> dict[str, Any]:
        sizes = [50, N, 512, 512, 512, 1]
        return build.host().plan("lstm", "bf16", sizes, "sm_90", regime=regime, choice=choice)

    for regime in ("", "resident", "streamed"):
        chosen = plan("units=8,rows=16", regime)
        assert (chosen["regime"], chosen["units"], chosen["rows"]) == (regime or "resident", 8, 16)
        assert chosen["grid"] == (64, 2, 1)
    assert plan("cores=fma")["cores"] == "fma"
    assert plan("rows=4", "streamed")["grid"][1] == 8
    # The message lists what fits, and each of these choices fits.
    for regime in ("resident", "streamed"):
        refused = plan("units=1,rows=32", regime)
        assert refused["regime"] == "per_step"
        why = refused["why_per_step"]
        assert why.startswith("units=1,rows=32 does not fit, what fits is rows=32 with units=4 to ")
        for part in why.split("what fits is ")[1].split("; "):
            rows, units = (words.split("=")[1] for words in part.split(" with "))
            for number in units.split(" to "):
                assert plan(f"rows={rows},units={number}", regime)["regime"] == regime
    assert plan("units=8", "per_step")["why_per_step"] == "the per-step regime has no units=8"
    assert plan("cores=mma", N=2)["why_per_step"] == "cores=mma does not fit, no choice fits"
    for regime in ("", "resident", "streamed", "per_step"):
        line = plan("units=1,rows=32", regime)["text"].splitlines()[1]
        assert line.startswith(f"{regime or 'the chosen plan'}: cannot run, ")


def test_the_largest_sizes() -> None:
    """A kernel counts sequences and steps in an int. A message about them takes no long time."""
    most = 2**31 - 1

    def plan(N: int, choice: str = "", T: int = 1) -> dict[str, Any]:
        how: dict[str, Any] = {"regime": "streamed", "choice": choice}
        return build.host().plan("rnn_tanh", "bf16", [T, N, 8, 8, 8, 1], "sm_90", **how)

    rows = plan(most)["rows"]
    assert (plan(most)["regime"], rows) == ("streamed", plan(most)["rows_pad"])
    refused = plan(most, f"rows={most}")["why_per_step"]
    assert f"rows={most} does not fit, what fits is rows={2**30} with units=1 to 8; " in refused
    longest = build.host().plan("rnn_tanh", "f32", [most, 1, 1, 1, 1, 1], "sm_90", backward=True)
    assert longest["regime"] == "per_step"


@pytest.mark.parametrize("regime", ["resident", "streamed"])
def test_chosen_units_of_uneven_blocks(regime: str) -> None:
    sizes = [9, 4, 8, 20, 20, 1]
    chosen = build.host().plan("lstm", "f32", sizes, "sm_90", regime=regime, choice="units=15")
    assert (chosen["units"], chosen["grid"]) == (15, (2, 1, 1))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("unit=8", "choice must be some of cores=, units=, rows=, ex.* between, got 'unit=8'"),
        ("units=8;rows=2", "choice must be units= and a whole number from 1 on, got 'units=8;rows"),
        ("units=8,rows=0", "choice must be rows= and a whole number from 1 on, got 'rows=0'"),
        ("rows", "choice must be rows= and a whole number from 1 on, got 'rows'"),
        ("units=8,", "choice must be without a comma at the end, got 'units=8,'"),
        ("units=8,units=4", "choice must be one value for each key, got 'units=8,units=4'"),
        ("exchange=mail", "choice must be exchange=words or exchange=barrier, got 'exchange=mail'"),
        ("cores=tensor", "choice must be cores=mma or cores=fma, got 'cores=tensor'"),
        ("cluster=3", "choice must be cluster=1, 2, 4 or 8, got 'cluster=3'"),
        ("cluster=16", "choice must be cluster=1, 2, 4 or 8, got 'cluster=16'"),
        ("cluster=2,cluster=2", "choice must be one value for each key, got 'cluster=2,cluster=2'"),
        ("arrive=warps", "choice must be arrive=clusters or arrive=blocks, got 'arrive=warps'"),
        ("arrive=clusters", "choice must be arrive=clusters only with cluster=2, 4 or 8, got 'arr"),
    ],
)
def test_choices_that_are_wrong(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build.host().plan("lstm", "bf16", [9, 9, 9, 9, 9, 1], "sm_90", choice=choice)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedrnn._plan("lstm", "bf16", [9] * 5 + [1], "sm_90", False, False, "", choice)


def test_a_block_needs_the_fewest_clocks() -> None:
    """Sequences are cut where that saves reading the source more often than weights cost."""
    wide = build.host().plan("lstm", "bf16", [50, 128, 512, 512, 512, 1], "sm_90")
    assert (wide["units"], wide["rows"]) == (16, 32)


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
    for N, dtype, cores in ((1, "bf16", "fma"), (32, "bf16", "mma"), (1, "f32", "fma")):
        large = plan(dtype, N, 2048, "sm_90")
        assert (large["regime"], large["cores"]) == ("streamed", cores)
        assert large["streamed_bytes"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_names_what_does_not_fit(seed: int) -> None:
    """If sequences are named, fewer of them fit. If weights are named, not even one does."""
    rng = np.random.default_rng(seed)
    blamed = {"sequences": 0, "weights": 0}
    while min(blamed.values()) < 20:
        request = random_request(rng)
        T, N, I, H, P, D = request.pop("sizes")
        plan = build.host().plan(sizes=[T, N, I, H, P, D], regime="resident", **request)
        why = plan["why_per_step"]
        if "do not fit" not in why:
            continue
        # Tensor cores need at least 8 sequences.
        regimes = [
            build.host().plan(sizes=[T, n, I, H, P, D], regime="resident", **request)["regime"]
            for n in (1, min(N, 8))
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
    with pytest.raises(ValueError, match="regime must be resident, streamed or per_step, got"):
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

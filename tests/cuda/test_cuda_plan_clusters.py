"""Plans whose blocks are in clusters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.kit import build


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cluster", [2, 4, 8])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_the_grid(cell: str, cluster: int, backward: bool) -> None:
    """They fill the grid, run together, and need as much room for weights as blocks alone."""
    fit = 0
    for dtype, N, H, D in itertools.product(
        ["f32", "bf16"], [1, 3, 8, 33], [1, 5, 100, 512, 1024], [1, 2]
    ):
        how: dict[str, Any] = {"backward": backward, "regime": "resident"}
        sizes = [9, N, 8, H, H, D]
        p = build.host().plan(cell, dtype, sizes, "H100", choice=f"cluster={cluster}", **how)
        if p["regime"] == "per_step":
            assert "does not fit" in p["why_per_step"]
            continue
        fit += 1
        x, y, z = p["grid"]
        assert (p["cluster"], x % cluster, z) == (cluster, 0, D)
        assert x * y * z <= (132 if cluster == 2 else 128) and p["blocks_per_sm"] == 1
        assert (x - cluster) * p["units"] < H <= x * p["units"]
        gates = {"lstm": [4], "gru": [3], "gru_reset_before": [2, 1], "rnn_tanh": [1]}[cell]
        for tile, of_stage in zip(p["tiles"], gates, strict=True):
            K = of_stage * H if backward else H
            assert tile["R"] == cluster * p["units"] * (1 if backward else of_stage)
            assert K <= tile["K_pad"] == cluster * tile["K_part"] < K + cluster * 32
    assert fit > 45
    assert build.host().plan("lstm", "f32", [9, 8, 8, 512, 512, 1], "H100")["cluster"] == 1


def test_clusters_cut_what_a_block_reads() -> None:
    sizes = [512, 32, 1024, 1024, 1024, 1]
    how: dict[str, Any] = {"backward": True, "regime": "resident"}
    alone = build.host().plan("lstm", "bf16", sizes, "H100", **how)
    four = build.host().plan("lstm", "bf16", sizes, "H100", choice="cluster=4", **how)
    as_one = "cluster=4,arrive=clusters"
    as_one_text = build.host().plan("lstm", "bf16", sizes, "H100", choice=as_one, **how)["text"]
    assert (alone["limit"], four["limit"]) == ("L2", "barrier")
    assert four["step_us"] < 0.6 * alone["step_us"]
    assert "; clusters of 4 blocks share the source; " in four["text"]
    assert "; clusters of 4 blocks share the source and arrive as one; " in as_one_text


def test_devices_without_clusters() -> None:
    sizes = [9, 8, 8, 64, 64, 1]
    for arch in ("sm_75", "sm_80", "sm_89"):
        refused = build.host().plan("lstm", "bf16", sizes, arch, choice="cluster=2")
        assert refused["why_per_step"].startswith("this device has no clusters")
    assert build.host().plan("lstm", "bf16", sizes, "sm_80", choice="cluster=1")["cluster"] == 1

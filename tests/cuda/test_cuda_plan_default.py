"""The regime that the plan takes if none is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kit import build
from tests.kit.plans import random_request

# The constants of csrc/cuda/plan.h.
MOST_CLOCKS, GAIN, QUICK = 18000, 1.25, 1800


def lstm(dtype: str, N: int, H: int, card: str = "H100", **how: Any) -> dict[str, Any]:
    return build.host().plan("lstm", dtype, [100, N, H, H, H, 1], card, **how)


def test_streamed_where_that_needs_clearly_fewer_clocks() -> None:
    how = {"backward": True}
    default = lstm("f32", 32, 1024, **how)
    resident = lstm("f32", 32, 1024, regime="resident", **how)
    assert (default["regime"], resident["regime"]) == ("streamed", "resident")
    assert default["clocks"] * GAIN < resident["clocks"]
    assert default == lstm("f32", 32, 1024, regime="streamed", **how)
    # Forward needs about as many clocks either way.
    assert lstm("f32", 32, 1024)["regime"] == "resident"


def test_per_step_where_resident_is_slow_and_streamed_too() -> None:
    how: dict[str, Any] = {"backward": True}
    sizes = [1610, 27, 321, 1668, 1668, 1]
    default = build.host().plan("lstm", "f16", sizes, "H100", **how)
    resident = build.host().plan("lstm", "f16", sizes, "H100", regime="resident", **how)
    streamed = build.host().plan("lstm", "f16", sizes, "H100", regime="streamed", **how)
    assert (resident["regime"], streamed["regime"]) == ("resident", "streamed")
    assert min(resident["clocks"], streamed["clocks"]) > MOST_CLOCKS
    assert default["regime"] == "per_step"
    assert default["why_per_step"] == (
        f"resident a step would take {resident['clocks']:.0f} clocks, and streamed it would be "
        "slow too"
    )
    # A choice runs although it is slow.
    chosen = build.host().plan("lstm", "f16", sizes, "H100", choice="cores=mma", **how)
    assert chosen["regime"] == "resident"
    assert chosen["clocks"] > MOST_CLOCKS


@pytest.mark.parametrize("seed", range(4))
def test_the_default_is_the_better_of_both(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = dict.fromkeys(("resident", "streamed", "streamed before resident", "per_step"), 0)
    for _ in range(600):
        request = random_request(rng)
        default = build.host().plan(**request)
        both = {}
        for regime in ("resident", "streamed"):
            plan = build.host().plan(regime=regime, **request)
            if plan["regime"] == regime and plan["clocks"] <= MOST_CLOCKS:
                both[regime] = plan
        resident, streamed = both.get("resident"), both.get("streamed")
        if resident and streamed and resident["clocks"] > QUICK:
            fewer = streamed["clocks"] * GAIN < resident["clocks"]
            wanted = "streamed" if fewer else "resident"
            seen["streamed before resident"] += fewer
        else:
            wanted = "resident" if resident else "streamed" if streamed else "per_step"
        assert default["regime"] == wanted, request
        assert wanted == "per_step" or default == both[wanted]
        seen[wanted] += 1
    assert min(seen.values()) >= 1, seen

"""A quick look with pytest-benchmark: `pytest benchmarks --benchmark-only -k core`.

A group has a line for our layer and one for torch.nn's. Parity is checked before either is timed.
The runner (`python -m benchmarks run`) times them alternately instead, and keeps more figures.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from . import cases
from .shapes import CELLS, Row, select


def _parameters(name: str) -> list[Any]:
    return [
        pytest.param(row, mode, side, id=_id(row, mode, side))
        for row in select(name, CELLS)
        for mode in row.modes
        for side in ("ours", "torch")
    ]


def _id(row: Row, mode: str, side: str) -> str:
    """Makes a name without the characters that -k cannot read: rnn-100x16x128x128-forward-ours."""
    return f"{row.name} {mode} {side}".replace(",", "x").replace(" ", "-")


@cache
def _parity(row: Row, mode: str) -> cases.Parity:
    return cases.check(cases.build(row), mode)


def _time(benchmark: Any, row: Row, mode: str, side: str) -> None:
    parity = _parity(row, mode)
    assert parity.right, parity
    case = cases.build(row)
    layer = getattr(case, side)
    benchmark.group = f"{row.name} {mode}"
    with cases.mode_of(layer, mode):
        benchmark(cases.step(layer, case.x, case.d_y, mode))


@pytest.mark.parametrize(("row", "mode", "side"), _parameters("core"))
def test_core(benchmark: Any, row: Row, mode: str, side: str) -> None:
    """Times the rows of core."""
    _time(benchmark, row, mode, side)


@pytest.mark.parametrize(("row", "mode", "side"), _parameters("packed"))
def test_packed(benchmark: Any, row: Row, mode: str, side: str) -> None:
    """Times the rows of packed: packed sequences, projection, float64."""
    _time(benchmark, row, mode, side)


@pytest.mark.parametrize(("row", "mode", "side"), _parameters("bf16"))
def test_bf16(benchmark: Any, row: Row, mode: str, side: str) -> None:
    """Times the rows of core in bfloat16."""
    _time(benchmark, row, mode, side)


@pytest.mark.parametrize(("row", "mode", "side"), _parameters("overhead"))
def test_overhead(benchmark: Any, row: Row, mode: str, side: str) -> None:
    """Times one call of a layer and one of a cell module."""
    _time(benchmark, row, mode, side)

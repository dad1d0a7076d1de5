"""The plan follows the nearest measurement of a table, unless a regime or a choice is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit import build
from tools.gpu.table import HEAD

H100 = "NVIDIA H100 80GB HBM3"
SIZES = [100, 32, 512, 512, 512, 1]
Measured = tuple[str, str, str, str, bool, bool, tuple[int, ...], str, str]


def measured(
    regime: str,
    choice: str = "",
    *,
    N: int = 32,
    H: int = 512,
    P: int = 0,
    D: int = 1,
    card: str = H100,
    cell: str = "lstm",
    dtype: str = "bf16",
    tf32: bool = False,
    backward: bool = False,
) -> Measured:
    sizes = (D, N, H, P or H)
    return (card, "2026-12-01", cell, dtype, tf32, backward, sizes, regime, choice)


def plan(*table: Measured, N: int = 32, H: int = 512, P: int = 0, **how: Any) -> dict[str, Any]:
    options = {"cell": "lstm", "dtype": "bf16", "arch": "H100"} | how
    return build.host().plan(sizes=[100, N, H, H, P or H, 1], measured=list(table), **options)


def test_a_measurement_goes_before_the_rough_clocks() -> None:
    assert plan()["measured"] == ""
    followed = plan(measured("streamed", "cores=fma,units=8,rows=16"))
    assert (followed["regime"], followed["cores"]) == ("streamed", "fma")
    assert (followed["units"], followed["rows"]) == (8, 16)
    assert followed["measured"] == f"{H100}, 2026-12-01"
    words = followed["text"].splitlines()[1]
    assert words.startswith("streamed, FMA: 64 x 2 x 1 blocks ")
    assert words.endswith(f" bytes; as measured on {H100}, 2026-12-01")
    asked = plan(regime="streamed", choice="cores=fma,units=8,rows=16")
    assert words == f"{asked['text'].splitlines()[1]}; as measured on {H100}, 2026-12-01"
    slow = plan(measured("per_step"))
    assert (slow["regime"], slow["measured"]) == ("per_step", f"{H100}, 2026-12-01")
    assert slow["why_per_step"] == f"as measured on {H100}, 2026-12-01"
    assert slow["text"].splitlines()[1].endswith(f" a stage (as measured on {H100}, 2026-12-01)")


def test_what_was_asked_for_goes_before_a_measurement() -> None:
    table = measured("streamed", "rows=16")
    for how in ({"regime": "resident"}, {"regime": "streamed"}, {"choice": "units=8"}):
        assert plan(table, **how) == plan(**how)
        assert plan(table, **how)["measured"] == ""


def test_the_nearest_measurement_counts() -> None:
    table = [
        measured("streamed", "rows=8", N=32, H=400),
        measured("streamed", "rows=16", N=32, H=600),
        measured("streamed", "rows=32", N=32, H=2048),
        measured("per_step", N=40),
    ]
    # log(512/400) = 0.247, log(600/512) = 0.159, log(40/32) = 0.223
    assert plan(*table)["rows"] == 16
    assert plan(*table[:1], *table[2:])["regime"] == "per_step"
    assert plan(*table, H=440)["rows"] == 8
    assert plan(*table, H=2048)["rows"] == 32
    # Both of N and H count.
    both = [measured("per_step", N=36, H=640), measured("streamed", N=40)]
    assert plan(*both)["regime"] == "streamed"


def test_of_measurements_that_are_as_near_the_first_counts() -> None:
    near = [measured("per_step", H=512), measured("streamed", H=512)]
    assert plan(*near)["regime"] == "per_step"
    assert plan(*reversed(near))["regime"] == "streamed"
    around = [measured("per_step", H=384), measured("streamed", H=600)]  # 480 is between both
    assert plan(*around, H=480)["regime"] == "per_step"
    assert plan(*reversed(around), H=480)["regime"] == "streamed"


@pytest.mark.parametrize("size", ["N", "H"])
def test_a_measurement_reaches_as_far_as_the_root_of_two(size: str) -> None:
    table = measured("per_step", **{size: 256})
    for value, reached in ((180, False), (182, True), (362, True), (364, False)):
        assert bool(plan(table, **{size: value})["measured"]) == reached, value


def test_a_projection_has_to_be_near_too() -> None:
    def projected(P: int, of: int) -> str:
        table = measured("per_step", cell="lstm_proj", P=of)
        return plan(table, cell="lstm_proj", P=P)["measured"]

    assert projected(128, 160)
    assert not projected(128, 256)


@pytest.mark.parametrize(
    "other",
    [
        {"card": "NVIDIA H100 PCIe"},
        {"card": ""},
        {"cell": "gru"},
        {"dtype": "f16"},
        {"backward": True},
        {"D": 2},
    ],
)
def test_measurements_of_something_else_do_not_count(other: dict[str, Any]) -> None:
    assert plan(measured("per_step", **other)) == plan()
    assert plan(measured("per_step", **other), measured("per_step"))["measured"]


def test_a_card_of_another_name_has_no_measurements() -> None:
    assert plan(measured("per_step"), arch="sm_90")["measured"]
    for card in ("H200", "A100"):
        assert plan(measured("per_step"), arch=card) == plan(arch=card)


def test_tf32_matters_to_float32_alone() -> None:
    for asked in (False, True):
        tables = {tf32: measured("per_step", dtype="f32", tf32=tf32) for tf32 in (False, True)}
        for tf32, table in tables.items():
            found = plan(table, dtype="f32", allow_tf32=asked)["measured"]
            assert bool(found) == (tf32 == asked)
        assert plan(measured("per_step"), allow_tf32=asked)["measured"]


def test_a_measurement_that_does_not_fit_changes_nothing() -> None:
    for regime, choice in (
        ("resident", "units=1,rows=32"),  # too many blocks
        ("resident", "rows=17"),  # no cut of 32 sequences
        ("streamed", "exchange=words"),
    ):
        assert plan(measured(regime, choice)) == plan()
    assert plan(measured("resident", cell="lstm_proj"), cell="lstm_proj") == plan(cell="lstm_proj")
    # The next one is not tried.
    assert plan(measured("resident", "rows=17"), measured("per_step")) == plan()
    long = {"cell": "lstm", "dtype": "bf16", "sizes": [1 << 24, *SIZES[1:]], "arch": "H100"}
    assert build.host().plan(measured=[measured("resident")], **long) == build.host().plan(**long)
    of_long = build.host().plan(measured=[measured("per_step")], **long)
    assert of_long["why_per_step"] == f"as measured on {H100}, 2026-12-01"


def test_a_measurement_with_unknown_words_changes_nothing() -> None:
    """It may come from a table for another version."""
    for regime, choice in (("quick", ""), ("resident", "warps=16"), ("resident", "cluster=3")):
        assert plan(measured(regime, choice)) == plan()


def test_the_table_that_is_checked_in_can_be_read() -> None:
    text = (build.CSRC / "cuda" / "measured.h").read_text()
    assert text.startswith(HEAD)
    assert build.host().read_measured() == text.count('{"')

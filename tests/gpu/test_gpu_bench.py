"""tools.gpu: the rows of the benchmark, and how they are timed."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import bench
from tools.gpu.rows import PRECISIONS, timed_rows
from tools.plans import Plan, plan_of


def alternative(plan: Plan) -> tuple[str, ...]:
    """The alternative that a plan chose.

    It is the regime, the product's instruction, and whether the sequences are split over blocks.
    """
    match = re.search(r", (\S+): \d+ x (\d+) x \d+", plan.short)
    if match is None:
        return (plan.regime,)
    return (plan.regime, match[1], "several" if int(match[2]) > 1 else "one")


@pytest.mark.parametrize("card", ["H100", "H200"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_alternative_of_the_plan_is_timed(card: str, backward: bool) -> None:
    found = set()
    for timed in timed_rows():
        if backward and "training" not in timed.row.modes:
            continue
        for sizes in timed.layers():
            tf32 = timed.precision == "tf32"
            plan = plan_of(timed.cell, timed.dtype, sizes, card, backward, tf32)
            found.add(alternative(plan))
    loops = itertools.product(("resident", "streamed"), ("FMA", "mma.sync"), ("one", "several"))
    assert found == {*loops, ("per_step",)}


def test_row_names_differ_and_the_most_telling_rows_come_first() -> None:
    rows = list(timed_rows())
    assert len({row.name for row in rows}) == len(rows)
    assert rows[0].name == "lstm 25,32,1024,1024 bf16"
    # Every row is timed in its first precision before any row is timed in another one.
    first = [row.row.shape.removesuffix(f" {row.row.dtype}") + row.row.cell for row in rows]
    assert first.index(first[0], 1) == len(set(first))
    assert [row.name for row in timed_rows("187,32")] == ["gru 187,32,2560,2560 bf16"]


# --- The benchmark -------------------------------------------------------------------------------


def run_bench(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    out = folder / "bench.jsonl"
    status = bench.main(["--device", "cpu", "--out", str(out), *arguments])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUND_US", 100.0)
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "ALONE", 2)


@pytest.mark.usefixtures("short")
def test_a_row_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (rates, *rows) = run_bench(tmp_path, "--rows", "60,12,96,200 f32")
    assert status == 0
    assert [row["kind"] for row in rows] == ["begin", "row", "begin", "row"]
    forward, training = rows[1::2]
    assert set(rates["rates"]) == {*PRECISIONS, "copy", "launch"}
    assert all(rate > 0 for rate in rates["rates"].values())
    assert (forward["mode"], training["mode"]) == ("forward", "training")
    for row in (forward, training):
        assert row["status"] == "ok"
        assert row["parity"]["right"]
        assert set(row["times"]) == {"ours", "torch"}
        assert row["estimate"] > 0
    assert len(training["plan"]) == 2
    assert training["floor"] == pytest.approx(3 * forward["floor"])
    assert "lstm 60,12,96,200 f32 training: " in capsys.readouterr().out


@pytest.mark.usefixtures("short")
def test_a_wrong_row_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.cases.tensors

    def wrong(layer: Any, *arguments: Any) -> Any:
        found = right(layer, *arguments)
        if type(layer).__module__.startswith("fusedrnn"):
            found["y"] = found["y"] + 1
        return found

    monkeypatch.setattr(bench.cases, "tensors", wrong)
    status, (_, _, row, *_) = run_bench(tmp_path, "--rows", "60,12,96,200 f32")
    assert status == 1
    assert row["status"] == "red"
    assert "times" not in row
    assert row["why"].startswith("y is off by ")


@pytest.mark.usefixtures("short")
def test_a_row_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bench.cases.check

    def fails(case: Any, mode: str, *against: Any) -> Any:
        if mode == "forward":
            raise RuntimeError("no kernel")
        return right(case, mode, *against)

    monkeypatch.setattr(bench.cases, "check", fails)
    status, (_, _, first, _, second) = run_bench(tmp_path, "--rows", "60,12,96,200 f32")
    assert status == 1
    assert (first["status"], first["why"]) == ("failed", "RuntimeError: no kernel")
    assert second["status"] == "ok"


@pytest.mark.usefixtures("short")
def test_a_row_that_loses_the_context_ends_the_process_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(case: Any, mode: str, *against: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(bench, "why_lost", lambda device: "device-side assert")
    with monkeypatch.context() as patch:
        patch.setattr(bench.cases, "check", lost)
        status, lines = run_bench(tmp_path, "--rows", "60,12,96,200 f32")
    assert status == 4
    assert [line["kind"] for line in lines] == ["rates", "begin", "row"]
    status, lines = run_bench(tmp_path, "--rows", "60,12,96,200 f32", "--skip", "1")
    assert status == 0
    assert [(line["mode"], line["status"]) for line in lines if line["kind"] == "row"] == [
        ("forward", "failed"),
        ("training", "ok"),
    ]


def test_unknown_rows_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_bench(tmp_path, "--rows", "zzz")
    assert stopped.value.code == 2
    assert "--rows: no row has 'zzz' in its name" in capsys.readouterr().err


@pytest.mark.usefixtures("short")
def test_running_out_of_time_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run_bench(tmp_path, "--seconds", "0")
    assert status == 3
    assert [line["kind"] for line in lines] == ["rates"]
    assert "out of time before lstm 25,32,1024,1024 bf16 forward" in capsys.readouterr().out


def test_the_floor_is_the_longer_of_operations_and_bytes() -> None:
    (timed,) = timed_rows("60,12,96,200 f32")
    flops = 2 * 60 * 12 * 4 * 200 * (96 + 200)
    values = 60 * 12 * (96 + 200) + 4 * 200 * (96 + 200)
    fast, slow = 1e15, 1e9
    assert bench.floor_of(timed, "forward", {"f32": slow, "copy": fast}) == flops / slow * 1e6
    assert bench.floor_of(timed, "forward", {"f32": fast, "copy": slow}) == values * 4 / slow * 1e6

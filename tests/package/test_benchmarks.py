"""The benchmark suite: it runs, times no layer with wrong results, and reports its measurements.

No test here judges a time.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from benchmarks import cases, compare, contention, floors, memory, report, results, runner, worker
from benchmarks import starts as starts_bench
from benchmarks.measure import LEAST_TURNS
from benchmarks.shapes import BOTH, CELLS, FORWARD, SETS, TRAINING, Row, merge, select

TINY = Row("rnn", 3, 2, 4, 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of one row, run from the command line."""
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    command = [sys.executable, "-m", "benchmarks", "run", "--set", "core", "--cell", "rnn"]
    command += ["--rows", "100,1,64,64", "--threads", "1", "--rivals", "torch,ort"]
    command += ["--seconds", "0.01", "--quiet", "--out", str(path)]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120)
    return path


def test_a_run_keeps_every_figure_with_the_machine(run: Path) -> None:
    found = results.load(run)
    assert {"cpu", "cpu_flags", "cores", "kernel", "torch", "mkl", "fusedrnn", "isa"} <= set(
        found["machine"]
    )
    assert len(found["machine"]["load_before"]) == len(found["machine"]["load_after"]) == 3
    assert {(row["name"], row["mode"]) for row in found["rows"]} == {
        ("rnn 100,1,64,64", mode) for mode in BOTH
    }
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert row["ratio"] == pytest.approx(row["torch"]["median"] / row["ours"]["median"], 1e-4)
        assert row["ours"]["fastest"] <= row["ours"]["p10"] <= row["ours"]["median"]
        assert 0 < row["parity"]["ours"] <= row["parity"]["limit"]
        assert row["floor"]["seconds"] > 0
    # A rival that is not installed is listed and raises no error.
    if found["rival_versions"]["ort"] is None:
        assert found["rivals"] == []
    else:
        assert {rival["status"] for rival in found["rivals"]} == {"ok", "unsupported"}


def test_the_report_has_tables_and_pictures(run: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nlast year\n{report.END}\nafter\n")
    docs = tmp_path / "docs" / "benchmarks.md"
    report.write([run], docs, readme)
    text = docs.read_text()
    assert "| 100,1,64,64 |" in text
    pictures = {path.name for path in (tmp_path / "docs" / "images").iterdir()}
    assert {"benchmarks-core-ratio.png", "benchmarks-core-floor.png"} <= pictures
    assert all(f"images/{name}" in text for name in pictures)
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "last year" not in once
    assert torch.__version__ in once
    report.write([run], None, readme)
    assert readme.read_text() == once


def test_the_report_shows_losses_and_rows_without_a_time(run: Path, tmp_path: Path) -> None:
    found = results.load(run)
    loss, red = found["rows"]
    loss["ratio"] = 0.5
    red |= {"status": "red", "why": "d_x is off by 1.0e-01, the limit is 1.0e-06"}
    for key in ("ours", "torch", "ratio", "floor", "part_of_floor"):
        del red[key]
    late = copy.deepcopy(red) | {"name": "rnn 9,9,9,9", "status": "not run", "why": "too slow"}
    found["rows"].append(late)
    results.save(found, tmp_path / "bad.json")
    report.write([tmp_path / "bad.json"], tmp_path / "docs.md", None)
    text = (tmp_path / "docs.md").read_text()
    for expected in ("**0.50**", "🔴 wrong", "d_x is off by 1.0e-01", "rnn 9,9,9,9", "too slow"):
        assert expected in text


def test_the_readme_must_have_its_two_comments(run: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(report.START)
    with pytest.raises(SystemExit, match="once each"):
        report.write([run], None, readme)
    assert readme.read_text() == report.START


def test_compare_finds_what_changed(run: Path) -> None:
    before = results.load(run)
    after = copy.deepcopy(before)
    for figure in after["rows"][0]["ours"]:
        after["rows"][0]["ours"][figure] *= 3
    text = compare.as_markdown(before, after)
    assert "**+200.0%**" in text
    assert "+0.0%" in text
    after["machine"]["cpu"] = "another"
    assert "do not compare" in compare.as_markdown(before, after)


class _Wrong(fusedrnn.FusedRNN):
    """An RNN whose y, or whose gradients, are slightly wrong."""

    factor, gradient_only = 1.0, False

    def forward(self, input: Any, hx: Any = None, lengths: Any = None) -> Any:
        y, h = super().forward(input, hx, lengths)
        if self.gradient_only:
            return y + (self.factor - 1) * (y - y.detach()), h
        return self.factor * y, h


@pytest.mark.parametrize(
    ("factor", "gradient_only", "status"),
    [(1.0, False, "ok"), (1.001, False, "red"), (1.001, True, "red"), (float("nan"), False, "red")],
)
def test_a_wrong_layer_fails_and_has_no_time(
    monkeypatch: pytest.MonkeyPatch, factor: float, gradient_only: bool, status: str
) -> None:
    monkeypatch.setitem(cases.LAYERS, ("rnn", False), (nn.RNN, _Wrong))
    monkeypatch.setattr(_Wrong, "factor", factor)
    monkeypatch.setattr(_Wrong, "gradient_only", gradient_only)
    result = worker.measure(cases.build(TINY), TRAINING, 0.001, floors.Rates(1, 0.001))
    assert result["status"] == status
    assert ("ours" in result) == (status == "ok")
    assert bool(result["why"]) == (status != "ok")


@pytest.mark.parametrize(
    "row",
    [
        TINY,
        Row("lstm", 3, 2, 4, 6, P=2, dtype="float64"),
        Row("gru", 5, 3, 4, 5, L=2, D=2, packed=True),
        Row("lstm", 5, 3, 4, 5, dtype="bfloat16"),
        Row("gru", 1, 2, 4, 5, single=True, modes=(FORWARD,)),
    ],
    ids=str,
)
def test_every_kind_of_row_has_parity(row: Row) -> None:
    for mode in row.modes:
        parity = cases.check(cases.build(row), mode)
        assert parity.right, parity


def test_a_worker_that_dies_fails_its_rows() -> None:
    job = runner.Job("rival", 1, [TINY], 0.01, rival="nonsense")
    events = list(runner._events(job))
    assert [(event["mode"], event["status"]) for event in events] == [
        (mode, "failed") for mode in BOTH
    ]
    assert "nonsense" in events[0]["why"]


def test_busy_processes_end_with_their_trial() -> None:
    def trial() -> None:
        with contention.processes(2, "busy", limit=5, threads=1) as started:
            for pid in started:
                os.kill(pid, 0)
            pids.extend(started)
            raise ZeroDivisionError

    pids: list[int] = []
    with pytest.raises(ZeroDivisionError):
        trial()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_kept_counts_each_storage_once_without_input_and_parameters() -> None:
    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input).exp()  # keeps the input, the weight, and the result of exp
            return y * y[:]  # keeps two views of one storage

    x = torch.randn(7, 3)
    assert memory.kept(Layer(3, 5), x) == 7 * 5 * 4


def test_no_set_has_a_row_twice_and_all_rows_have_one_name() -> None:
    for name in SETS:
        rows = select(name, CELLS)
        assert len({row.name for row in rows}) == len(rows), name
    rows = merge((name, select(name, CELLS)) for name in ("core", "packed"))
    assert rows[Row("lstm", 100, 32, 256, 256, packed=True)] == ["core", "packed"]


def test_flops_and_floor_of_a_row() -> None:
    row = Row("lstm", 10, 4, 3, 8, L=2, D=2)
    x_w = 2 * 10 * 4 * 32 * 2 * (3 + 16)
    h_u = 2 * 10 * 4 * 32 * 2 * (8 + 8)
    assert row.flops(FORWARD) == x_w + h_u
    assert row.flops(TRAINING) == 3 * row.flops(FORWARD)
    assert row.u_bytes() == 4 * 32 * 8
    found = floors.floor(row, TRAINING, floors.Rates(1, 0.001))
    assert 0 < found["seconds"] <= found["own"]
    assert found["seconds"] >= max(found["compute"], found["memory"] or 0)


def test_rows_on_one_device(tmp_path: Path) -> None:
    """Runs on the CPU the code that `--device cuda` runs."""
    out = tmp_path / "device.json"
    command = [sys.executable, "-m", "benchmarks", "run", "--set", "core", "--rows", "100,1,64,64"]
    command += ["--cell", "gru", "--seconds", "0.01", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["device"]["name"] == "cpu"
    assert len(found["rows"]) == 2
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert row["ratio"] == row["torch"]["median"] / row["ours"]["median"]
        assert f"| {row['name']} | {row['mode']} | " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "run", "--set", "core", "--device", "cuda"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "x.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: --device cuda: " in done.stderr


@pytest.mark.parametrize("cell", CELLS)
def test_times_of_beginnings(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop over torch.nn's layer is compared with ours before it is timed."""
    sizes = (6, 3, 4, 5)
    monkeypatch.setattr(starts_bench, "CORE", [sizes])
    monkeypatch.setattr(starts_bench, "MASKS", {"zeros": 0.0, "1 %": 0.3, "2 %": 0.5})
    rows = []
    for mode in BOTH:
        seconds = starts_bench.measure(cell, sizes, mode, 0.0, with_loop=True)
        assert list(seconds) == ["none", "zeros", "1 %", "2 %", "loop"]
        assert all(timing.calls >= LEAST_TURNS for timing in seconds.values())
        rows.append({"cell": cell, "sizes": sizes, "mode": mode, "seconds": seconds})
    text = starts_bench.table(rows)
    assert f"| {cell} | 6,3,4,5 | training |" in text and "Core set, 2 % over none" in text

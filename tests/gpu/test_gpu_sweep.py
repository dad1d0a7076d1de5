"""tools.gpu.sweep: which other plans of a row are tried, how they are timed, what is reported."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.results_folder import make, row
from tests.gpu.scripted_run import USUAL, Script, everything
from tools.gpu import bench, report, steps, sweep, swept
from tools.gpu.results import load
from tools.gpu.rows import timed_rows
from tools.gpu.tasks import REGIME
from tools.plans import plan_of

NAME = "60,12,96,200 f32"


def the_row(name: str) -> Any:
    (timed,) = timed_rows(name)
    return timed


# --- What is tried -------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["H100", "T4"])
def test_every_alternative_runs_and_has_other_blocks(card: str) -> None:
    tried = set()
    for timed in timed_rows():
        for mode in timed.row.modes:
            chosen, *others = sweep.alternatives(timed, mode, card)
            assert chosen.chosen and len(others) <= sweep.MOST
            words = {chosen.plan.words}
            for each in others:
                assert not each.chosen
                again = plan_of(
                    *(timed.cell, timed.dtype, timed.layers()[0], card, mode == "training"),
                    *(timed.precision == "tf32", each.regime, each.choice),
                )
                assert again == each.plan and again.limit
                assert again.regime == each.regime
                words.add(again.words)
                tried |= {part.split("=")[0] for part in each.choice.split(",")}
            assert len(words) == 1 + len(others)
            assert len({each.name for each in (chosen, *others)}) == len(words)
    clusters = {"cluster", "arrive"} if card == "H100" else set()
    assert tried == {"", "rows", "units", "cores", "exchange"} | clusters


def test_what_is_near_a_block() -> None:
    names = [each.name for each in sweep.alternatives(the_row("8,64,64 bf16"), "forward", "H100")]
    assert "resident cores=fma,exchange=words" in names
    assert "resident rows=4" in names
    names = [
        each.name for each in sweep.alternatives(the_row("25,128,512,512 bf16"), "forward", "H100")
    ]
    assert "resident rows=64" in names and "streamed" in names
    assert not any("words" in name for name in names)


def test_a_new_kind_of_choice_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def mail(block: Any, N: int) -> Iterator[str]:
        yield f"cores=fma,rows={N}"

    monkeypatch.setattr(sweep, "NEAR", (mail,))
    timed = the_row("150,32,256,256 bf16")
    names = [each.name for each in sweep.alternatives(timed, "forward", "H100")]
    assert "resident cores=fma,rows=32" in names


def test_only_the_pass_that_is_varied_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sweep.CHOICE, "units=3")
    seen: list[tuple[str, str | None, str | None]] = []

    def look(where: str) -> None:
        seen.append((where, os.environ.get(REGIME), os.environ.get(sweep.CHOICE)))

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            look("forward")
            return x * weight

        @staticmethod
        def backward(ctx: Any, *d_y: torch.Tensor) -> Any:  # type: ignore[override]
            look("backward")
            return d_y[0], d_y[0]

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = Seen.apply(x, self.weight)  # type: ignore[no-untyped-call]
            return y, y

    case = bench.cases.Case(the_row(NAME).row, Layer(), Layer(), torch.ones(3), torch.ones(3))
    plan = plan_of("lstm", "f32", [9, 9, 9, 9, 9, 1], "H100", False)
    each = sweep.Alternative("resident", "rows=3", plan)
    asked, plain = ("resident", "rows=3"), (None, "units=3")
    sweep.call_of(case.ours, case, "forward", each)()
    assert seen.pop(0) == ("forward", *asked)
    sweep.call_of(case.ours, case, "training", each)()
    assert seen == [("forward", *plain), ("backward", *asked)]
    seen.clear()
    bench.cases.tensors(case.ours, case.x, case.d_y, "training", sweep.asking(each))
    assert seen == [("forward", *plain), ("backward", *asked)]
    assert os.environ[sweep.CHOICE] == "units=3" and REGIME not in os.environ


# --- How it is timed -----------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUND_US": 100.0, "ROUNDS": 2, "WARM_UP": 1}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(sweep, "MOST", 3)
    monkeypatch.setattr(sweep, "ROW_US", 1e12)


def run_sweep(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    out = folder / "bench.jsonl"
    status = sweep.main(["--device", "cpu", "--out", str(out), "--rows", NAME, *arguments])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.usefixtures("short")
def test_each_alternative_gets_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (rates, *lines) = run_sweep(tmp_path)
    assert (status, rates["kind"]) == (0, "rates")
    for mode in ("forward", "training"):
        begin, *found = (line for line in lines if line["mode"] == mode)
        assert begin["kind"] == "sweep begin"
        assert len(found) == 4 and {line["kind"] for line in found} == {"sweep"}
        assert [line["chosen"] for line in found].count(True) == 1
        for line in found:
            assert line["status"] == "ok"
            assert line["pass"] == ("backward" if mode == "training" else "forward")
            assert line["step"] == pytest.approx(line["times"]["ours"]["call"] / 60)
            assert line["of_floor"] == pytest.approx(line["floor"] / line["times"]["ours"]["call"])
            assert line["times"]["torch"]["call"] > 0
            assert bool(line["choice"]) <= (line["regime"] != "per_step")
    assert f"lstm {NAME} training, us a step: " in capsys.readouterr().out


@pytest.mark.usefixtures("short")
def test_wrong_and_refused_alternatives_get_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alternative computes wrong results, and the engine refuses another one."""
    timed = the_row(NAME)
    _, wrong, refused, *_ = sweep.alternatives(timed, "forward", "H100")
    right = sweep._parity

    def parity(case: Any, mode: str, against: Any, of: sweep.Alternative) -> Any:
        if of.name == refused.name:
            error = RuntimeError("it does not fit")
            error.fusedrnn_tag = " [fusedrnn:regime]"  # type: ignore[attr-defined]
            raise error
        found = right(case, mode, against, of)
        return bench.cases.replace(found, right=of.name != wrong.name)

    monkeypatch.setattr(sweep, "_parity", parity)
    status, lines = run_sweep(tmp_path, "--most", "1")
    assert status == 1
    found = {swept.words_of(line): line for line in lines if line["kind"] == "sweep"}
    assert found[wrong.name]["status"] == "red"
    assert "is off by" in found[wrong.name]["why"]
    assert (found[refused.name]["status"], found[refused.name]["why"]) == (
        *("not run", "it does not fit"),
    )
    assert sum(line["status"] == "ok" for line in found.values()) == 2
    assert all("times" not in line for line in found.values() if line["status"] != "ok")
    text = report.as_markdown(load(make(tmp_path / "out", rows=list(found.values()))))
    assert f"- PLAN lstm {NAME} forward, {wrong.name}: red: " in text


@pytest.mark.usefixtures("short")
def test_alternatives_without_time_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "ROW_US", 0.0)
    status, lines = run_sweep(tmp_path, "--most", "1")
    found = [line for line in lines if line["kind"] == "sweep"]
    assert (status, len(found)) == (0, 4)
    for each in found:
        assert each["status"] == "not run" and each["why"].startswith("a call takes ")


@pytest.mark.usefixtures("short")
def test_an_alternative_that_loses_the_context_ends_the_process_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(sweep, "why_lost", lambda device: "device-side assert")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_parity", lost)
        status, lines = run_sweep(tmp_path)
    assert status == 4
    assert [line["kind"] for line in lines] == ["rates", "sweep begin", "sweep"]
    assert (lines[2]["status"], lines[2]["chosen"]) == ("failed", True)
    status, lines = run_sweep(tmp_path, "--skip", "1")
    assert status == 0
    assert {line["mode"] for line in lines[4:]} == {"training"}


def test_a_sweep_that_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure_rates", lambda device: {})
    status, lines = run_sweep(tmp_path, "--seconds", "0")
    assert (status, [line["kind"] for line in lines]) == (3, ["rates"])
    assert f"out of time before lstm {NAME} forward" in capsys.readouterr().out
    monkeypatch.setenv(REGIME, "per_step")
    (tmp_path / "bench.jsonl").unlink()
    assert run_sweep(tmp_path) == (0, [])
    with pytest.raises(SystemExit), contextlib.redirect_stderr(None):
        sweep.main(["--device", "cpu", "--out", str(tmp_path / "x"), "--rows", "zzz"])


# --- What is reported ----------------------------------------------------------------------------


def line(choice: str, step: float, mode: str = "forward", **more: Any) -> dict[str, Any]:
    found = {"kind": "sweep", "name": "lstm bf16", "mode": mode, "pass": "forward", "steps": 10}
    found |= {"regime": "resident", "choice": choice, "chosen": not choice, "status": "ok"}
    found |= {"why": "", "plan": f"resident, FMA: {len(choice)} x 1 x 1", "step": step}
    times = {"ours": {"call": 10 * step}, "torch": {"call": 90.0}}
    return found | {"of_floor": 1 / step, "times": times} | more


def test_a_report_names_the_choice_and_the_fastest(tmp_path: Path) -> None:
    begin = {"kind": "sweep begin", "name": "lstm bf16", "mode": "forward"}
    lines = [begin, line("", 5.0), line("rows=8", 4.0), line("rows=2", 9.0)]
    lines += [line("", 4.0, "training"), line("rows=2", 4.0, "training")]
    folder = make(tmp_path / "out", rows=[row("a", 1, 2), *lines])
    found = load(folder)
    text = report.as_markdown(found)
    chosen, other = "resident, FMA: 0 x 1 x 1", "resident, FMA: 6 x 1 x 1"
    fields = f"lstm bf16 | forward | {chosen} | 5.00 (20 %) | resident rows=8 | {other} |"
    assert f"| {fields} 4.00 (25 %) | **1.25** | 9.00 | 3 of 3 |" in text
    fields = f"lstm bf16 | training | {chosen} | 4.00 (25 %) | resident rows=2 | {other} |"
    assert f"| {fields} 4.00 (25 %) | 1.00 | 9.00 | 2 of 2 |" in text
    table = report.final_table(found)
    told = "another plan was faster: lstm bf16 forward: 5.00 us a step, resident rows=8 4.00, x1.25"
    assert told in table
    assert table.count("another plan was faster") == 1


def test_a_row_without_a_choice_that_was_timed(tmp_path: Path) -> None:
    bad = {"chosen": True, "status": "failed", "why": "lost", "times": None}
    (group,) = swept.groups([line("", 5.0, **bad), line("rows=2", 4.0)])
    assert (group.chosen, group.gain, swept.missed(group)) == (None, None, "")
    assert group.fastest is not None and group.torch == 9.0
    assert "| - | - | resident rows=2 |" in "\n".join(report.sweep_table([group]))
    # A second process that sweeps over the row replaces the results of the first.
    begin = {"kind": "sweep begin", "name": "lstm bf16", "mode": "forward"}
    (group,) = swept.groups([begin, line("", 5.0, **bad), begin, line("", 3.0)])
    assert (len(group.lines), group.fastest, group.torch) == (1, None, 9.0)


# --- The step ------------------------------------------------------------------------------------


def test_the_sweep_comes_after_the_regimes_and_goes_on_after_a_loss(tmp_path: Path) -> None:
    first, second = steps.SWEEPS
    takes = {key: value for key, value in USUAL.items() if key != "times"}
    takes |= {steps.BENCHES[0]: 100, first: 20, second: 20}
    run = Script(tmp_path, 400, takes, {first: -9, second: 4})
    begin = '{"kind": "sweep begin", "name": "x", "mode": "forward"}\n'
    (tmp_path / "bench.jsonl").write_text(begin * 2)
    names = everything(run)
    place = names.index(steps.BENCHES[0])
    assert names[place + 1 : place + 3] == [first, second]
    assert names[place + 3].startswith("profile")
    seconds, command, _ = run.commands[second]
    assert " --skip 2 " in command and f"--seconds {seconds - 8:.0f}" in command
    assert seconds >= steps.FOR_SWEEP


def test_a_sweep_alone_has_all_the_time(tmp_path: Path) -> None:
    run = Script(tmp_path, 300, USUAL)
    run.only = ["sweep"]
    assert everything(run, rows="gru") == ["facts", "import", "first calls", steps.SWEEPS[0]]
    seconds, command, _ = run.commands[steps.SWEEPS[0]]
    assert seconds == 300 - 26 and "--rows gru" in command

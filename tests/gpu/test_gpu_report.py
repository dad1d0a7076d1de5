"""tools.gpu: the reports of a run, the page that publishes kept results, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.results_folder import RATES, make, row
from tools.gpu import __main__ as program
from tools.gpu import bench, hot, keep, report, steps
from tools.gpu.facts import ROOT, gather, sources
from tools.gpu.fastest import summary
from tools.gpu.process import Outcome, Stream
from tools.gpu.results import load, numbers_are_wrong
from tools.gpu.run import Run

# --- Reports -------------------------------------------------------------------------------------


def step(name: str, result: str, why: str = "") -> dict[str, Any]:
    return {"name": name, "result": result, "why": why, "seconds": 3.0, "limit": 9.0, "last": []}


def failed(number: int) -> dict[str, Any]:
    name, detail = f"case {number}", "wrong " * 80
    return {
        "task": "a",
        "section": "parity",
        "name": name,
        "result": "failed",
        "detail": detail,
    }


def test_the_final_table_has_a_limited_length(tmp_path: Path) -> None:
    rows = [row(f"lstm {n},32,1024,1024 2 layers bidirectional bf16", 10, 20) for n in range(200)]
    found = [failed(n) for n in range(100)]
    many = [step(f"step {n}", "failed", "x" * 500) for n in range(20)]
    text = report.final_table(load(make(tmp_path / "out", checks=found, rows=rows, steps=many)))
    assert len(text) < 12_000
    # The steps come first, then failed checks, then times. Lines that do not fit are counted.
    assert text.index("step 19") < text.index("FAILED parity: case 0") < text.index("lstm 0,32")
    assert "and 75 more, in report.md" in text
    kept = sum(line.startswith("lstm ") for line in text.splitlines())
    assert text.endswith(f"and {200 - kept} more lines, in report.md\n")


def test_a_report_holds_everything(tmp_path: Path) -> None:
    passed = {"task": "a", "section": "parity", "name": "b", "result": "passed", "detail": "0 eps"}
    not_run = {**passed, "result": "not run", "detail": "no second GPU"}
    lost = {"task": "parity gru resident", "ended": "lost: hung: 30 s without a word"}
    rows = [row("fast", 10, 20), row("slow", 20, 10)]
    rows += [{"kind": "row", "name": "red", "mode": "forward", "status": "red", "why": "y is off"}]
    folder = make(
        tmp_path / "out",
        checks=[passed, not_run, failed(0), lost],
        rows=rows,
        steps=[step("bench", "ok"), step("ncu", "not run", "ncu is not on PATH")],
    )
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert text.startswith("# fusedrnn on NVIDIA H100 80GB HBM3\n")
    assert "driver 580.1, torch 2.11.0+cu130, cuDNN 91900" in text
    assert "1 checks passed, 1 failed, 1 not run, 1 rows wrong" in text
    assert "| ncu | not run | ncu is not on PATH |" in text
    assert "- TASK parity gru resident: lost: hung: 30 s without a word" in text
    assert "- parity: b: no second GPU" in text
    # The columns: the plan, its choice and the fastest regime, call/graph/alone of ours and of
    # torch.nn, two ratios, microseconds of one step, the call in each regime (not measured here),
    # the estimate and the floor. A ratio below 1 is bold.
    plan = "resident, FMA: 8 x 1 x 1; per step | resident+per step | "
    times = "20/10/30 | 40/20/60 | 2.00 | 2.00 | 0.40 |  |  |  | 50 | 12 |"
    assert f"| fast | training | {plan} | {times}" in text
    assert "not the fastest" not in text
    assert "| **0.50** | **0.50** |" in text
    assert "| red | forward | red: y is off |" in text


def regimes(**calls: float) -> dict[str, Any]:
    """The results of a row of 25 steps in some regimes, of which the plan chose the first."""
    times = {regime: {"call": call, "spread": 1.1} for regime, call in calls.items()}
    of_passes = {"forward": next(iter(calls)), "backward": next(iter(calls))}
    found = {"regimes": summary(times, {}, 25, 12.0), "chosen": next(iter(calls))}
    return found | {"by_pass": of_passes, "cell": "lstm", "precision": "bf16"}


def test_a_choice_that_was_not_the_fastest_is_listed(tmp_path: Path) -> None:
    rows = [
        row("best", 10, 20, **regimes(resident=20, streamed=30, per_step=40)),
        row("late", 15, 20, **regimes(streamed=30, per_step=24)),
        row("near", 15, 20, **regimes(resident=30, per_step=29.5)),
    ]
    rows[1]["regimes"]["resident"] = {"left_out": "a call takes 300 ms"}
    found = load(make(tmp_path / "out", rows=rows))
    text = report.as_markdown(found)
    late = "late training: streamed 30 us, per step 24 us, x1.25"
    assert f"not the fastest in these rows:\n\n- {late}\n" in text
    assert " | resident | resident | 20/10/30 | " in text
    assert " | streamed | per step | 30/15/45 | " in text
    assert " | 20 (0.80, 60 %) | 30 (1.20, 40 %) | 40 (1.60, 30 %) | 50 | 12 |" in text
    assert " | a call takes 300 ms | 30 (1.20, 40 %) | 24 (0.96, 50 %) | " in text
    table = report.final_table(found)
    assert f"\nanother regime was faster: {late}\n" in table
    assert table.count("another regime") == 1
    assert "best train: 20/10/30 40/20/60 x2.00 x2.00 streamed 30 per step 40 est 50" in table


def test_the_choices_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"sizes": [25, 32, 2048, 2048, 2048, 1]}
    folded = {"sizes": [25, 4, 512, 2048, 512, 2], "name": "b packed"}
    rows = [
        row("a", 10, 20, mode="forward", **sizes, **regimes(streamed=50, per_step=25)),
        row("a", 10, 20, **sizes, **regimes(per_step=100, streamed=150)),
        row("b", 10, 20, **regimes(streamed=50), mode="forward") | folded,
        row("red", 10, 20, status="red", why="y is off"),
    ]
    rows[2]["regimes"]["per_step"] = {"left_out": "a call takes 300 ms"}
    folder = make(tmp_path / "out", rows=rows)
    assert program.main(["choices", str(folder / "bench.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "# NVIDIA H100 PCIe, 2026-11-29",
        "lstm bf16 N=32 H=2048 T=25 forward: per step 1.00, streamed* 2.00",
        "lstm bf16 N=32 H=2048 T=25 backward: per step* 3.00, streamed 4.00",
        "lstm bf16 N=4 H=2048 P=512 D=2 packed T=25 forward: streamed* 2.00, "
        "per step not timed: a call takes 300 ms",
    ]
    for text in ("", json.dumps(RATES) + "\n"):
        (folder / "bench.jsonl").write_text(text)
        with pytest.raises(SystemExit, match="no row that was timed in a regime"):
            program.main(["choices", str(folder / "bench.jsonl")])
    with pytest.raises(SystemExit, match="is no file"):
        program.main(["choices", str(folder)])


def test_a_message_of_several_lines_breaks_no_table(tmp_path: Path) -> None:
    why = "AcceleratorError: CUDA error: an illegal access\nSearch for it | in the docs\n"
    bad = {"kind": "row", "name": "a", "mode": "forward", "status": "failed", "why": why}
    found = load(make(tmp_path / "out", rows=[bad], steps=[step("bench", "failed", why)]))
    text = report.as_markdown(found)
    wanted = "failed: AcceleratorError: CUDA error: an illegal access Search for it / in the docs"
    assert f"| a | forward | {wanted} |" in text
    assert all(line.startswith("|") for line in text.splitlines() if "Search for it /" in line)
    assert "\nSearch" not in report.final_table(found)
    assert "\nSearch" not in bench.as_text(bad)


def test_a_step_that_ran_out_of_time_has_not_failed(tmp_path: Path) -> None:
    found = load(make(tmp_path / "out", steps=[step("all layers", "unfinished", "exit 3")]))
    assert "steps that failed" not in found.verdict()
    assert "out of time in: all layers" in found.verdict()


def test_a_run_that_was_cut_off_can_be_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", checks=[failed(0)])
    with (folder / "checks.jsonl").open("a") as out:
        out.write('{"task": "a", "sec')
    (folder / "bench.jsonl").unlink()
    assert len(load(folder).checks) == 1
    report.write(folder)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results of a run"):
        load(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="is not of format 1"):
        load(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 1, "started": "x", "facts": {}}')
    with pytest.raises(ValueError, match=r"run\.json has no steps"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("bench.jsonl", '{"name": "a"}', "line 2 is no row of a benchmark"),
        ("bench.jsonl", '{"kind": "row", "status": "ok"}', "line 2 is no row of a benchmark"),
        ("checks.jsonl", "[1]", "line 1 is no object of JSON"),
    ],
)
def test_lines_that_are_no_results_are_named(
    tmp_path: Path, file: str, line: str, message: str
) -> None:
    folder = make(tmp_path / "out")
    with (folder / file).open("a") as out:
        out.write(line + "\n")
    with pytest.raises(ValueError, match=f"{file}, {message}"):
        load(folder)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (failed(0), True),
        ({**failed(0), "section": "limits"}, False),
        ({**failed(0), "section": "watchdog"}, False),
        ({**failed(0), "section": "two streams"}, True),
        ({**failed(0), "result": "not run"}, False),
        ({"task": "a", "ended": "ok"}, False),
        ({"task": "a", "ended": "not reached"}, False),
        ({"task": "a", "ended": "lost: died of SIGSEGV"}, True),
        ({"task": "a", "ended": "the context is lost: CUDA error"}, True),
    ],
)
def test_when_numbers_are_wrong(line: dict[str, Any], wrong: bool) -> None:
    assert numbers_are_wrong([line]) == wrong


# --- Results that are kept -----------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page that results are published on, and an empty folder for them."""
    docs = tmp_path / "cuda.md"
    docs.write_text(f"# CUDA\n{keep.BEGIN}\n{keep.END}\nthe rest\n")
    monkeypatch.setattr(keep, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(keep, "DOCS", docs)
    return docs


def test_results_are_kept_as_they_are_and_published_on_the_page(page: Path, tmp_path: Path) -> None:
    keep.write_docs()
    assert keep.NOTHING in page.read_text()
    out = make(tmp_path / "out", rows=[row("fast", 10, 20)])
    report.write(out)
    (out / "run.json").chmod(0o444)
    assert keep.keep(out).name == "gpu-h100-80gb-hbm3-2026-11-29"
    with pytest.raises(ValueError, match=r"the run of 2026-11-29T10:00:00\+0000 is kept already"):
        keep.keep(out)
    again = make(tmp_path / "again", started="2026-11-29T11:00:00+0000", rows=[row("b", 1, 2)])
    assert keep.keep(again).name == "gpu-h100-80gb-hbm3-2026-11-29-2"
    with pytest.raises(ValueError, match="holds results without a GPU"):
        keep.keep(make(tmp_path / "none", rows=[row("b", 1, 2)], gpu={"error": "no GPU"}))
    make(tmp_path / "later", "NVIDIA H200", "2026-12-01T10:00:00+0000", checks=[failed(0)])
    kept = keep.keep(tmp_path / "later")
    assert kept.name == "gpu-h200-2026-12-01"
    for file in out.iterdir():
        assert (keep.RESULTS / "gpu-h100-80gb-hbm3-2026-11-29" / file.name).read_bytes() == (
            file.read_bytes()
        )
    text = page.read_text()
    assert keep.NOTHING not in text
    assert text.startswith("# CUDA\n")
    assert text.endswith("the rest\n")
    # The latest run comes first.
    assert text.index("### NVIDIA H200, 2026-12-01") < text.index("### NVIDIA H100 80GB HBM3")
    assert "| fast | training |" in text
    assert "No row was timed." in text
    assert keep.write_docs(check=True) == 0
    page.write_text(text.replace("fast", "faster"))
    assert keep.write_docs(check=True) == 1


def test_the_page_is_up_to_date() -> None:
    """`python -m tools.gpu keep` updates it."""
    assert keep.write_docs(check=True) == 0


# --- Hot instructions, facts and the command line ------------------------------------------------


def test_the_hottest_instructions() -> None:
    text = """==PROF== noise
"Kernel Name","resident_forward_fma_f32"
"#","Source","Samples Not Issued","Warp Stall Sampling (All Samples)"
"0","LDG R1","7","100"
"1","FFMA R2","7","1,900"
"""
    assert list(hot.hottest(text.splitlines())) == [
        "Kernel Name,resident_forward_fma_f32",
        "2 instructions, 2000 of Warp Stall Sampling (All Samples)",
        " 95.0 %  #1      FFMA R2",
        "  5.0 %  #0      LDG R1",
    ]
    assert list(hot.hottest(["nothing of that kind"])) == []


def test_a_fact_that_cannot_be_found_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    found = gather()
    assert "FileNotFoundError" in found["nvidia_smi"]["error"]
    assert found["torch"]["version"] == torch.__version__
    assert found["sources"] == sources()
    json.dumps(found)


def test_facts_of_any_length_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step cuts long lines of a program's output; that must not break the JSON of the facts."""
    monkeypatch.setenv("CUDA_OF_A_TEST", "x" * 100_000)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = Run(tmp_path, 100, {})
    steps.Everything(run, "cpu", quick=True).facts()
    assert run.facts["environment"]["CUDA_OF_A_TEST"] == "x" * 500
    assert run.facts["torch"]["version"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "bensh"], "error: --steps must be of checks, bench, .*, got 'bensh'"),
        (["--tasks", "parity, chekcs"], "error: --tasks must be of limits, smoke, .*'chekcs'"),
        (["--tasks", "hang"], "error: --tasks must be of .*, got 'hang'"),
        (["--tasks", "parity", "--steps", "bench"], "error: --tasks goes with the checks"),
        (["--seconds", "0"], "--seconds: must be from 6 to 36000, got '0'"),
        (["--seconds", "nan"], "--seconds: must be from 6 to 36000, got 'nan'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(["run", "--out", str(tmp_path / "out"), *arguments])
    said = f"{capsys.readouterr().err}{stopped.value.code}"
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_take_results_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "prepare_environment", lambda root: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.json").write_text("old")
    (tmp_path / "file").write_text("")
    for out, message in (("full", "a new or an empty folder"), ("file", "File exists")):
        with pytest.raises(SystemExit, match=f"error: --out .*{out}: .*{message}"):
            program.main(["run", "--out", str(tmp_path / out)])
    assert (tmp_path / "full" / "run.json").read_text() == "old"


def test_output_without_facts_does_not_stop_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, 100, {})

    def step(*_: Any, **__: Any) -> Outcome:
        out = Stream()
        out.add("a library's banner, and nothing else")
        return Outcome(0, "", 1.0, out, Stream())

    run.step = step  # type: ignore[method-assign]
    steps.Everything(run, "cpu", quick=True).facts()
    assert run.facts == {}


def test_without_a_gpu_a_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "prepare_environment", lambda root: None)
    options = program._parser().parse_args(["run", "--out", str(tmp_path / "out")])
    assert options.command(options) == 1
    said = capsys.readouterr().out
    assert "== import: failed: torch finds no GPU; see whether nvidia-smi does" in said
    assert "nothing can run" in said
    assert [s["name"] for s in load(tmp_path / "out").run["steps"]] == ["facts", "import"]

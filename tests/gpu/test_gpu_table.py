"""tools.gpu choices --table: the plan's table of measurements from timed rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import __main__ as program
from tools.gpu import table
from tools.gpu.facts import ROOT
from tools.gpu.keep import RESULTS

STEPS = 20


def rates(gpu: str = "NVIDIA H200", date: str = "2026-12-01") -> dict[str, Any]:
    return {"kind": "rates", "card": "H200", "gpu": gpu, "date": date, "rates": {}}


def row(mode: str, calls: dict[str, float], chosen: str, **more: Any) -> dict[str, Any]:
    """A row with the microseconds of a step in each regime."""
    found = {"kind": "row", "name": "lstm 20,32,512,512 bf16", "mode": mode, "status": "ok"}
    found |= {"cell": "lstm", "precision": "bf16", "sizes": [STEPS, 32, 512, 512, 512, 1]}
    passes = ("forward", "backward") if mode == "training" else ("forward",)
    found |= {"steps": STEPS, "chosen": chosen, "by_pass": dict.fromkeys(passes, chosen)}
    found |= {"regimes": {key: {"call": us * STEPS} for key, us in calls.items()}}
    found |= {"times": {"ours": {"call": calls.get(chosen, 1) * STEPS}}}
    return found | more


def plan(mode: str, regime: str, choice: str, step: float, **more: Any) -> dict[str, Any]:
    found = row(mode, {}, regime) | {"kind": "sweep", "regime": regime, "choice": choice}
    found |= {"chosen": False, "step": step, "times": {"ours": {"call": step * STEPS}}}
    return found | more


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def found(path: Path) -> dict[str, tuple[str, str]]:
    entries = table.entries([path])
    names = ("forward", "backward")
    return {names[entry.layer.backward]: (entry.regime, entry.choice) for entry in entries}


def test_regimes_alone(tmp_path: Path) -> None:
    """Backward's time is a training step less a forward call of the same regime."""
    forward = row("forward", {"resident": 2.0, "streamed": 1.5, "per_step": 5.0}, "resident")
    calls = {"resident": 5.0, "streamed": 5.5, "per_step": 9.0}
    training = row("training", calls, "resident")
    assert found(write(tmp_path / "b", rates(), forward, training)) == {
        "forward": ("streamed", ""),
        "backward": ("resident", ""),
    }
    # A plan of one regime forward and another backward, as "resident+per_step".
    by_pass = {"forward": "resident", "backward": "per_step"}
    calls = {"resident+per_step": 4.0, "resident": 8.0}
    mixed = row("training", calls, "resident+per_step", by_pass=by_pass)
    assert found(write(tmp_path / "b", rates(), forward, mixed))["backward"] == ("per_step", "")


def test_the_choice_of_the_plan_stays_if_it_is_hardly_slower(tmp_path: Path) -> None:
    forward = row("forward", {"resident": 2.0, "streamed": 1.95}, "resident")
    # Noise is that of the whole training step: 0.2 of 10 us is less than 3 %.
    training = row("training", {"resident": 10.0, "streamed": 9.75}, "resident")
    path = write(tmp_path / "b", rates(), forward, training)
    assert found(path) == {"forward": ("resident", ""), "backward": ("resident", "")}


def test_other_plans(tmp_path: Path) -> None:
    """In a sweep over backward, forward is the plan's choice."""
    lines = [
        *(rates(), row("forward", {"resident": 2.5}, "resident")),
        *(row("training", {"resident": 9.0, "per_step": 4.0}, "resident"), rates()),
        plan("forward", "resident", "", 2.0, chosen=True),
        plan("forward", "resident", "rows=8", 1.0),
        plan("forward", "resident", "rows=4", 0.5, status="red"),
        plan("training", "resident", "", 6.0, chosen=True),
        plan("training", "streamed", "cores=fma", 3.0),
    ]
    assert found(write(tmp_path / "b", *lines)) == {
        "forward": ("resident", "rows=8"),
        "backward": ("streamed", "cores=fma"),
    }
    # Without a sweep over forward, its time in the regimes counts.
    only = [line for line in lines if line["kind"] != "sweep" or line["mode"] == "training"]
    assert found(write(tmp_path / "b", *only))["backward"] == ("streamed", "cores=fma")


def test_a_choice_that_followed_a_table_counts_with_its_blocks(tmp_path: Path) -> None:
    """Then a row does not say which blocks were timed. A sweep does."""
    calls = {"resident": 1.0, "streamed": 2.0}
    forward = row("forward", calls, "resident", measured=True)
    path = write(tmp_path / "b", rates(), forward)
    assert found(path) == {"forward": ("streamed", "")}
    chosen = plan("forward", "resident", "cores=mma,units=8,rows=8", 1.0, chosen=True)
    path = write(tmp_path / "b", rates(), forward, chosen)
    assert found(path) == {"forward": ("resident", "cores=mma,units=8,rows=8")}


def test_what_a_layer_is(tmp_path: Path) -> None:
    sizes = [STEPS, 4, 8, 64, 16, 2]
    of = {"name": "a", "cell": "lstm_proj", "precision": "tf32", "sizes": sizes}
    path = write(tmp_path / "b", rates(), row("forward", {"streamed": 1.0}, "streamed", **of))
    (entry,) = table.entries([path])
    layer = table.Layer("NVIDIA H200", "lstm_proj", "f32", True, False, 2, 4, 64, 16)
    assert (entry.layer, entry.date) == (layer, "2026-12-01")


@pytest.mark.parametrize("more", [{"name": "x packed"}, {"sizes": [1, 32, 512, 512, 512, 1]}])
def test_rows_that_tell_too_little(tmp_path: Path, more: dict[str, Any]) -> None:
    path = write(tmp_path / "b", rates(), row("forward", {"resident": 1.0}, "resident", **more))
    with pytest.raises(ValueError, match="has no row of 10 steps or more that was timed"):
        table.entries([path])


def test_the_last_run_counts(tmp_path: Path) -> None:
    def run(name: str, regime: str, date: str, T: int = STEPS) -> Path:
        sizes = [T, 32, 512, 512, 512, 1]
        one = row("forward", {regime: 1.0}, regime, sizes=sizes)
        return write(tmp_path / name, rates(date=date), one)

    old, new = run("a", "resident", "2026-12-01"), run("b", "streamed", "2026-12-03")
    longer = run("c", "per_step", "2026-12-01", 5 * STEPS)
    for paths, regime in (
        *(((old, new), "streamed"), ((new, old), "streamed")),
        *(((old, longer), "per_step"), ((longer, old), "per_step")),
    ):
        assert [entry.regime for entry in table.entries(paths)] == [regime]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no row of 10 steps or more that was timed"),
        ([rates(gpu="no GPU")], "must have rows of one GPU with its name, got those of no GPU"),
        ([rates(), rates(gpu="NVIDIA L4")], "got those of NVIDIA H200, NVIDIA L4"),
        ([rates()], "has no row of 10 steps or more that was timed"),
    ],
)
def test_files_that_give_no_table(tmp_path: Path, lines: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.entries([write(tmp_path / "b", *lines)])
    with pytest.raises(ValueError, match="is no file"):
        table.entries([tmp_path / "none"])


def test_a_run_without_rows_is_passed_over(tmp_path: Path) -> None:
    one = write(tmp_path / "a", rates(), row("forward", {"streamed": 1.0}, "streamed"))
    empty = write(tmp_path / "b")
    assert table.entries([one, empty]) == table.entries([one])
    assert table.entries([]) == []


# --- The header ----------------------------------------------------------------------------------


def entries(count: int) -> list[table.Entry]:
    card, cell = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "gru_reset_before"
    choice = "cores=fma,units=1024,rows=1024,exchange=words"
    return [
        table.Entry(
            table.Layer(card, cell, "bf16", False, True, 2, 1 << n, 1 << n, 1 << n),
            *("2026-12-01", 9, "resident", choice),
        )
        for n in range(count)
    ]


def header_compiles(folder: Path, text: str, check: str) -> None:
    (folder / "measured.h").write_text(text)
    shutil.copy(ROOT / "csrc" / "cuda" / "measurement.h", folder)
    source = folder / "a.cpp"
    source.write_text(f'#include "measured.h"\nusing namespace fusedrnn::cuda;\n{check}\n')
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_header_is_c_plus_plus_in_our_format(tmp_path: Path, count: int) -> None:
    text = table.header(entries(count))
    assert max(map(len, text.splitlines())) <= 100
    check = f"static_assert(kMeasured.size() == {count});"
    if count:
        check += 'static_assert(kMeasured[0].card == "NVIDIA RTX PRO 6000 Blackwell Workstation '
        check += 'Edition" && kMeasured[0].backward && !kMeasured[0].tf32 && kMeasured[0].D == 2'
        check += ' && kMeasured[0].regime == "resident");'
    header_compiles(tmp_path, text, check)
    tool = Path(sys.executable).parent / "clang-format"
    if tool.exists():
        done = subprocess.run(
            [tool, "--assume-filename", ROOT / "csrc" / "cuda" / "measured.h"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == text


def test_the_header_that_is_checked_in_is_that_of_the_kept_runs() -> None:
    paths = sorted(RESULTS.glob("gpu-*/bench.jsonl"))
    text = (ROOT / "csrc" / "cuda" / "measured.h").read_text()
    assert text == table.header(table.entries(paths))


def run(arguments: Sequence[str]) -> int:
    return program.main(["choices", *arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward = row("forward", {"streamed": 1.5, "resident": 2.0}, "resident")
    path, out = write(tmp_path / "b", rates(), forward), tmp_path / "measured.h"
    assert run([str(path), "--table", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 1 layers\n"
    assert out.read_text() == table.header(table.entries([path]))
    layer = '"lstm", "bf16", false, false, 1, 32, 512, 512, "streamed", ""'
    assert f'    {{"NVIDIA H200", "2026-12-01", {layer}}},\n' in out.read_text()
    assert run([str(path), str(path)]) == 0
    assert capsys.readouterr().out.count("# NVIDIA H200, 2026-12-01") == 2
    with pytest.raises(SystemExit, match="is no file"):
        run([str(tmp_path / "none"), "--table", str(out)])

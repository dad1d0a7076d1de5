"""tools.gpu: processes with limits, the seconds of a run, and the files that it writes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import process, run
from tools.gpu.run import LEAST, Clock, Run
from tools.gpu.tasks import SPIN_LIMIT


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def is_alive(pid: int) -> bool:
    """Whether a process still runs. It gets 5 seconds to end, because a kill takes a moment.

    A zombie, which has ended and waits for its parent, does not run.
    """
    for _ in range(100):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.05)
    return True


# --- Processes -----------------------------------------------------------------------------------


def test_a_program_that_ends() -> None:
    lines: list[str] = []
    program = "import sys, os; print('one'); print('two'); print(os.environ['A'], file=sys.stderr)"
    done = process.run(python(program), 30, lines.append, {"A": "3"})
    assert done.ok
    assert (done.code, done.why) == (0, "")
    assert lines == done.out.text == ["one", "two"]
    assert done.err.text == ["3"]


@pytest.mark.parametrize(
    ("program", "code", "why"),
    [
        ("import sys; sys.exit(7)", 7, "exit 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, "died of SIGSEGV"),
    ],
)
def test_a_program_that_fails(program: str, code: int, why: str) -> None:
    done = process.run(python(f"print('last words', flush=True); {program}"), 30)
    assert (done.code, done.why) == (code, why)
    assert done.out.text == ["last words"]


def test_a_program_that_is_not_there() -> None:
    done = process.run(["no-such-program"], 30)
    assert done.code is None
    assert done.why.startswith("did not start: ")
    assert "no-such-program" in done.why


IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@pytest.mark.parametrize("before", ["", IGNORES], ids=["heeds SIGTERM", "ignores it"])
def test_a_program_that_hangs_is_gone_with_its_children(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.5)
    program = before + (
        "import subprocess, time; child = subprocess.Popen(['sleep', '600']); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    done = process.run(python(program), 3)
    assert done.why == "out of time after 3 s"
    (child,) = map(int, done.out.text)
    assert not is_alive(child)


def test_a_child_that_keeps_the_pipe_open_does_not_hold_up_the_step() -> None:
    program = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    done = process.run(python(program), 60)
    assert done.ok
    assert not is_alive(int(done.out.text[0]))


def test_the_beginning_and_the_end_of_long_output_are_kept() -> None:
    done = process.run(python("for i in range(100_000): print('line', i)"), 60)
    assert done.ok
    assert done.out.kept <= process.KEPT_BYTES
    text = done.out.as_text()
    assert text.startswith("line 0\nline 1\n")
    assert text.endswith("line 99998\nline 99999\n")
    assert f"[{done.out.left_out} bytes left out" in text
    assert len(text) < process.KEPT_BYTES + 1000
    whole = sum(len(f"line {i}\n") for i in range(100_000))
    assert done.out.kept + done.out.left_out == whole


def test_a_line_without_an_end_is_cut() -> None:
    done = process.run(python("print('x' * 5_000_000, end='')"), 60)
    assert done.ok
    assert all(len(line) < process.LONGEST_LINE + 100 for line in done.out.text)
    assert "characters left out]" in done.out.text[0]


def test_output_that_is_not_utf_8() -> None:
    done = process.run(python("import os; os.write(1, b'\\xff\\n')"), 30)
    assert done.out.text == ["\ufffd"]


# --- The seconds of a run ------------------------------------------------------------------------


def test_seconds_that_a_step_is_granted() -> None:
    now = 100.0
    clock = Clock(400, lambda: now)
    assert clock.grant(60) == 60
    assert clock.grant(1000) == 400
    assert clock.grant(300, keep=150) == 250
    now += 250
    assert clock.elapsed() == 250
    assert clock.left() == 150
    assert clock.grant(60, keep=150) == 0
    assert clock.grant(60, keep=150 - LEAST) == LEAST
    assert clock.grant(60, keep=151 - LEAST) == 0
    now += 200
    assert clock.left() == -50
    assert clock.grant(60) == 0


def read(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "run.json").read_text())
    assert isinstance(found, dict)
    return found


def test_everything_is_written_after_each_step(tmp_path: Path) -> None:
    seen: list[int] = []
    this = Run(tmp_path, 100, {"quick": True})
    assert read(tmp_path)["steps"] == []
    peek = f"import json; print(len(json.load(open({str(tmp_path / 'run.json')!r}))['steps']))"
    for _ in range(3):
        done = this.step("look", 30, python(peek))
        assert done
        seen.append(int(done.out.text[0]))
    assert seen == [0, 1, 2]
    assert [step["result"] for step in read(tmp_path)["steps"]] == ["ok"] * 3
    assert read(tmp_path)["settings"] == {"quick": True}


def test_how_steps_end_is_printed_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    this = Run(tmp_path, 1000, {})
    this.step("fails", 30, python("print('out'); raise ValueError('why it failed')"))
    this.step("no time", 30, python(""), keep=1000)
    this.step("fine", 30, python("for i in range(9): print(i)"), lines=3, into="profile.txt")
    results = [(s["name"], s["result"], s["why"]) for s in read(tmp_path)["steps"]]
    assert results[0] == ("fails", "failed", "exit 1")
    assert results[1][:2] == ("no time", "not run")
    assert "1000 kept for later steps" in results[1][2]
    assert results[2] == ("fine", "ok", "")
    said = capsys.readouterr().out
    assert "   out\n   | out\n" not in said  # a failed step's last lines follow its result, once
    assert "== fails: failed: exit 1, " in said
    assert "   | ValueError: why it failed" in said
    assert "   0\n   1\n   2\n== fine: ok" in said
    assert (tmp_path / "summary.txt").read_text() == said
    log = (tmp_path / "log.txt").read_text()
    assert "== fails (30 s): " in log
    assert "Traceback" in log
    assert "".join(f"{i}\n" for i in range(9)) in log
    assert "8\n" in (tmp_path / "profile.txt").read_text()
    assert [step.name for step in this.failed()] == ["fails"]


def test_a_step_that_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    this = Run(tmp_path, 60, {})
    begin = time.monotonic()
    this.step("hangs", LEAST, python("import time; print('x', flush=True); time.sleep(600)"))
    this.step("goes on", 30, python("print('here')"))
    assert time.monotonic() - begin < 40
    assert [s["why"] for s in read(tmp_path)["steps"]] == [f"out of time after {LEAST:.0f} s", ""]


def test_the_log_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOG_BYTES", 1000)
    this = Run(tmp_path, 60, {})
    for _ in range(3):
        this.step("much", 30, python("print('x' * 900)"), lines=0)
    assert (tmp_path / "log.txt").stat().st_size == 1000


def test_results_of_another_run_are_not_touched(tmp_path: Path) -> None:
    Run(tmp_path / "out", 60, {})
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in before} == {
        *("run.json", "summary.txt", "log.txt", "checks.jsonl", "bench.jsonl")
    }
    with pytest.raises(FileExistsError, match="a new or an empty folder"):
        Run(tmp_path / "out", 60, {})
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_run_that_is_stopped_records_its_step(tmp_path: Path) -> None:
    this = Run(tmp_path, 60, {})

    def stopped(*_: Any) -> None:
        raise SystemExit("stopped by SIGTERM")

    before = signal.signal(signal.SIGALRM, stopped)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        program = "import time; print('at work', flush=True); time.sleep(600)"
        with pytest.raises(SystemExit):
            this.step("long", 50, python(program))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (step,) = read(tmp_path)["steps"]
    assert (step["name"], step["result"], step["why"]) == ("long", "failed", "stopped")
    assert "at work" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("raise SystemExit(3)", "unfinished"),
        ("raise SystemExit(1)", "failed"),
        ("print('Device not supported'); raise SystemExit(1)", "not run"),
        ("print('Device not supported')", "ok"),
        ("import time; time.sleep(600)", "unfinished"),
    ],
)
def test_endings_that_are_no_failure(tmp_path: Path, program: str, result: str) -> None:
    this = Run(tmp_path, 60, {})
    endings = ("exit 3", "out of time")
    this.step("a", LEAST, python(program), unfinished=endings, cannot=["not supported"])
    assert [step.result for step in this.steps] == [result]
    assert bool(this.failed()) == (result == "failed")


def test_a_missing_tool_is_reported(tmp_path: Path) -> None:
    this = Run(tmp_path, 60, {})
    assert not this.has_tool("count", "no-such-program")
    assert this.has_tool("count", "sh")
    assert [(s.result, s.why) for s in this.steps] == [
        ("not run", "no-such-program is not on PATH")
    ]


def test_groups_of_steps_can_be_chosen(tmp_path: Path) -> None:
    assert Run(tmp_path / "a", 60, {}).wants("bench")
    chosen = Run(tmp_path / "b", 60, {}, ["bench"])
    assert chosen.wants("bench")
    assert not chosen.wants("ncu")


def test_our_modules_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", SPIN_LIMIT):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts the old value back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    run.prepare_environment(tmp_path)
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}somewhere"
    # A barrier must give up before the supervisor takes its worker for hung.
    assert int(os.environ[SPIN_LIMIT]) < 1 << 27

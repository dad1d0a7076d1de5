"""The rehearsal: everything that runs without a GPU, and steps and tasks that fail on purpose."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import setup_build

from .facts import ROOT
from .results import Fields, lines
from .run import LEAST, Run, python
from .steps import Everything
from .tasks import PLANTED

SECONDS = 1200.0
# Programs that replace NVIDIA's: they run the given command and print the same kind of output.
STAND_INS = ROOT / "tests" / "gpu" / "stand_ins"

# Steps that fail: one hangs, with a child that would outlive it; one dies; one writes too much.
HANGS = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
DIES = "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGABRT)"
FLOODS = "for i in range(300_000): print('line', i, 'x' * 80)"
# Compiles the interpreter, the bindings that use it, and the kernels' PTX.
INTERPRETER = """
import fusedrnn
from tests.kit import torch_device
from tests.kit.bindings import binding, ptx
binding(), ptx(80, clusters=True)
"""


def rehearse(run: Run) -> list[str]:
    """Runs everything and returns what went differently than expected."""
    os.environ["PATH"] = f"{STAND_INS}{os.pathsep}{os.environ['PATH']}"
    everything = Everything(run, "cpu", quick=True, rows="lstm 60,")
    everything.do()
    problems = [f"{s.name}: {s.result}: {s.why}" for s in run.steps if s.result != "ok"]
    problems += _planted_steps(run)
    problems += _planted_tasks(run)
    problems += _interpreter(run)
    return problems


def _planted_steps(run: Run) -> Iterator[str]:
    run.step("planted: hangs", LEAST, [sys.executable, "-c", HANGS])
    run.step("planted: dies", 30, [sys.executable, "-c", DIES])
    run.step("planted: writes too much", 60, [sys.executable, "-c", FLOODS], lines=2)
    run.step("planted: is not there", 30, ["no-such-program"])
    run.step("planted: no time", 30, [sys.executable, "-c", ""], keep=run.clock.seconds)
    wanted = {
        "planted: hangs": ("failed", "out of time after 6 s"),
        "planted: dies": ("failed", "died of SIGABRT"),
        "planted: writes too much": ("ok", ""),
        "planted: is not there": ("failed", "did not start"),
        "planted: no time": ("not run", "kept for later steps"),
    }
    ended = {step.name: step for step in run.steps}
    for name, (result, why) in wanted.items():
        step = ended[name]
        if step.result != result or why not in step.why:
            yield f"{name}: {step.result}: {step.why}"
    size = (run.folder / "log.txt").stat().st_size
    if size > 4 << 20:
        yield f"log.txt has {size} bytes, though of a step no more than 0.6 MB are kept"


def _planted_tasks(run: Run) -> Iterator[str]:
    """If a worker hangs, dies, finds a wrong number or raises, one task fails and is reported."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checks.jsonl"
        tasks = ",".join((*PLANTED, "smoke"))
        arguments = ["--device", "cpu", "--out", str(out), "--tasks", tasks, "--patience", "12"]
        name = "planted: tasks that fail"
        command = python("tools.gpu.check", *arguments, "--quick")
        outcome = run.step(name, 120, command, lines=20)
        found = lines(out)
    if not outcome or outcome.code != 1:
        yield f"{name}: exit {outcome and outcome.code}, not 1"
    ended = {line["task"]: line["ended"] for line in found if "ended" in line}
    wanted = {
        "hang": "lost: hung: 12 s without a word",
        "crash": "lost: died of SIGKILL",
        "wrong": "ok",
        "raise": "ok",
        "products": "ok",
        "smoke": "ok",
    }
    if ended != wanted:
        yield f"{name}: tasks ended as {ended}, not as {wanted}"
    failed = [line for line in found if line.get("result") == "failed"]
    if not _as_planted(failed):
        yield f"{name}: these checks failed: {failed}"


def _as_planted(failed: list[Fields]) -> bool:
    """Whether a wrong number was located and an exception reported, and nothing else failed."""
    if [check["task"] for check in failed] != ["wrong", "wrong", "raise"]:
        return False
    number, place, raised = (check["detail"] for check in failed)
    return (
        "eps in output 0, allowed 200" in number
        and "y [4, 3, 7]: 1 wrong, in [3, 2, 6]..[3, 2, 6]" in place
        and raised == "RuntimeError: a task that raises"
    )


def _interpreter(run: Run) -> Iterator[str]:
    """Runs the same tasks with the CUDA library's host code and its kernels in the interpreter."""
    name = "checks in the interpreter"
    if setup_build.nvcc() is None:
        run.not_run(name, "no nvcc: kernels cannot be compiled")
        return
    built = run.step("the interpreter is built", 300, [sys.executable, "-c", INTERPRETER])
    if not built or not built.ok:
        yield f"{name}: the interpreter cannot be built"
        return
    out = run.folder / "checks.jsonl"
    arguments = ["--device", "interpreter", "--out", str(out), "--patience", "120", "--quick"]
    arguments += ["--seconds", "300", "--tasks", "smoke,parity,sections,choices"]
    outcome = run.step(name, 310, python("tools.gpu.check", *arguments), lines=60)
    if not outcome or not outcome.ok:
        yield f"{name}: {outcome.why if outcome else 'not begun'}"
    kernels = [c for c in lines(out) if c.get("section") == "kernels"]
    if [check["result"] for check in kernels] != ["passed"]:
        yield f"{name}: not every kernel has run: {kernels}"

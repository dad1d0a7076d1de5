"""Runs steps one after another, each in its own process with its own time limit.

The results of a step are in the folder before the next step begins, so that nothing is lost if the
run is cut off. The folder has eight files at most:

    run.json         the machine, and how each step ended
    summary.txt      the lines that were printed
    log.txt          all output of all steps
    checks.jsonl     each check
    bench.jsonl      each timing
    profile.txt      torch's profiler, and ncu
    sanitizer.txt    NVIDIA's compute-sanitizer
    report.md        the report, which report.py makes
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import process
from .tasks import SPIN_LIMIT

# A step is not begun with fewer seconds than this.
LEAST = 6.0
# The largest size of the log: it must be small enough to be copied from any machine.
LOG_BYTES = 12 << 20
WIDEST = 240
# Lines of standard error that do not explain an error.
NOISE = re.compile(r"^\s*$|^frame #|registered at|^ {2,}|^\[W|Warning")


class Clock:
    """Measures the seconds of a run, and decides how many of them a step gets.

    Args:
        seconds: the time of the whole run.
        now: returns the time; tests pass another function.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begin = now()
        self.seconds = seconds

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._now() - self._begin

    def left(self) -> float:
        """Seconds until the run must be over."""
        return self.seconds - self.elapsed()

    def grant(self, limit: float, keep: float = 0.0) -> float:
        """The seconds for a step that wants `limit` and leaves `keep`, or 0 if too few."""
        seconds = min(limit, self.left() - keep)
        return seconds if seconds >= LEAST else 0.0


@dataclass
class Step:
    """The result of a step."""

    name: str
    result: str  # "ok", "failed", "unfinished" (time ran out, nothing is wrong) or "not run"
    why: str  # the reason if it is not "ok"
    seconds: float
    limit: float
    last: list[str]  # the last lines of its output


class Run:
    """Runs steps and writes their results.

    Args:
        folder: the folder for the files; it must be new or empty.
        seconds: the time of the whole run.
        settings: the options of the run, which are kept with its results.
        only: the names of the groups of steps to run; all groups if empty.

    Raises:
        FileExistsError: the folder is not empty; it may hold the results of another run.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        settings: Mapping[str, Any],
        only: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.clock = Clock(seconds)
        self.only = only
        self.steps: list[Step] = []
        self.facts: dict[str, Any] = {}
        self.settings = dict(settings)
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._logged = 0
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError("it must be a new or an empty folder")
        for name in ("summary.txt", "log.txt", "checks.jsonl", "bench.jsonl"):
            (folder / name).write_text("")
        self.save()

    def say(self, text: str) -> None:
        """Prints a line and adds it to the summary."""
        line = text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
        print(line, flush=True)
        with (self.folder / "summary.txt").open("a") as out:
            out.write(line + "\n")

    def log(self, text: str) -> None:
        """Adds output to the log, up to the log's limit."""
        room = LOG_BYTES - self._logged
        data = text.encode(errors="replace")[: max(room, 0)]
        self._logged += len(data)
        with (self.folder / "log.txt").open("ab") as out:
            out.write(data)

    def save(self) -> None:
        """Writes run.json as it is now, either completely or not at all."""
        found = {
            "format": 1,
            "started": self.started,
            "seconds": round(self.clock.elapsed(), 1),
            "settings": self.settings,
            "facts": self.facts,
            "steps": [vars(step) for step in self.steps],
        }
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(self.folder / "run.json")

    def wants(self, group: str) -> bool:
        """Whether this run includes a group of steps."""
        return not self.only or group in self.only

    def step(
        self,
        name: str,
        limit: float,
        command: Sequence[str],
        keep: float = 0.0,
        lines: int = 12,
        env: Mapping[str, str] | None = None,
        into: str = "",
        unfinished: Sequence[str] = (),
        cannot: Sequence[str] = (),
    ) -> process.Outcome | None:
        """Runs a command as a step.

        Args:
            name: the name of the step.
            limit: the seconds that it may take, or less if the run has less left.
            command: the program and its arguments.
            keep: the seconds that it leaves to later steps.
            lines: how many lines of its standard output are printed when they come.
            env: environment variables for this step alone.
            into: a file that gets its standard output too.
            unfinished: beginnings of reasons ("exit 3") that mean only that time ran out.
            cannot: texts in the output of a program that cannot work on this machine; such a step
                counts as not run.

        Returns:
            The outcome of the program, or None if it was not begun.
        """
        seconds = self.clock.grant(limit, keep)
        if not seconds:
            left = f"{self.clock.left():.0f} s left"
            self.not_run(name, left + (f", {keep:.0f} kept for later steps" if keep else ""))
            return None
        variables = "".join(f"{key}={value} " for key, value in (env or {}).items())
        self.log(f"\n== {name} ({seconds:.0f} s): {variables}{' '.join(command)}\n")
        said = 0

        def on_line(line: str) -> None:
            nonlocal said
            said += 1
            if said <= lines:
                self.say(f"   {line}")

        begin = self.clock.elapsed()
        out, err = process.Stream(), process.Stream()
        outcome = None
        why = "stopped"
        try:
            outcome = process.run(command, seconds, on_line, env, (out, err))
            why = outcome.why
        finally:  # the step is also recorded if the whole run is stopped
            self.log(out.as_text())
            if err.text:
                self.log(f"-- standard error of {name}:\n{err.as_text()}")
            if into:
                self.keep_output(into, f"== {name}: {' '.join(command)}\n{out.as_text()}")
            last = list(out.last)[-3:]
            if why:
                last += [line for line in err.last if not NOISE.search(line)][-4:]
            result = _result(why, [*out.last, *err.last], unfinished, cannot)
            took = round(self.clock.elapsed() - begin, 1)
            self._close(Step(name, result, why, took, round(seconds, 1), last))
            if why:
                for line in last:
                    self.say(f"   | {line}")
        return outcome

    def not_run(self, name: str, why: str, result: str = "not run") -> None:
        """Records that a step was left out, and why; as failed if nothing can run."""
        self._close(Step(name, result, why, 0.0, 0.0, []))

    def _close(self, step: Step) -> None:
        self.steps.append(step)
        self.save()
        why = f": {step.why}" if step.why else ""
        seconds = f"{step.seconds:.1f} s, {self.clock.left():.0f} s left"
        self.say(f"== {step.name}: {step.result}{why}, {seconds}")

    def keep_output(self, file: str, text: str) -> None:
        """Adds output to one of the run's files."""
        with (self.folder / file).open("a") as out:
            out.write(text if text.endswith("\n") else text + "\n")

    def has_tool(self, step: str, program: str) -> bool:
        """Whether a program is there; if it is not, the step is recorded as not run."""
        if shutil.which(program):
            return True
        self.not_run(step, f"{program} is not on PATH")
        return False

    def failed(self) -> list[Step]:
        """The steps that failed."""
        return [step for step in self.steps if step.result == "failed"]


def _result(why: str, said: Sequence[str], unfinished: Sequence[str], cannot: Sequence[str]) -> str:
    """The result of a step that ended for the reason `why`."""
    if not why:
        return "ok"
    if any(text in line for text in cannot for line in said):
        return "not run"
    return "unfinished" if why.startswith(tuple(unfinished)) else "failed"


def python(module: str, *arguments: str) -> list[str]:
    """Returns a command that runs one of our modules with this Python."""
    return [sys.executable, "-m", module, *arguments]


def prepare_environment(root: Path) -> None:
    """Sets the variables of every step: the path of our modules, few threads, a low spin limit.

    With this limit a barrier that never opens ends in an error with the kernel's name after six
    seconds, by estimate, which is before a worker counts as hung.
    """
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{path}" if path else str(root)
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ.setdefault(SPIN_LIMIT, str(1 << 24))
    os.environ.setdefault("OMP_NUM_THREADS", str(min(8, os.cpu_count() or 1)))

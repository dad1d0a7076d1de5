"""Runs checks on a device and writes the result of each as soon as it is known.

    python -m tools.gpu.check --device cuda --out checks.jsonl --tasks smoke,parity

The supervisor here does not import torch. It gives tasks to a worker process, one at a time. If a
worker hangs, dies or loses its context (after which no call of CUDA works), only its current task
is lost, and another worker continues with the next task. The exit status is 0 if all is right, 1 if
something is wrong, and 3 if nothing is wrong but time ran out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .process import GONE, end_with_parent, ending
from .tasks import DEVICES, Task, tasks_of

RIGHT, WRONG, UNFINISHED = 0, 1, 3
# At most this many failed checks of a task are printed. All are written to the file.
SHOWN = 3
# The numbers of lost workers after which the remaining tasks of their subject (a cell in a regime),
# or of their regime, are left out.
OF_SUBJECT, OF_REGIME = 2, 3


class Lost(Exception):
    """A worker hung or died; the text says which."""


class Worker:
    """A process that does tasks.

    Args:
        device, quick: the options of the command line with these names.
        env: environment variables of the process.
    """

    def __init__(self, device: str, quick: bool, env: Mapping[str, str]) -> None:
        command = [sys.executable, "-u", "-m", "tools.gpu.worker", "--device", device]
        self.env = dict(env)
        self.done = 0
        self.process = subprocess.Popen(
            command + (["--quick"] if quick else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._lines.put(line)
        self._lines.put(None)

    def give(self, task: Task) -> None:
        """Gives the worker a task."""
        assert self.process.stdin
        message = {"kind": task.kind, "options": dict(task.options)}
        with contextlib.suppress(BrokenPipeError):  # it died; next_event reports it
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def next_event(self, seconds: float) -> dict[str, Any]:
        """Returns the next event that the worker reports.

        Raises:
            Lost: there is none within `seconds`, or the process has ended.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                raise Lost(f"hung: {seconds:.0f} s without a word") from None
            if line is None:
                code = self.process.wait()
                raise Lost(ending(code) or "ended before it was done")
            try:
                event = json.loads(line)
            except ValueError:
                print(line, end="", file=sys.stderr)  # a library printed this line
                continue
            assert isinstance(event, dict)
            return event

    def close(self) -> None:
        """Ends the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GONE)


@dataclasses.dataclass
class Tally:
    """Counts of the results so far."""

    passed: int = 0
    failed: int = 0
    not_run: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)  # the labels of tasks
    unreached: list[str] = dataclasses.field(default_factory=list)
    restarts: int = 0

    def count(self, result: str) -> None:
        """Counts one check."""
        name = result.replace(" ", "_")
        setattr(self, name, getattr(self, name) + 1)

    def summary(self) -> str:
        """The counts in a line."""
        counts = f"{self.passed} passed, {self.failed} failed, {self.not_run} not run"
        words = [f"checks: {counts}", f"workers lost: {self.restarts}"]
        if self.wrong:
            words.append(f"tasks with failures: {', '.join(self.wrong)}")
        if self.unreached:
            words.append(f"not reached: {', '.join(self.unreached)}")
        return "; ".join(words)

    def status(self) -> int:
        """The exit status."""
        if self.wrong or self.passed == 0:
            return WRONG
        return UNFINISHED if self.unreached else RIGHT


class Supervisor:
    """Gives tasks to workers.

    Args:
        options: the options of the command line.
        out: the file that gets a line of JSON for each check, and for each task that ended.
    """

    def __init__(self, options: argparse.Namespace, out: IO[str]) -> None:
        self.options = options
        self.out = out
        self.end = time.monotonic() + options.seconds
        self.tally = Tally()
        self.worker: Worker | None = None
        self._lost: collections.Counter[Any] = collections.Counter()

    def run(self, tasks: Sequence[Task]) -> Tally:
        """Runs all tasks for which there is time."""
        try:
            for task in tasks:
                if time.monotonic() >= self.end or self.tally.restarts > self.options.restarts:
                    self._leave_out(task)
                elif why := self._why_leave_alone(task):
                    self._end_task(task, f"left alone: {why}", 0.0)
                else:
                    self._do(task)
        finally:
            self.close()
        return self.tally

    def close(self) -> None:
        """Ends the worker."""
        if self.worker:
            self.worker.close()
            self.worker = None

    def _why_leave_alone(self, task: Task) -> str:
        if task.subject and self._lost[task.subject] >= OF_SUBJECT:
            return f"it took {OF_SUBJECT} workers"
        if task.regime and self._lost[task.regime] >= OF_REGIME:
            return f"the {task.regime} regime took {OF_REGIME} workers"
        return ""

    def _count_loss(self, task: Task) -> None:
        self.tally.restarts += 1
        self._lost[task.subject] += 1
        self._lost[task.regime] += 1

    def _write(self, **fields: Any) -> None:
        self.out.write(json.dumps(fields) + "\n")
        self.out.flush()

    def _wait(self, worker: Worker, patience: float) -> dict[str, Any]:
        """The worker's next event. If the run's time ends first, the text of Lost says so."""
        left = self.end - time.monotonic()
        try:
            return worker.next_event(min(patience, max(left, 0.01)))
        except Lost:
            if time.monotonic() >= self.end:
                raise Lost("out of time") from None
            raise

    def _do(self, task: Task) -> None:
        begin, before = time.monotonic(), self.tally.failed
        try:
            worker = self._worker_for(task)
            worker.give(task)
            worker.done += 1
            while (event := self._wait(worker, self.options.patience))["event"] == "check":
                self._take(task, event, before)
        except Lost as loss:
            self.close()
            if str(loss) == "out of time":
                self._leave_out(task)
                return
            self._count_loss(task)
            self._end_task(task, f"lost: {loss}", time.monotonic() - begin)
            return
        why = ""
        if event["lost"]:
            self.close()
            if not task.loses_context:
                self._count_loss(task)
                why = f"the context is lost: {event['lost']}"
        self._end_task(task, why, time.monotonic() - begin, self.tally.failed - before)

    def _worker_for(self, task: Task) -> Worker:
        """Returns the current worker, or a new one if there is none or the task needs one."""
        worker = self.worker
        if worker and (worker.env != dict(task.env) or (task.fresh and worker.done)):
            self.close()
            worker = None
        if worker is None:
            worker = self.worker = Worker(self.options.device, self.options.quick, task.env)
            self._wait(worker, self.options.start)
        return worker

    def _take(self, task: Task, event: dict[str, Any], before: int) -> None:
        self.tally.count(event["result"])
        self._write(task=task.label, **{k: v for k, v in event.items() if k != "event"})
        if event["result"] == "failed" and self.tally.failed - before <= SHOWN:
            print(
                f"FAILED {event['section']}: {event['name']}: {event['detail'][:200]}", flush=True
            )

    def _end_task(self, task: Task, why: str, seconds: float, failures: int = 0) -> None:
        self._write(task=task.label, ended=why or "ok", seconds=round(seconds, 2))
        if why or failures:
            self.tally.wrong.append(task.label)
        words = [why] if why else []
        words += [f"{failures} failed"] if failures else []
        print(f"{task.label}: {', '.join(words) or 'ok'}, {seconds:.1f} s", flush=True)

    def _leave_out(self, task: Task) -> None:
        self._write(task=task.label, ended="not reached", seconds=0.0)
        self.tally.unreached.append(task.label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.check", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--quick", action="store_true", help="only small sizes")
    parser.add_argument(
        "--out", type=Path, required=True, help="the file to which checks are added"
    )
    parser.add_argument("--tasks", default="smoke,parity,sections,stress", metavar="GROUP,...")
    parser.add_argument("--seconds", type=float, default=240, help="for all tasks")
    parser.add_argument(
        "--patience",
        type=float,
        default=30,
        help="seconds without an event after which a worker hangs",
    )
    parser.add_argument(
        "--start", type=float, default=90, help="seconds that a worker has to start"
    )
    parser.add_argument("--restarts", type=int, default=12, help="workers that may be lost")
    options = parser.parse_args(arguments)
    try:
        tasks = tasks_of(options.tasks.split(","), options.device, options.quick)
    except ValueError as error:
        parser.error(f"--{error}")
    end_with_parent()
    with options.out.open("a") as out:
        supervisor = Supervisor(options, out)

        def stop(*_: object) -> None:
            supervisor.close()
            print(supervisor.tally.summary() + "; stopped", flush=True)
            os._exit(WRONG if supervisor.tally.wrong else UNFINISHED)

        signal.signal(signal.SIGTERM, stop)
        tally = supervisor.run(tasks)
    print(tally.summary(), flush=True)
    return tally.status()


if __name__ == "__main__":
    sys.exit(main())

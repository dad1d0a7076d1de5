"""Runs jobs one after another, each in its own process, and collects their results."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from . import machine
from .results import FORMAT
from .rivals import RIVALS
from .shapes import CELLS, SETS, TIMED, Row, merge, select

# A worker that reports nothing for this many seconds is killed; the limit depends on its kind.
PATIENCE = {"pair": 600, "rival": 300, "memory": 600, "contention": 1800}


@dataclass(frozen=True)
class Options:
    """The options of `python -m benchmarks run`."""

    sets: Sequence[str]
    cells: Sequence[str] = CELLS
    rivals: Sequence[str] = ()
    threads: Sequence[int] = (1, 2)
    rows: str = ""
    seconds: float = 3.0
    isa: str | None = None


@dataclass
class Job:
    """The work of one process."""

    kind: str  # pair, rival, memory or contention
    threads: int
    rows: list[Row]
    seconds: float
    rival: str | None = None
    done: set[tuple[str, str]] = field(default_factory=set)

    @property
    def label(self) -> str:
        """The name of the job in the progress bar."""
        what = self.rival or {"pair": "torch.nn"}.get(self.kind, self.kind)
        return f"{what}, {self.threads} thread{'s' * (self.threads > 1)}"

    def open(self) -> list[tuple[str, str]]:
        """Rows and modes that have no result yet."""
        every = [(row.name, mode) for row in self.rows for mode in row.modes]
        return [key for key in every if key not in self.done]

    def as_json(self) -> str:
        """The text that the worker reads."""
        left = {name for name, _ in self.open()}
        rows = [
            row.as_dict() | {"modes": [mode for name, mode in self.open() if name == row.name]}
            for row in self.rows
            if row.name in left
        ]
        rest = {"kind": self.kind, "threads": self.threads, "seconds": self.seconds}
        return json.dumps(rest | {"rival": self.rival, "rows": rows})


def plan(options: Options) -> tuple[dict[Row, list[str]], list[Job]]:
    """Returns the timed rows with the sets they are in, and the jobs in their order."""

    def rows_of(name: str) -> list[Row]:
        return select(name, options.cells, options.rows)

    timed = merge((name, rows_of(name)) for name in options.sets if name in TIMED)
    jobs = []
    for threads in options.threads:
        rows = list(timed)
        if rows:
            jobs.append(Job("pair", threads, rows, options.seconds))
            jobs += [Job("rival", threads, rows, options.seconds, r) for r in options.rivals]
    most = max(options.threads)
    for name in ("memory", "contention"):
        if name in options.sets and rows_of(name):
            jobs.append(Job(name, most, rows_of(name), options.seconds))
    return timed, jobs


def run(options: Options, show_progress: bool = True) -> dict[str, Any]:
    """Runs everything and returns the content of the result file."""
    if options.isa == "avx2":
        os.environ.update(machine.AVX2)
    sets, jobs = plan(options)
    found: dict[str, Any] = {
        "format": FORMAT,
        "machine": _describe(options.isa),
        "settings": {
            "sets": list(options.sets),
            "threads": list(options.threads),
            "seconds": options.seconds,
            "rivals": list(options.rivals),
        },
        "rows": [],
        "rivals": [],
        "rival_versions": {},
        "rates": {},
        "memory": [],
        "contention": [],
    }
    total = sum(len(row.modes) for job in jobs for row in job.rows)
    with tqdm(total=total, unit="row", disable=not show_progress, dynamic_ncols=True) as bar:
        try:
            for job in jobs:
                if job.rival:
                    # A rival runs only rows for which our time is known.
                    job.done |= set(job.open()) - _timed(found, job.threads)
                for event in _events(job):
                    if event["event"] == "start":
                        bar.set_description_str(f"{job.label}: {event['row']} {event['mode']}")
                        continue
                    _store(found, sets, job, event)
                    bar.n = sum(len(job.done) for job in jobs)
                    bar.refresh()
        except KeyboardInterrupt:
            found["interrupted"] = True
    found["machine"] |= {"load_after": list(os.getloadavg()), "finished": machine.now()}
    return found


def _timed(found: dict[str, Any], threads: int) -> set[tuple[str, str]]:
    """Returns the rows and modes in which our layer was timed with `threads` threads."""
    rows = (row for row in found["rows"] if (row["threads"], row["status"]) == (threads, "ok"))
    return {(row["name"], row["mode"]) for row in rows}


def _store(
    found: dict[str, Any], sets: dict[Row, list[str]], job: Job, event: dict[str, Any]
) -> None:
    """Puts an event where it belongs in the file."""
    kind = event.pop("event")
    if kind == "rates":
        found["rates"][str(job.threads)] = event
    elif kind == "version":
        found["rival_versions"][job.rival] = event["version"]
    elif kind == "absent":
        found["rival_versions"][job.rival] = None
    else:
        name = event.pop("row")
        row = next(row for row in job.rows if row.name == name)
        if job.kind == "rival":
            names = {"rival": job.rival, "row": row.name}
            found["rivals"].append(names | {"threads": job.threads} | event)
        else:
            fields = row.as_dict() | {"sets": sets.get(row, []), "threads": job.threads}
            fields.pop("modes")
            found["rows" if job.kind == "pair" else job.kind].append(fields | event)


def _events(job: Job) -> Iterator[dict[str, Any]]:
    """Yields the events of a job.

    If the process dies or hangs, its row has failed, and a new process runs the rows after it.
    """
    while job.open():
        current: dict[str, Any] | None = None
        with _Worker(job) as worker:
            for event in worker.events(PATIENCE[job.kind]):
                current = event if event["event"] == "start" else None
                if event["event"] == "result":
                    job.done.add((event["row"], event["mode"]))
                elif event["event"] == "absent":
                    job.done |= set(job.open())
                yield event
            if worker.ended_well():
                return
            why = worker.why()
        # A process that dies outside of a row would die again, so all remaining rows have failed.
        left = [current] if current else [{"row": n, "mode": m} for n, m in job.open()]
        for names in left:
            job.done.add((names["row"], names["mode"]))
            yield names | {"event": "result", "status": "failed", "why": why}


class _Worker:
    """A process that runs a job. It has its own session, so that its children end with it."""

    def __init__(self, job: Job) -> None:
        """Starts the process."""
        number = str(job.threads)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), number)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self.late = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "worker"],
            cwd=machine.ROOT,
            env=os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(job.as_json())
        self.process.stdin.close()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()

    def events(self, patience: float) -> Iterator[dict[str, Any]]:
        """Yields what the process reports, until it ends or is silent for too long."""
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert self.process.stdout is not None
            with self.process.stdout as out:
                for line in out:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        self.patience = patience
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                self.late = True
                return
            if line is None:
                return
            yield json.loads(line)

    def ended_well(self) -> bool:
        """Whether the process has ended with success."""
        return not self.late and self.process.wait() == 0

    def why(self) -> str:
        """Says in one line what went wrong."""
        if self.late:
            return f"no result after {self.patience:.0f} s"
        self.errors.seek(0)
        last = [line for line in self.errors.read().splitlines() if line.strip()][-1:]
        code = self.process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return ": ".join([how, *last])[:300]


def _describe(isa: str | None) -> dict[str, Any]:
    """Describes the machine as a worker sees it.

    A new process does it if `isa` is given, because this process has chosen its kernels already.
    """
    if isa is None:
        return machine.describe()
    command = [sys.executable, "-m", "benchmarks", "machine"]
    result = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    described: dict[str, Any] = json.loads(result.stdout)
    return described


def known_rivals(names: Sequence[str]) -> list[str]:
    """Returns the rivals of --rivals that run in separate processes: all but torch."""
    for name in names:
        if name != "torch" and name not in RIVALS:
            raise ValueError(f"rivals must be of torch, {', '.join(RIVALS)}, got {name!r}")
    return [name for name in names if name != "torch"]


def known_sets(names: Sequence[str]) -> list[str]:
    """Checks the names of --set and returns them."""
    for name in names:
        if name not in SETS:
            raise ValueError(f"set must be of {', '.join(SETS)}, got {name!r}")
    return list(names)

"""Runs one program with limits: on its time, on what is kept of its output, on its children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

# Bytes of each stream that are kept from its beginning, and lines from its end.
KEPT_BYTES = 600_000
KEPT_LINES = 200
LONGEST_LINE = 2000
# Seconds that a program has between being asked to end and being ended, and that its pipes have
# to run dry after it.
GRACE = 3.0
# Seconds in which a program that was ended must be gone; one that hangs in a driver is left.
GONE = 10.0
PR_SET_PDEATHSIG = 1


@dataclass
class Stream:
    """What a program wrote: the beginning, the last lines, and how much that leaves out."""

    text: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    kept: int = 0
    left_out: int = 0

    def add(self, line: str) -> None:
        """Takes one line, without its end."""
        if len(line) > LONGEST_LINE:
            line = f"{line[:LONGEST_LINE]} [{len(line) - LONGEST_LINE} characters left out]"
        if self.kept + len(line) <= KEPT_BYTES:
            self.text.append(line)
            self.kept += len(line) + 1
        else:
            self.left_out += len(line) + 1
        self.last.append(line)

    def as_text(self) -> str:
        """All that is kept, and what was left out in between."""
        text = "".join(f"{line}\n" for line in self.text)
        if self.left_out:
            text += f"[{self.left_out} bytes left out; the last lines:]\n"
            text += "".join(f"{line}\n" for line in list(self.last)[-20:])
        return text


@dataclass
class Outcome:
    """How a program ended."""

    code: int | None  # exit status; below zero a signal's number; None where it did not start
    why: str  # "" where it ended by itself with 0
    seconds: float
    out: Stream
    err: Stream

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with 0."""
        return self.why == ""


def run(
    command: Sequence[str],
    seconds: float,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    streams: tuple[Stream, Stream] | None = None,
) -> Outcome:
    """Runs a program for at most `seconds`; it and all that it started are gone afterwards.

    Args:
        command: program and arguments; no shell reads them.
        seconds: after these it is asked to end (SIGTERM), and ended a little later.
        on_line: is given each line of standard output when it comes.
        env: variables beside those of this process.
        streams: get what it writes, for a caller that wants it even where this call is interrupted.
    """
    begin = time.monotonic()
    out, err = streams or (Stream(), Stream())
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(None, f"did not start: {error}", 0.0, out, err)

    def take(line: str) -> None:
        out.add(line)
        if on_line:
            on_line(line)

    readers = [
        threading.Thread(target=_read, args=(pipe, to), daemon=True)
        for pipe, to in ((process.stdout, take), (process.stderr, err.add))
    ]
    for reader in readers:
        reader.start()
    why = ""
    try:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            why = f"out of time after {seconds:.0f} s"
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    finally:
        # Also where this process is being ended: nothing it started may outlive it.
        _signal(process, signal.SIGKILL)
        try:
            code = process.wait(GONE)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
            why += "; it cannot be ended"
        for reader in readers:
            reader.join(GRACE)
    return Outcome(code, why or ending(code), time.monotonic() - begin, out, err)


def end_with_parent() -> None:
    """Ends this process when the one that started it ends: nothing may be left on the GPU.

    By Linux's rule that is when the thread that started it ends. So it is for what our own programs
    start from their main thread, and not for what runs under ncu or the sanitizer.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ending(code: int) -> str:
    """An exit status in words; "" for 0."""
    if code == 0:
        return ""
    if code > 0:
        return f"exit {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _read(pipe: IO[bytes] | None, take: Callable[[str], None]) -> None:
    """Hands on a pipe's lines, of which a long one is cut while it comes."""
    assert pipe is not None
    with pipe:
        while line := pipe.readline(1 << 16):
            take(line.decode(errors="replace").rstrip("\r\n"))

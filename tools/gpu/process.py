"""Runs one program with limits on its time and on the kept output, and ends its children."""

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

# How many bytes from the beginning of each stream are kept, and how many lines from its end.
KEPT_BYTES = 600_000
KEPT_LINES = 200
LONGEST_LINE = 2000
# A program has this many seconds between SIGTERM and SIGKILL, and afterwards its pipes have as many
# seconds to deliver the rest.
GRACE = 3.0
# A killed program must be gone in this many seconds; if it hangs in a driver, it is left.
GONE = 10.0
PR_SET_PDEATHSIG = 1


@dataclass
class Stream:
    """The output of a program: its beginning, its last lines, and the size of the rest."""

    text: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    kept: int = 0
    left_out: int = 0

    def add(self, line: str) -> None:
        """Adds one line, given without its newline."""
        if len(line) > LONGEST_LINE:
            line = f"{line[:LONGEST_LINE]} [{len(line) - LONGEST_LINE} characters left out]"
        if self.kept + len(line) <= KEPT_BYTES:
            self.text.append(line)
            self.kept += len(line) + 1
        else:
            self.left_out += len(line) + 1
        self.last.append(line)

    def as_text(self) -> str:
        """The text that is kept, with a note about the part that was left out."""
        text = "".join(f"{line}\n" for line in self.text)
        if self.left_out:
            text += f"[{self.left_out} bytes left out; the last lines:]\n"
            text += "".join(f"{line}\n" for line in list(self.last)[-20:])
        return text


@dataclass
class Outcome:
    """How a program ended."""

    code: int | None  # exit status; a signal's number if negative; None if it did not start
    why: str  # "" if it ended by itself with 0
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
    """Runs a program for at most `seconds`, and ends it and its children afterwards.

    Args:
        command: the program and its arguments; no shell reads them.
        seconds: after this time the program gets SIGTERM, and a little later SIGKILL.
        on_line: is called with each line of standard output when it comes.
        env: environment variables in addition to those of this process.
        streams: get the output, for a caller that needs it even if this call is interrupted.
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
        # This also runs while this process is being ended, so that no child outlives it.
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
    """Makes this process end when its parent ends, so that nothing is left on the GPU.

    On Linux this happens when the thread that started the process ends. So only programs that our
    own programs start from their main thread call this, not those that ncu or the sanitizer start.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ending(code: int) -> str:
    """Describes an exit status; returns "" for 0."""
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
    """Passes on a pipe's lines; a long line is cut into several."""
    assert pipe is not None
    with pipe:
        while line := pipe.readline(1 << 16):
            take(line.decode(errors="replace").rstrip("\r\n"))

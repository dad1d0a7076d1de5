"""Runs command lines whose output another program may stop reading: `python -m fusedrnn | head`."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["run"]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and ends the process with its exit status.

    If the program that reads the output has ended, the process ends without a message.
    """
    status: int | None
    try:
        try:
            status = main()
        finally:  # also if main calls sys.exit()
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            raise  # another pipe was broken
        # Python flushes once more at exit, and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # a shell's exit status for a program that SIGPIPE (13) ended: 128 + 13
    sys.exit(status)

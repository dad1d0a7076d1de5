"""Runs command lines whose output another program may stop reading: `python -m fusedrnn | head`."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["run"]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit status of `main`, quietly if its output is not read."""
    status: int | None
    try:
        try:
            status = main()
        finally:  # after sys.exit() too
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            raise  # it was another pipe
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # what a shell says of a program that the signal for this has ended
    sys.exit(status)

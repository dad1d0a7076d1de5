"""Runs a function that may crash or hang in a forked child, and says how it ended."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable


def outcome(body: Callable[[], object], seconds: int = 60) -> str:
    """Run body in a forked child and return how it ended.

    Returns:
        "ok", "<type of exception>: <message>", "killed by SIGSEGV" or another signal's name, or
        "hangs" if it takes longer than `seconds`.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork while other threads run, which some tests do on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        said = "ok"
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            body()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode()[:4000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return text
    number = os.WTERMSIG(status)
    return "hangs" if number == signal.SIGALRM else f"killed by {signal.Signals(number).name}"

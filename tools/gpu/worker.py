"""Runs tasks for tools.gpu.check: reads a line of JSON for each task and writes lines of JSON.

Everything that libraries print on standard output goes to standard error instead. If the GPU's
context is lost, the worker reports it and ends, since no call of CUDA in it can work again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, TextIO

from .process import end_with_parent
from .tasks import DEVICES, regimes_of

if TYPE_CHECKING:
    import torch

LONGEST_DETAIL = 1500


class Told(list[Any]):
    """The list of a report's checks, which reports each check as soon as it is added."""

    def __init__(self, channel: TextIO) -> None:
        super().__init__()
        self.channel = channel

    def append(self, check: Any) -> None:
        """Adds a check and reports it."""
        super().append(check)
        say(
            self.channel,
            event="check",
            section=check.section,
            name=check.name,
            result=check.result,
            detail=check.detail[:LONGEST_DETAIL],
        )


def say(channel: TextIO, **event: Any) -> None:
    """Writes one event."""
    channel.write(json.dumps(event) + "\n")
    channel.flush()


def why_lost(device: torch.device) -> str:
    """The reason why a device no longer computes, or "" if it does."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        torch.zeros(8, device=device).add_(1).sum().item()
    except Exception as error:
        return str(error).splitlines()[0][:200]
    return ""


def work(channel: TextIO, device_name: str, quick: bool) -> int:
    """Runs tasks until there are no more."""
    import torch

    from fusedrnn import _selftest_cases as cases
    from fusedrnn import selftest
    from fusedrnn._selftest_report import Check

    from . import checks
    from .interpreter import Context, Interpreted, interpreted

    torch.set_num_threads(min(8, torch.get_num_threads()))
    with contextlib.ExitStack() as stack:
        device, kind = torch.device("cpu"), selftest.Selftest
        if device_name == "cuda":
            device = torch.device("cuda", 0)
            torch.zeros(1, device=device)
        elif device_name == "interpreter":
            kind = Interpreted
            Context.interpreter = stack.enter_context(interpreted())
        say(channel, event="ready")
        for line in sys.stdin:
            task = json.loads(line)
            options = task["options"]
            regime = options.get("regime", "")
            regimes = [regime] if regime else regimes_of(device_name)
            test = kind(device, quick, regimes)
            test.report.checks = Told(channel)
            # If the task does not ask for a regime, the library chooses.
            only = "per_step" if regime == "per_step" else ""
            try:
                with cases.asking_for(only), cases.float32_products(tf32=False):
                    checks.do(task["kind"], test, options)
            except Exception as error:  # any error, because the other tasks must still run
                traceback.print_exc()
                text = "".join(traceback.format_exception_only(type(error), error)).strip()
                test.report.checks.append(Check(task["kind"], "outside of a check", "failed", text))
            lost = why_lost(device)
            say(channel, event="end", lost=lost)
            if lost:
                channel.flush()
                os._exit(3)
    return 0


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.worker", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    end_with_parent()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return work(channel, options.device, options.quick)


if __name__ == "__main__":
    sys.exit(main())

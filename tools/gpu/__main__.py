"""The command line: run, dry, report, keep."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from . import dry, keep, report
from .facts import ROOT
from .results import load
from .run import Run, prepare_environment
from .steps import GROUPS, Everything


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description="One run on a GPU; docs/gpu-run.md says how."
    )
    commands = parser.add_subparsers(required=True, metavar="run|dry|report|keep")

    run = commands.add_parser("run", help="check, time and profile everything on the GPU here")
    run.set_defaults(command=_run)
    run.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets the results")
    run.add_argument("--seconds", type=float, default=400, help="of all; default: %(default)s")
    run.add_argument(
        "--steps", default="", metavar="GROUP,...", help=f"of {', '.join(GROUPS)}; default: all"
    )
    run.add_argument("--tasks", default="", metavar="GROUP,...", help="of the checks, these alone")
    run.add_argument("--rows", default="", metavar="TEXT", help="time rows with TEXT in the name")
    run.add_argument("--quick", action="store_true", help="small sizes, few rows")
    run.add_argument("--keep", action="store_true", help="and do what `keep` does, in the end")

    rehearse = commands.add_parser("dry", help="all of it that needs no GPU, and planted faults")
    rehearse.set_defaults(command=_dry)
    rehearse.add_argument("--out", type=Path, required=True, metavar="FOLDER")

    again = commands.add_parser("report", help="make report.md of a folder again, and print it")
    again.set_defaults(command=_report)
    again.add_argument("folder", type=Path)

    kept = commands.add_parser("keep", help="copy results to benchmarks/results, rewrite the docs")
    kept.set_defaults(command=_keep)
    kept.add_argument("folder", type=Path, nargs="?", help="where they are; default: nothing new")
    kept.add_argument("--check", action="store_true", help="write nothing; 1 if the docs are old")
    return parser


def _begin(options: argparse.Namespace, seconds: float, only: list[str]) -> Run:
    os.chdir(ROOT)
    prepare_environment(ROOT)
    settings = {key: str(value) for key, value in vars(options).items() if key != "command"}
    run = Run(options.out, seconds, settings, only)

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    return run


def _run(options: argparse.Namespace) -> int:
    only = [name for name in options.steps.split(",") if name]
    if unknown := sorted(set(only) - set(GROUPS)):
        raise SystemExit(f"error: --steps must be of {', '.join(GROUPS)}, got {unknown[0]!r}")
    options.out = options.out.resolve()
    run = _begin(options, options.seconds, only)
    everything = Everything(run, "cuda", options.quick, options.tasks, options.rows)
    try:
        everything.do()
    finally:  # also where it is stopped
        run.save()
        found = report.write(run.folder)
        print("\n" + report.final_table(found), flush=True)
    if options.keep:
        print(f"kept in {keep.keep(run.folder)}")
    return int(bool(run.failed()) or everything.wrong)


def _dry(options: argparse.Namespace) -> int:
    options.out = options.out.resolve()
    begin = time.monotonic()
    problems = dry.rehearse(_begin(options, dry.SECONDS, []))
    found = report.write(options.out)
    print("\n" + report.final_table(found), flush=True)
    for problem in problems:
        print(f"not as it should be: {problem}")
    seconds = time.monotonic() - begin
    print(f"dry run: {len(problems)} things not as they should be, {seconds:.0f} s")
    return int(bool(problems))


def _report(options: argparse.Namespace) -> int:
    try:
        report.write(options.folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print((options.folder / "report.md").read_text())
    return 0


def _keep(options: argparse.Namespace) -> int:
    try:
        if options.folder:
            load(options.folder)
            if options.check:
                raise ValueError("--check goes without a folder")
            print(f"kept in {keep.keep(options.folder)}")
            return 0
        return keep.write_docs(check=options.check)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    options = _parser().parse_args()
    sys.exit(options.command(options))

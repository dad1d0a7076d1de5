"""The command line: run, dry, report, keep, choices."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import choices, dry, keep, report, table
from . import tasks as tasks_module
from .facts import ROOT
from .results import load
from .run import LEAST, Run, prepare_environment
from .steps import GROUPS, Everything

MOST = 36_000.0


def _seconds(text: str) -> float:
    """Reads a number of seconds that is long enough for a run."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST <= seconds <= MOST:
        raise argparse.ArgumentTypeError(f"must be from {LEAST:.0f} to {MOST:.0f}, got {text!r}")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description="One run on a GPU; docs/gpu-run.md says how."
    )
    commands = parser.add_subparsers(required=True, metavar="run|dry|report|keep|choices")

    run = commands.add_parser("run", help="check, time and profile everything on the GPU here")
    run.set_defaults(command=_run)
    run.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty; gets the results"
    )
    run.add_argument(
        "--seconds", type=_seconds, default=400.0, help="for all; default: %(default)s"
    )
    run.add_argument(
        "--steps", default="", metavar="GROUP,...", help=f"of {', '.join(GROUPS)}; default: all"
    )
    run.add_argument("--tasks", default="", metavar="GROUP,...", help="only these of the checks")
    run.add_argument("--rows", default="", metavar="TEXT", help="time rows with TEXT in the name")
    run.add_argument("--quick", action="store_true", help="small sizes, few rows")
    run.add_argument("--keep", action="store_true", help="at the end, do what `keep` does")

    rehearse = commands.add_parser("dry", help="all of it that needs no GPU, and planted faults")
    rehearse.set_defaults(command=_dry)
    rehearse.add_argument("--out", type=Path, required=True, metavar="FOLDER")

    again = commands.add_parser("report", help="make report.md of a folder again, and print it")
    again.set_defaults(command=_report)
    again.add_argument("folder", type=Path)

    kept = commands.add_parser("keep", help="copy results to benchmarks/results, rewrite the docs")
    kept.set_defaults(command=_keep)
    kept.add_argument("folder", type=Path, nargs="?", help="the folder of results; default: none")
    kept.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the docs are old"
    )

    chosen = commands.add_parser(
        "choices", help="print which regime was fastest for each layer, for rules of the plan"
    )
    chosen.set_defaults(command=_choices)
    chosen.add_argument("file", type=Path, nargs="+", help="bench.jsonl of a folder of results")
    chosen.add_argument(
        "--table",
        type=Path,
        metavar="OUT",
        help="write what was fastest as the plan's table, csrc/cuda/measured.h",
    )
    return parser


def _groups(text: str, known: Sequence[str], option: str) -> list[str]:
    """Reads names that are separated by commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if unknown := [word for word in words if word not in known]:
        raise SystemExit(f"error: {option} must be of {', '.join(known)}, got {unknown[0]!r}")
    return words


def _begin(options: argparse.Namespace, seconds: float, only: list[str]) -> Run:
    options.out = options.out.resolve()
    os.chdir(ROOT)
    prepare_environment(ROOT)
    settings = {key: str(value) for key, value in vars(options).items() if key != "command"}
    try:
        run = Run(options.out, seconds, settings, only)
    except OSError as error:
        raise SystemExit(f"error: --out {options.out}: {error}") from None

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(f"stopped by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return run


def _run(options: argparse.Namespace) -> int:
    only = _groups(options.steps, GROUPS, "--steps")
    tasks = ",".join(_groups(options.tasks, tasks_module.GROUPS, "--tasks"))
    if tasks and only and "checks" not in only:
        raise SystemExit("error: --tasks goes with the checks, and --steps leaves them out")
    run = _begin(options, options.seconds, only)
    everything = Everything(run, "cuda", options.quick, tasks, options.rows)
    try:
        everything.do()
    finally:  # also if the run is stopped
        run.save()
        found = report.write(run.folder)
        print("\n" + report.final_table(found), flush=True)
    if options.keep:
        try:
            print(f"kept in {keep.keep(run.folder)}")
        except ValueError as error:
            print(f"not kept: {error}")
    return int(bool(run.failed()) or everything.wrong)


def _dry(options: argparse.Namespace) -> int:
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
    found = load(options.folder)
    print(report.as_markdown(found))
    try:
        report.write(options.folder)
    except OSError as error:
        print(f"report.md is not written: {error}", file=sys.stderr)
    return 0


def _keep(options: argparse.Namespace) -> int:
    if options.folder and options.check:
        raise ValueError("--check goes without a folder")
    if options.folder:
        print(f"kept in {keep.keep(options.folder)}")
        return 0
    return keep.write_docs(check=options.check)


def _choices(options: argparse.Namespace) -> int:
    if options.table:
        entries = table.entries(options.file)
        options.table.write_text(table.header(entries))
        print(f"{options.table}: {len(entries)} layers")
        return 0
    for file in options.file:
        for line in choices.choices(file):
            print(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = int(options.command(options))
        sys.stdout.flush()
        return status
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenPipeError:  # the program that reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())

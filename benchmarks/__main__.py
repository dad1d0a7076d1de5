"""The command line: run, report, compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NoReturn

from fusedrnn import _console

from . import machine, results, runner, shapes


def main() -> None:
    """Reads the command line and does what it says."""
    options = _parser().parse_args()
    options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="run|report|compare")

    run = commands.add_parser("run", help="measure and write a JSON file")
    run.set_defaults(command=_run)
    run.add_argument("--set", required=True, metavar="|".join(shapes.SETS), help="one or more, a,b")
    run.add_argument("--cell", default=",".join(shapes.CELLS), help="default: %(default)s")
    run.add_argument(
        "--rivals",
        default="torch",
        help="torch (always), ort, openvino, jax, compile; the results list those not installed",
    )
    run.add_argument("--threads", default="1,2", help="default: %(default)s")
    run.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name has TEXT")
    run.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="time for each row and mode, shared by both libraries; default: %(default)s",
    )
    run.add_argument("--isa", choices=["avx2"], help="keep ours and torch.nn on AVX2")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.add_argument(
        "--device",
        help="cuda or cuda:N: measure on a GPU, compared only with torch.nn (cuDNN); no floors",
    )
    run.add_argument("--out", type=Path, required=True, metavar="FILE.json")

    report = commands.add_parser("report", help="render results as Markdown and PNGs")
    report.set_defaults(command=_report)
    report.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    report.add_argument("--docs", type=Path, metavar="docs/benchmarks.md")
    report.add_argument("--readme", type=Path, metavar="README.md")

    compare = commands.add_parser("compare", help="two runs of the same rows, as Markdown")
    compare.set_defaults(command=_compare)
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")

    # `run` starts these two commands; they are not for people.
    commands.add_parser("worker").set_defaults(command=_worker)
    commands.add_parser("machine").set_defaults(command=_machine)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    try:
        cells = arguments.cell.split(",")
        if unknown := [cell for cell in cells if cell not in shapes.CELLS]:
            raise ValueError(f"cell must be of {', '.join(shapes.CELLS)}, got {unknown[0]!r}")
        options = runner.Options(
            sets=runner.known_sets(arguments.set.split(",")),
            cells=cells,
            rivals=runner.known_rivals(arguments.rivals.split(",")),
            threads=[int(n) for n in arguments.threads.split(",")],
            rows=arguments.rows,
            seconds=arguments.seconds,
            isa=arguments.isa,
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if not runner.plan(options)[1]:
        raise SystemExit(f"error: no row of {arguments.set} has {arguments.rows!r} in its name")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.device:
        _run_on_device(options, arguments)
    found = runner.run(options, show_progress=not arguments.quiet)
    results.save(found, arguments.out)
    bad = [row for row in found["rows"] if row["status"] in ("red", "failed")]
    for row in bad:
        print(f"{row['status']}: {row['name']} {row['mode']}: {row['why']}")
    print(f"{len(found['rows'])} rows in {arguments.out}")
    raise SystemExit(1 if bad else 0)


def _run_on_device(options: runner.Options, arguments: argparse.Namespace) -> NoReturn:
    import torch

    from . import device

    if options.rivals:
        raise SystemExit("error: --device goes with --rivals torch alone")
    try:
        chosen = torch.device(arguments.device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
        raise SystemExit(f"error: --device {arguments.device}: {error}") from None
    found = device.run(options, chosen)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(device.as_markdown(found))
    print(f"{len(found['rows'])} rows in {arguments.out}")
    raise SystemExit(1 if any(row["status"] == "red" for row in found["rows"]) else 0)


def _report(arguments: argparse.Namespace) -> None:
    from . import report

    if not arguments.docs and not arguments.readme:
        raise SystemExit("error: nothing to write: give --docs, --readme or both")
    report.write(arguments.results, arguments.docs, arguments.readme)


def _compare(arguments: argparse.Namespace) -> None:
    from . import compare

    before, after = (results.load(path) for path in (arguments.before, arguments.after))
    print(compare.as_markdown(before, after))


def _worker(_: argparse.Namespace) -> None:
    from . import worker

    worker.main()


def _machine(_: argparse.Namespace) -> None:
    print(json.dumps(machine.describe()))


if __name__ == "__main__":
    _console.run(main)

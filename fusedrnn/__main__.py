"""The command line: `python -m fusedrnn` prints versions, `... plan` what a GPU would run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from . import _console
from ._cards import CARDS, card_spelled
from ._library import CELLS, show_config

DTYPES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}
# The largest T, N, I and H, because the kernels use 32-bit integers for them.
LARGEST = 2**31 - 1


def _shape(text: str) -> tuple[int, int, int, int]:
    """Reads T,N,I,H from the command line."""
    try:
        T, N, I, H = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be T,N,I,H, four integers such as 150,32,1024,1024, got {text!r}"
        ) from None
    if min(T, N, I, H) < 1 or max(T, N, I, H) > LARGEST:
        raise argparse.ArgumentTypeError(f"must be integers in [1, {LARGEST}], got {text!r}")
    return T, N, I, H


def _dtype(text: str) -> str:
    """Reads torch's name or the short name of a dtype, and returns the short name."""
    for short, name in DTYPES.items():
        if text in (short, name):
            return short
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}, got {text!r}")


def _card(text: str) -> str:
    """Reads the name of a card in any spelling that `card_spelled` takes."""
    try:
        return card_spelled(text)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(str(wrong)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn",
        description="Without a command: versions, instruction sets, threads, CUDA.",
    )
    commands = parser.add_subparsers(dest="command")
    plan = commands.add_parser(
        "plan",
        help="what the CUDA engine would run, and an estimate of its time; needs no GPU",
        description="What the CUDA engine would run for one layer, and how long that should take "
        "by an analytic model: an estimate, not a measurement. Needs no GPU.",
    )
    plan.add_argument("--cell", choices=list(CELLS), default="lstm")
    plan.add_argument("--dtype", type=_dtype, default="f32", help=", ".join(DTYPES))
    plan.add_argument("--shape", type=_shape, required=True, metavar="T,N,I,H")
    plan.add_argument(
        "--arch",
        type=_card,
        action="append",
        metavar="CARD",
        help=f"one of {', '.join(card.name for card in CARDS)}, or an architecture such as sm_90 "
        "for the first of its cards; may be given several times; default: each card",
    )
    plan.add_argument("--pass", choices=["forward", "backward"], help="default: both", dest="which")
    plan.add_argument("--bidirectional", action="store_true")
    plan.add_argument("--proj", type=int, metavar="P", help="size of the projection of lstm_proj")
    plan.add_argument("--tf32", action="store_true", help="as if torch allowed TF32")
    plan.add_argument(
        "--regime",
        choices=["resident", "streamed", "per_step"],
        help="default: resident or streamed, what should be faster, or per_step if both are slow; "
        "the exit status is 1 where the regime cannot run",
    )
    plan.add_argument(
        "--choice",
        default="",
        metavar="TEXT",
        help="parts of the plan, as FUSEDRNN_CUDA_PLAN takes them, such as cluster=4 or "
        "cores=fma,rows=1; the exit status is 1 where they do not fit",
    )
    plan.set_defaults(fail=plan.error)
    return parser


def _print_plans(options: argparse.Namespace) -> int:
    """Prints the plans; returns 1 if the regime or the choice that was asked for cannot run."""
    T, N, I, H = options.shape
    projects = CELLS[options.cell].projects
    if projects and options.proj is None:
        options.fail(f"--cell {options.cell} needs --proj, the size of its projection")
    if not projects and options.proj is not None:
        options.fail(f"--proj goes with --cell lstm_proj alone, got --cell {options.cell}")
    P = H if options.proj is None else options.proj
    if not 1 <= P <= H:
        options.fail(f"--proj must be in [1, H] = [1, {H}], got {P}")
    sizes = [T, N, I, H, P, 2 if options.bidirectional else 1]
    status = 0
    for card in options.arch or [card.name for card in CARDS]:
        for which in [options.which] if options.which else ["forward", "backward"]:
            try:
                text, _, _, limit = torch.ops.fusedrnn._plan(
                    options.cell,
                    options.dtype,
                    sizes,
                    card,
                    which == "backward",
                    options.tf32,
                    options.regime or "",
                    options.choice,
                )
            except RuntimeError as error:  # all other arguments were checked before
                options.fail("--" + str(error).splitlines()[0].removeprefix("fusedrnn: "))
            print(text)
            status = status if limit else 1
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    if options.command is None:
        show_config()
        return 0
    return _print_plans(options)


if __name__ == "__main__":
    _console.run(main)

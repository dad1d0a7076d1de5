"""`python -m fusedrnn` prints what is installed; `python -m fusedrnn plan` what a GPU would run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ._library import CELLS, show_config

DTYPES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}


def _shape(text: str) -> tuple[int, int, int, int]:
    """T,N,I,H of a command line."""
    try:
        T, N, I, H = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be T,N,I,H, four integers such as 150,32,1024,1024, got {text!r}"
        ) from None
    if min(T, N, I, H) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
    return T, N, I, H


def _dtype(text: str) -> str:
    """A dtype in torch's words or in short."""
    for short, name in DTYPES.items():
        if text in (short, name):
            return short
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}, got {text!r}")


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
    known = torch.ops.fusedrnn._plan_architectures().split(", ")
    plan.add_argument(
        "--arch", choices=known, metavar="ARCH", help=f"one of {', '.join(known)}; default: each"
    )
    plan.add_argument("--pass", choices=["forward", "backward"], help="default: both", dest="which")
    plan.add_argument("--bidirectional", action="store_true")
    plan.add_argument("--proj", type=int, metavar="P", help="size of the projection of lstm_proj")
    plan.add_argument("--tf32", action="store_true", help="as if torch allowed TF32")
    plan.add_argument("--regime", choices=["resident", "per_step"], help="default: what fits")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        show_config()
        return
    T, N, I, H = options.shape
    if CELLS[options.cell].projects != (options.proj is not None):
        parser.error("--proj goes with --cell lstm_proj, and is required there")
    P = H if options.proj is None else options.proj
    if not 1 <= P <= H:
        parser.error(f"--proj must be in [1, H] = [1, {H}], got {P}")
    sizes = [T, N, I, H, P, 2 if options.bidirectional else 1]
    known = torch.ops.fusedrnn._plan_architectures().split(", ")
    for arch in [options.arch] if options.arch else known:
        for which in [options.which] if options.which else ["forward", "backward"]:
            text, *_ = torch.ops.fusedrnn._plan(
                options.cell,
                options.dtype,
                sizes,
                arch,
                which == "backward",
                options.tf32,
                options.regime or "",
            )
            print(text)


if __name__ == "__main__":
    main()

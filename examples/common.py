"""What the programs share: the two kinds of layers, the common options, the bar, the comparison."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Threads that spin while they wait slow a small model tenfold on a machine that is busy. OpenMP
# reads this when torch loads it: import this module before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn
from tqdm import tqdm

KINDS = ("torch", "fused")
TITLES = {"torch": "torch.nn", "fused": "fusedrnn"}
# Of a plot's lines: colour and width, the second on top of the first.
STYLES = {"torch": ("#f2a541", 3.5), "fused": ("#1f4e79", 1.2)}


def layers(kind: str) -> Any:
    """The classes LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell of torch.nn or of fusedrnn."""
    if kind == "torch":
        return nn
    import fusedrnn

    names = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
    return SimpleNamespace(**{name: getattr(fusedrnn, f"Fused{name}") for name in names})


def kinds(options: argparse.Namespace) -> list[str]:
    """The kinds of layers that the command line asks for."""
    return [kind for kind in KINDS if options.rnn in (kind, "both")]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with a program's docstring as its help, and the options of every program."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--rnn", choices=[*KINDS, "both"], default="both", help="what to train (both, compared)")
    add("--seed", type=int, default=0, help="of the split, the weights and the batches (0)")
    add("--short", action="store_true", help="a small model and few steps: done in seconds")
    out = Path(__file__).resolve().parent.parent / "demo-output"
    add("--out", type=Path, default=out, metavar="DIR", help="folder for the plot (demo-output)")
    return result


def progress(total: int, title: str, shown: bool = True) -> tqdm[Any]:
    """A progress bar on stderr; a log file gets few lines of it."""
    pause = 0.2 if sys.stderr.isatty() else 10  # seconds
    return tqdm(total=total, desc=f"{title:18}", mininterval=pause, disable=not shown)


def agree(
    first: Sequence[float], second: Sequence[float], steps: int = 50, limit: float = 1e-4
) -> bool:
    """Prints how far the first losses of two trainings are apart, and whether that is `limit`."""
    both = torch.tensor([first[:steps], second[:steps]], dtype=torch.float64)
    apart = (both[0] - both[1]).abs().max().item()
    good = apart <= limit
    print(
        f"  {'ok    ' if good else 'FAILED'}  first {both.shape[1]} losses differ by at most "
        f"{apart:.1e} (limit {limit:.0e})"
    )
    return good

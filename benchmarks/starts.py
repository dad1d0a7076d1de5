"""Times beginnings inside a row: `python -m benchmarks.starts --out FILE.json`.

Each layer runs without `starts`, with a mask of zeros and with masks of 1 and 2 % beginnings, and
torch.nn's layer in the loop over steps that sb3-contrib's RecurrentPPO runs when an episode ends in
a batch. All run in turns in one process, because what counts are their ratios.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import machine
from .cases import LAYERS
from .measure import Timing, alternate
from .results import geometric_mean
from .shapes import CELLS, CORE, FORWARD, TRAINING

# T, N, I, H of two layers of agents.
AGENTS = [(128, 8, 64, 256), (64, 256, 128, 128)]
MASKS = {"zeros": 0.0, "1 %": 0.01, "2 %": 0.02}


def loop(layer: nn.RNNBase, x: Tensor, starts: Tensor) -> Tensor:
    """Runs torch.nn's layer a step at a time; states are zero again where a sequence begins."""
    N, H = x.shape[1], layer.hidden_size
    h, c = x.new_zeros(1, N, H), x.new_zeros(1, N, H)
    keep = (~starts).to(x.dtype)
    outputs = []
    for t in range(len(x)):
        mask = keep[t].view(1, -1, 1)
        if isinstance(layer, nn.LSTM):
            y, (h, c) = layer(x[t : t + 1], (mask * h, mask * c))
        else:
            y, h = layer(x[t : t + 1], mask * h)
        outputs.append(y)
    return torch.cat(outputs)


def in_mode(call: Callable[[], Tensor], mode: str) -> Callable[[], None]:
    """The function that is timed: a call without grad, or with its backward for training."""

    def forward() -> None:
        with torch.no_grad():
            call()

    def training() -> None:
        y = call()
        y.backward(torch.ones_like(y))

    return forward if mode == FORWARD else training


def measure(
    cell: str, sizes: tuple[int, int, int, int], mode: str, seconds: float, with_loop: bool
) -> dict[str, Timing]:
    """The times of all ways to run a layer, which take turns for about `seconds`."""
    T, N, I, H = sizes
    theirs, ours = (kind(I, H) for kind in LAYERS[cell, False])
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, N, I, requires_grad=True)
    masks = {name: torch.rand(T, N) < rate for name, rate in MASKS.items()}

    def with_starts(starts: Tensor | None) -> Callable[[], Tensor]:
        return lambda: ours(x, None, None, starts)[0]

    calls = {"none": with_starts(None)} | {name: with_starts(m) for name, m in masks.items()}
    if with_loop:
        calls["loop"] = lambda: loop(theirs, x, masks["2 %"])
        torch.testing.assert_close(calls["2 %"](), calls["loop"](), rtol=1e-4, atol=1e-5)
    return alternate({name: in_mode(call, mode) for name, call in calls.items()}, seconds)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: times of a call without starts, and ratios to it."""
    names = [*MASKS, "loop"]
    lines = [
        "| cell | T,N,I,H | | none, ms | zeros | 1 % | 2 % | loop of torch.nn over 2 % |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        median = {name: timing.median for name, timing in row["seconds"].items()}
        shown = [
            f"{median[n] / median['2 %' if n == 'loop' else 'none']:.2f}" if n in median else ""
            for n in names
        ]
        sizes = ",".join(map(str, row["sizes"]))
        lines.append(
            f"| {row['cell']} | {sizes} | {row['mode']} | {1e3 * median['none']:.2f} | "
            + " | ".join(shown)
            + " |"
        )
    core = [r for r in rows if tuple(r["sizes"]) in CORE]
    for name in MASKS:
        ratios = [r["seconds"][name].median / r["seconds"]["none"].median for r in core]
        if mean := geometric_mean(ratios):  # None if no row is of the core set
            lines.append(f"\nCore set, {name} over none, geometric mean: {mean:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--cell", default=",".join(CELLS), help="default: %(default)s")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only sizes that have TEXT")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="for each row; default: %(default)s"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    work = [
        (cell, sizes, mode)
        for cell in options.cell.split(",")
        for sizes in (*CORE, *AGENTS)
        for mode in (FORWARD, TRAINING)
        if options.rows in ",".join(map(str, sizes))
    ]
    for cell, sizes, mode in tqdm(work, unit="row", dynamic_ncols=True):
        torch.manual_seed(7)
        seconds = measure(cell, sizes, mode, options.seconds, sizes in AGENTS)
        rows.append({"cell": cell, "sizes": sizes, "mode": mode, "seconds": seconds})
    print(table(rows))
    for row in rows:
        row["seconds"] = {name: timing.as_dict() for name, timing in row["seconds"].items()}
    facts = {"machine": machine.describe(), "threads": options.threads}
    options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

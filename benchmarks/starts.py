"""Times beginnings inside a row: `python -m benchmarks.starts --out FILE.json`.

Each layer runs without `starts`, with a mask of zeros and with masks of 1 and 2 % beginnings, and
torch.nn's layer in the loop over steps that sb3-contrib's RecurrentPPO runs when an episode ends in
a batch. All run in turns in one process, because what counts are their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fusedrnn

from . import machine
from .shapes import FORWARD, TRAINING

# T, N, I, H: the core set, and two layers of agents.
CORE = [
    (100, 1, 64, 64),
    (100, 1, 256, 256),
    (25, 1, 1024, 1024),
    (1000, 8, 64, 64),
    (100, 16, 128, 128),
    (100, 32, 256, 256),
    (25, 16, 512, 512),
    (50, 64, 512, 512),
    (25, 64, 1024, 1024),
]
AGENTS = [(128, 8, 64, 256), (64, 256, 128, 128)]
CELLS: dict[str, tuple[type[nn.RNNBase], type[nn.RNNBase]]] = {
    "lstm": (nn.LSTM, fusedrnn.FusedLSTM),
    "gru": (nn.GRU, fusedrnn.FusedGRU),
    "rnn": (nn.RNN, fusedrnn.FusedRNN),
}
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


def timed(call: Callable[[], Tensor], mode: str) -> float:
    """The seconds of one call, with its backward for training."""
    start = time.perf_counter()
    if mode == FORWARD:
        with torch.no_grad():
            call()
    else:
        y = call()
        y.backward(torch.ones_like(y))
    return time.perf_counter() - start


def measure(
    cell: str, sizes: tuple[int, int, int, int], mode: str, seconds: float, with_loop: bool
) -> dict[str, list[float]]:
    """The times of all ways to run a layer, which take turns for about `seconds`."""
    T, N, I, H = sizes
    theirs, ours = (kind(I, H) for kind in CELLS[cell])
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, N, I, requires_grad=True)
    masks = {name: torch.rand(T, N) < rate for name, rate in MASKS.items()}

    def with_starts(starts: Tensor | None) -> Callable[[], Tensor]:
        return lambda: ours(x, None, None, starts)[0]

    calls = {"none": with_starts(None)} | {name: with_starts(m) for name, m in masks.items()}
    if with_loop:
        calls["loop"] = lambda: loop(theirs, x, masks["2 %"])
        torch.testing.assert_close(calls["2 %"](), calls["loop"](), rtol=1e-4, atol=1e-5)
    for call in calls.values():
        timed(call, mode)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["none"]) < 5:
        for name, call in calls.items():
            times[name].append(timed(call, mode))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """The number of times, their median and their quartiles."""
    first, median, third = statistics.quantiles(times, n=4)
    return {"count": len(times), "median": median, "first": first, "third": third}


def geometric_mean(ratios: list[float]) -> float:
    """The geometric mean, or 1 of nothing."""
    return statistics.geometric_mean(ratios) if ratios else 1.0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: times of a call without starts, and ratios to it."""
    names = [*MASKS, "loop"]
    lines = [
        "| cell | T,N,I,H | | none, ms | zeros | 1 % | 2 % | loop of torch.nn over 2 % |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        median = {name: statistics.median(times) for name, times in row["seconds"].items()}
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
        ratios = [
            statistics.median(r["seconds"][name]) / statistics.median(r["seconds"]["none"])
            for r in core
        ]
        lines.append(f"\nCore set, {name} over none, geometric mean: {geometric_mean(ratios):.3f}")
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
        for sizes in CORE + AGENTS
        for mode in (FORWARD, TRAINING)
        if options.rows in ",".join(map(str, sizes))
    ]
    for cell, sizes, mode in tqdm(work, unit="row", dynamic_ncols=True):
        torch.manual_seed(7)
        seconds = measure(cell, sizes, mode, options.seconds, sizes in AGENTS)
        rows.append({"cell": cell, "sizes": sizes, "mode": mode, "seconds": seconds})
    print(table(rows))
    for row in rows:
        row["seconds"] = {name: summary(times) for name, times in row["seconds"].items()}
    facts = {"machine": machine.describe(), "threads": options.threads}
    options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

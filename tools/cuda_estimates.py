"""Writes the tables of docs/cuda.md: the times of layers on GPUs by the plan's model.

python -m tools.cuda_estimates docs/cuda.md replaces the text between the file's markers. With
--check it writes nothing, and exits with 1 if the tables are not those that the model gives now.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import fusedrnn
from fusedrnn import _console
from fusedrnn._cards import CARDS
from tools.plans import plan_of, word_of

BEGIN, END = "<!-- estimates -->", "<!-- /estimates -->"
T = 100
WAYS = {"forward": False, "backward": True}
# The cells, dtypes, N and H of the tables with every card.
SHAPES = (("lstm", "f32", 8, 512), ("lstm", "bf16", 32, 1024), ("gru", "bf16", 1, 1024))
# The tables of sizes: the cards and dtypes.
GPUS = (("H100", "bf16"), ("H100", "f32"), ("A100", "bf16"))
CELLS = ("lstm", "gru")
HIDDEN = (256, 512, 1024, 2048)
BATCHES = (1, 8, 32, 128)
# Numbers of sequences for which an exchange of words is thought of, and clusters.
FEW = (1, 2, 4, 8)
MANY = (8, 32, 128)


def cell_of(
    card: str, cell: str, dtype: str, N: int, H: int, backward: bool, beside: bool = False
) -> str:
    """The text of one field: microseconds per step, regime, and the resource that limits a step.

    With `beside`, a field of another regime also has what a step per step would take.
    """
    sizes = [T, N, H, H, H, 1]
    plan = plan_of(cell, dtype, sizes, card, backward)
    words = f"{plan.step:.1f} ({word_of(plan.regime)}, {plan.limit}"
    if beside and plan.regime != "per_step":
        per_step = plan_of(cell, dtype, sizes, card, backward, regime="per_step")
        words += f"; per step {per_step.step:.1f}"
    return words + ")"


def words_beside_barrier(dtype: str, N: int, H: int, backward: bool) -> str:
    """Microseconds of a step on ordinary cores, with words and with a barrier."""
    steps = []
    for exchange in ("words", "barrier"):
        choice = f"cores=fma,exchange={exchange}"
        sizes = [T, N, H, H, H, 1]
        plan = plan_of("lstm", dtype, sizes, "H100", backward, regime="resident", choice=choice)
        steps.append(f"{plan.step:.2f}" if plan.regime else "does not fit")
    return f"{steps[0]}; barrier {steps[1]}"


def clusters_beside_none(cell: str, dtype: str, N: int, H: int) -> str:
    """Microseconds of a step of backward with the best clusters, their blocks, and without any."""
    sizes = [T, N, H, H, H, 1]
    steps = {}
    for cluster in (2, 4, 8):
        plan = plan_of(
            cell, dtype, sizes, "H100", True, regime="resident", choice=f"cluster={cluster}"
        )
        if plan.regime:
            steps[cluster] = plan.step
    without = plan_of(cell, dtype, sizes, "H100", True)
    best = min(steps, key=steps.__getitem__, default=None)
    words = f"{steps[best]:.1f} ({best} blocks)" if best else "do not fit"
    return f"{words}; without {without.step:.1f} ({word_of(without.regime)})"


def table(title: str, head: list[str], rows: dict[str, list[str]], align: str) -> Iterator[str]:
    """Yields the lines of a table and its title; `align` is the alignment of the first column."""
    yield from ("", f"**{title}** (estimates: µs a step)", "")
    yield f"| {' | '.join(head)} |"
    yield f"| {align} |{' :-- |' * (len(head) - 1)}"
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells)} |"


def tables() -> Iterator[str]:
    """The lines between the markers."""
    shapes = [f"{cell.upper()}, {dtype}, N = {N}, H = {H}" for cell, dtype, N, H in SHAPES]
    for which, backward in WAYS.items():
        on_cards = {
            f"{card.name} ({card.architecture})": [
                cell_of(card.name, *shape, backward) for shape in SHAPES
            ]
            for card in CARDS
        }
        yield from table(f"Every card, {which}", ["card", *shapes], on_cards, ":--")
    batches = [f"N = {N}" for N in BATCHES]
    for gpu, dtype in GPUS:
        for cell in CELLS:
            for which, backward in WAYS.items():
                of_sizes = {
                    str(H): [cell_of(gpu, cell, dtype, N, H, backward, True) for N in BATCHES]
                    for H in HIDDEN
                }
                title = f"{cell.upper()}, {dtype}, {which}, {gpu}"
                yield from table(title, ["H", *batches], of_sizes, "--:")
    for dtype in ("bf16", "f32"):
        for which, backward in WAYS.items():
            of_sizes = {
                str(H): [words_beside_barrier(dtype, N, H, backward) for N in FEW]
                for H in HIDDEN[:3]
            }
            title = f"Words in place of a barrier: LSTM, {dtype}, {which}, H100"
            yield from table(title, ["H", *(f"N = {N}" for N in FEW)], of_sizes, "--:")
    for cell in CELLS:
        for dtype in ("bf16", "f32"):
            of_sizes = {
                str(H): [clusters_beside_none(cell, dtype, N, H) for N in MANY] for H in HIDDEN[1:]
            }
            title = f"Clusters: {cell.upper()}, {dtype}, backward, H100"
            yield from table(title, ["H", *(f"N = {N}" for N in MANY)], of_sizes, "--:")
    yield ""


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    before = options.file.read_text()
    head, rest = before.split(BEGIN)
    tail = rest.split(END)[1]
    after = head + BEGIN + "\n" + "\n".join(tables()) + "\n" + END + tail
    if options.check:
        if before != after:
            print(f"{options.file} is not what `python {sys.argv[0]} {options.file}` makes of it")
        return int(before != after)
    options.file.write_text(after)
    print(f"{options.file}: estimates of fusedrnn {fusedrnn.__version__}")
    return 0


if __name__ == "__main__":
    _console.run(main)

"""Code that the programs share: the kinds of layers, options, the progress bar, the comparison.

Before a program trains, this module checks what it needs: packages, fusedrnn, and a folder for the
plot.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# On a busy machine threads that spin while they wait can slow a small model tenfold. OpenMP reads
# this variable when torch loads it, so this module must be imported before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]
# `make` compiles fusedrnn in the repository and does not install it.
if importlib.util.find_spec("fusedrnn") is None:
    sys.path.append(str(ROOT))


def stop(text: str) -> NoReturn:
    """Ends the program with the exit status of a wrong command line."""
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    raise SystemExit(2)


def need(module: str, packages: str = "-r requirements-examples.txt") -> Any:
    """Imports a module, or ends the program and says how to get it: pip install `packages`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        stop(
            f"needs {error.name}, which {sys.executable} does not have: pip install {packages} "
            f"(in {ROOT})"
        )


try:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator
    from torch import Tensor, nn
    from tqdm import tqdm
except ModuleNotFoundError as error:
    stop(
        f"needs {error.name}, which {sys.executable} does not have: `make demo` makes an "
        f"environment with it, for `source .venv/bin/activate` (in {ROOT})"
    )

KINDS = ("torch", "fused")
TITLES = {"torch": "torch.nn", "fused": "fusedrnn"}
# The colour and width of a plot's lines; the second line is drawn on top of the first.
STYLES = {"torch": ("#f2a541", 3.5), "fused": ("#1f4e79", 1.2)}


def layers(kind: str) -> Any:
    """The classes LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell of torch.nn or of fusedrnn."""
    if kind == "torch":
        return nn
    import fusedrnn

    names = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
    return SimpleNamespace(**{name: getattr(fusedrnn, f"Fused{name}") for name in names})


def kinds(options: argparse.Namespace) -> list[str]:
    """Returns the kinds of layers that the command line asks for."""
    return [kind for kind in KINDS if options.rnn in (kind, "both")]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Makes a parser with a program's docstring as its help and the common options."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--rnn", choices=[*KINDS, "both"], default="both", help="what to train (both, compared)")
    add("--seed", type=int, default=0, help="seed of the split, the weights and the batches (0)")
    add("--short", action="store_true", help="a small model and few steps: done in seconds")
    out = ROOT / "demo-output"
    add("--out", type=Path, default=out, metavar="DIR", help="folder for the plot (demo-output)")
    return result


def check_folder(option: str, folder: Path) -> None:
    """Ends the program if no file can be written in a folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        stop(f"{option}: cannot write in {folder}: {error.strerror}")


def begin(options: argparse.Namespace) -> None:
    """Ends the program if fusedrnn is needed and missing, or if the plot cannot be written."""
    if "fused" in kinds(options):
        try:
            layers("fused")
        except ImportError as error:
            stop(str(error))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out: cannot make {options.out}: {error.strerror}")
    check_folder("--out", options.out)


def progress(total: int, title: str, shown: bool = True) -> tqdm[Any]:
    """Makes a progress bar on stderr, which writes only few lines to a log file."""
    pause = 0.2 if sys.stderr.isatty() else 10  # seconds
    return tqdm(total=total, desc=f"{title:18}", mininterval=pause, disable=not shown)


def agree(
    first: Sequence[float], second: Sequence[float], steps: int = 50, limit: float = 1e-4
) -> bool:
    """Compares the first losses of two trainings, and returns whether they agree to `limit`."""
    both = torch.tensor([first[:steps], second[:steps]], dtype=torch.float64)
    apart = (both[0] - both[1]).abs().max().item()
    good = apart <= limit
    print(
        f"  {'ok    ' if good else 'FAILED'}  first {both.shape[1]} losses differ by at most "
        f"{apart:.1e} (limit {limit:.0e})"
    )
    return good


@dataclass
class Run:
    """The results of one training."""

    kind: str  # one of KINDS
    title: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)  # one for each step
    accuracies: list[float] = field(default_factory=list)  # on held-out data, after each epoch
    seconds: float = 0.0  # the time of training alone


def fit(
    run: Run,
    loss: Callable[[Tensor], Tensor],
    accuracy: Callable[[], float],
    samples: int,
    *,
    epochs: int,
    batch: int,
    rate: float,
    one_cycle: bool = True,
) -> None:
    """Trains `run.model` with AdamW, gradients clipped to norm 1, and fills in the rest of `run`.

    `loss` gets the indices of a batch; in every epoch all `samples` are shuffled into batches.
    `rate` is the learning rate; with `one_cycle` it rises to this value and falls again.
    """
    model = run.model
    steps = epochs * -(-samples // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = None
    if one_cycle:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    with progress(steps, run.title) as bar:
        for _ in range(epochs):
            model.train()
            start = time.perf_counter()
            for indices in torch.randperm(samples).split(batch):
                value = loss(indices)
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if schedule:
                    schedule.step()
                run.losses.append(value.item())
                bar.update()
            run.seconds += time.perf_counter() - start
            model.eval()
            with torch.no_grad():
                run.accuracies.append(accuracy())
            bar.set_postfix(accuracy=f"{run.accuracies[-1]:.1%}", refresh=False)


def threads() -> str:
    """Says in words how many threads torch has."""
    number = torch.get_num_threads()
    return "1 thread" if number == 1 else f"{number} threads"


def smoothed(losses: Sequence[float], steps: int) -> tuple[range, Tensor]:
    """Returns step numbers and the mean loss of each step and the `steps` - 1 before it."""
    return range(steps, len(losses) + 1), torch.tensor(losses).unfold(0, steps, 1).mean(1)


def show_zero(axes: Axes) -> None:
    """Begins the y axis at 0, unless half of the plot would be empty then."""
    low, high = axes.get_ylim()
    if low < high / 2:
        axes.set_ylim(0, high)


def plot_losses(axes: Axes, runs: Sequence[Run]) -> None:
    """Plots the training losses as means of 25 steps, or of fewer in short runs."""
    steps = min(25, max(1, len(runs[0].losses) // 10))
    for run in runs:
        colour, width = STYLES[run.kind]
        axes.plot(*smoothed(run.losses, steps), color=colour, lw=width, label=run.title)
    mean = f" (mean of {steps} steps)" if steps > 1 else ""
    axes.set(title=f"training loss{mean}", xlabel="step")
    show_zero(axes)
    axes.legend(frameon=False)


def plot_accuracies(axes: Axes, runs: Sequence[Run]) -> None:
    """Plots the accuracies after every epoch, in per cent."""
    for run in runs:
        colour, width = STYLES[run.kind]
        percent = [100 * a for a in run.accuracies]
        epochs = range(1, len(percent) + 1)
        axes.plot(epochs, percent, "o-", color=colour, lw=width, ms=3 + width, label=run.title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylim=(0, 100))


def plot_times(axes: Axes, runs: Sequence[Run]) -> None:
    """Plots a bar for the time of each training."""
    for i, run in enumerate(runs):
        axes.barh(i, run.seconds, color=STYLES[run.kind][0], height=0.5)
        text = "white" if run.kind == "fused" else "black"
        axes.text(0, i, f" {run.seconds:.1f} s", va="center", size=13, color=text)
    axes.set(title=f"training time, s ({threads()})")
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_yticks(range(len(runs)), [r.title for r in runs], rotation=90, va="center")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a head and rows, with the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        first, *rest = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        print("  " + "  ".join([row[0].ljust(len(first)), *rest]))

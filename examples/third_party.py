"""Runs two other libraries with fused layers, by one added line: fusedrnn.patch_torch().

Both libraries build torch.nn.LSTM themselves and do not let a program pass a layer in:

  ppo     sb3-contrib's RecurrentPPO balances a pole (CartPole-v1) with one LSTM for the policy and
          one for the value; most calls are single steps of one environment
  deepar  GluonTS' DeepAR forecasts twenty seasonal series with two LSTM layers with dropout

Each trains twice from the same seed, the second time in a block of patch_torch(). The program
prints how far the two curves of the training loss are apart, and the seconds of the whole
trainings.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # before torch
import numpy as np
from matplotlib.figure import Figure

Report = Callable[[float], None]  # called with the loss after each update


def ppo(updates: int, seed: int, report: Report) -> Any:
    """Trains RecurrentPPO on CartPole-v1, with 128 steps of the environment for each update."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback

    class Losses(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if (loss := self.logger.name_to_value.get("train/loss")) is not None:
                report(loss)

    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=128, seed=seed, device="cpu")
    # The losses of an update are known when the steps for the next update begin.
    model.learn(128 * (updates + 1), callback=Losses())
    return model.policy.lstm_actor


def deepar(updates: int, seed: int, report: Report) -> Any:
    """Trains DeepAR on hourly series with the period of a day, random phases and noise."""
    import lightning.pytorch as pl
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model.deepar import DeepAREstimator

    layers = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            report(float(outputs["loss"]))
            layers.append(module.model.rnn)

    pl.seed_everything(seed, verbose=False)
    generator = np.random.default_rng(seed)
    hours = np.arange(500)
    targets = [
        10 + 3 * np.sin(2 * np.pi * hours / 24 + phase) + generator.normal(0, 0.3, hours.size)
        for phase in generator.uniform(0, 2 * np.pi, 20)
    ]
    series = ListDataset([{"start": "2020-01-01", "target": y} for y in targets], freq="h")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        estimator = DeepAREstimator(
            freq="h",
            prediction_length=24,
            context_length=72,
            num_batches_per_epoch=updates,
            trainer_kwargs={
                **quiet,
                "max_epochs": 1,
                "accelerator": "cpu",
                "callbacks": [Losses()],
                "default_root_dir": folder,
            },
        )
        estimator.train(series)
    return layers[-1]


@dataclass(frozen=True)
class Program:
    """A training with another library."""

    train: Callable[[int, int, Report], Any]  # (updates, seed, report) -> its recurrent layer
    updates: int
    short: int
    modules: tuple[str, ...]  # the modules that it needs
    packages: str  # the packages with these modules


PROGRAMS = {
    "ppo": Program(ppo, 40, 3, ("sb3_contrib",), "sb3-contrib"),
    "deepar": Program(deepar, 200, 5, ("gluonts.torch", "lightning.pytorch"), "'gluonts[torch]'"),
}


@dataclass
class Run:
    """The results of one training."""

    losses: list[float]
    layer: Any
    seconds: float


def run(name: str, kind: str, updates: int, seed: int) -> Run:
    """Trains one program, with torch.nn's layers or in the block that replaces them."""
    losses: list[float] = []
    with common.progress(updates, f"{name}, {common.TITLES[kind]}") as bar:

        def report(loss: float) -> None:
            losses.append(loss)
            bar.update()

        patch: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if kind == "fused":
            patch = common.need("fusedrnn").patch_torch()
        with patch:
            # Imports and first calls are not timed.
            PROGRAMS[name].train(1, seed, lambda loss: None)
            start = time.perf_counter()
            layer = PROGRAMS[name].train(updates, seed, report)
        return Run(losses, layer, time.perf_counter() - start)


def table(results: dict[str, dict[str, Run]]) -> str:
    """Makes a Markdown table with a row for each program."""
    rows = [
        "| program | layer | updates | first 50 losses differ by | all by "
        "| torch.nn | fusedrnn | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, runs in results.items():
        first, second = runs["torch"], runs["fused"]
        pairs = zip(first.losses, second.losses, strict=True)
        apart = [abs(a - b) for a, b in pairs]
        rows.append(
            f"| {name} | {first.layer} | {len(apart)} | {max(apart[:50]):.0e} | {max(apart):.0e} | "
            f"{first.seconds:.1f} s | {second.seconds:.1f} s | "
            f"{first.seconds / second.seconds:.2f} |"
        )
    return "\n".join(rows)


def plot(results: dict[str, dict[str, Run]], path: Path) -> None:
    """Plots the curves of each program, with both kinds in one picture."""
    figure = Figure(figsize=(6 * len(results), 4), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for ax, (name, runs) in zip(axes, results.items(), strict=True):
        for kind, one in runs.items():
            colour, width = common.STYLES[kind]
            title = f"{common.TITLES[kind]}, {one.seconds:.1f} s"
            ax.plot(one.losses, color=colour, lw=width, label=title)
        ax.set(title=name, xlabel="update", ylabel="training loss")
        ax.legend(frameon=False)
    figure.savefig(path, dpi=110)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="ppo, deepar (both)")
    options = parser.parse_args(arguments)
    options.programs = options.programs or list(PROGRAMS)
    for name in options.programs:
        if name not in PROGRAMS:
            parser.error(f"argument PROGRAM: invalid choice: {name!r} (choose from ppo, deepar)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares and plots; returns 1 if two curves are not the same."""
    options = parse(arguments)
    common.begin(options)
    # The libraries warn about torch 2.13, and about packages that they would like to have.
    warnings.filterwarnings("ignore", module=r"gluonts|lightning|stable_baselines3")
    for name in options.programs:
        for module in PROGRAMS[name].modules:
            common.need(module, PROGRAMS[name].packages)
    results: dict[str, dict[str, Run]] = {}
    good = True
    for name in options.programs:
        program = PROGRAMS[name]
        updates = program.short if options.short else program.updates
        runs = {kind: run(name, kind, updates, options.seed) for kind in common.kinds(options)}
        results[name] = runs
        for kind, one in runs.items():
            print(f"{name}: {common.TITLES[kind]:8}  {one.layer}, {one.seconds:.1f} s")
        if len(runs) == 2:
            good &= common.agree(runs["torch"].losses, runs["fused"].losses)
    if options.rnn == "both":
        print(f"\n{table(results)}\n")
    plot(results, options.out / "third_party.png")
    print(f"{common.threads()}; plot: {options.out / 'third_party.png'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

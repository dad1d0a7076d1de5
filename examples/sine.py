"""Forecasting, many to many: sine waves, and sunspots, by two LSTMs and a linear layer.

Part one is about waves of one frequency and random phases. At every step the network reads a value
and predicts the next one. It is trained by LBFGS in float64 with noise on its inputs. Then it reads
its own output for `--future` steps, on waves that it was not trained on.

Part two is about the yearly numbers of sunspots from 1700 to 2008, which the statsmodels package
contains. The network learns from the years up to 1899, and the weights that did best on 1900 to
1949 are kept. The years 1950 to 2008 are used once, at the end. Each is forecast from 60 years that
end 1 to 11 years before it. The errors are compared with two naive forecasts: the last year's
value, and the value of one solar cycle (11 years) earlier.

Both parts are trained with torch.nn and with fusedrnn, from one seed. The exit status is 1 if the
first losses do not agree. `--by cells` calls two LSTMCells per step in a Python loop, which is
necessary if an output is the next input. `--by layers` makes one call of an LSTM of two layers for
all steps, which gives the same numbers with the same weights in less time.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import common
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

sunspots = common.need("statsmodels.datasets.sunspots")

WAVES, WAVES_HELD_OUT = 40, 3
PERIOD = 40 * math.pi  # the period of a wave in steps
# Training adds noise to the inputs, so that the network learns not to let its own errors grow.
NOISE = 0.1
WARM_UP = 20  # steps of a wave without a loss: a few noisy values do not determine its phase
WINDOW, CYCLE = 60, 11  # years that a forecast reads; years of a solar cycle
TRAINED, VALIDATED = 1899, 1949  # the last years of two parts; later years are held out
PRINTED = (1, 5)  # the horizons (years ahead) in the table


class Forecaster(nn.Module):
    """Maps values [T, N] to forecasts [T + future, N], each of the next value."""

    def __init__(self, kind: str, by: str, H: int) -> None:
        super().__init__()
        make = common.layers(kind)
        # With the same seed the layer gets the same random numbers as the two cells.
        if by == "cells":
            self.first, self.second = make.LSTMCell(1, H), make.LSTMCell(H, H)
            self.run = self.by_cells
        else:
            self.lstm = make.LSTM(1, H, num_layers=2)
            self.run = self.by_layers
        self.linear = nn.Linear(H, 1)

    def forward(self, x: Tensor, future: int = 0) -> Tensor:
        h, state = self.run(x.unsqueeze(-1), None)  # h: [T, N, H]
        forecasts = [self.linear(h).squeeze(-1)]
        for _ in range(future):
            h, state = self.run(forecasts[-1][-1:].unsqueeze(-1), state)
            forecasts.append(self.linear(h).squeeze(-1))
        return torch.cat(forecasts)

    def by_cells(self, x: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        first, second = state or (None, None)  # (h, c) of each cell
        outputs = []
        for x_t in x:
            first = self.first(x_t, first)
            second = self.second(first[0], second)
            outputs.append(second[0])
        return torch.stack(outputs), (first, second)

    def by_layers(self, x: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        return self.lstm(x, state)


@dataclass
class Run:
    """The results of one training."""

    kind: str
    model: Forecaster
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    forecasts: Tensor | None = None  # of the held-out data


@dataclass
class Sunspots:
    """The sunspots of each year, and their standardised square roots, which the network reads."""

    years: list[int]
    values: Tensor  # [years]

    def __post_init__(self) -> None:
        roots = self.values.sqrt()
        known = roots[: self.years.index(TRAINED) + 1]
        self.mean, self.deviation = known.mean(), known.std()  # of the training years only
        self.scaled = (roots - self.mean) / self.deviation

    def unscale(self, scaled: Tensor) -> Tensor:
        return (scaled * self.deviation + self.mean).clamp(min=0) ** 2

    def windows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [WINDOW, n]; the last targets are the years first to last."""
        start, end = self.years.index(first) - WINDOW, self.years.index(last) + 1
        if start < 0:
            raise ValueError(f"first must be {self.years[WINDOW]} or later, got {first}")
        windows = self.scaled[start:end].unfold(0, WINDOW + 1, 1).T
        return windows[:-1], windows[1:]

    def truth(self, horizon: int) -> Tensor:
        """The held-out values for which there is a forecast from VALIDATED or later."""
        return self.values[self.years.index(VALIDATED) + horizon :]

    def naive(self, horizon: int) -> dict[str, Tensor]:
        """The naive forecasts of truth(horizon), which repeat an earlier value."""
        first, end = self.years.index(VALIDATED), len(self.years)
        return {
            "last value": self.values[first : end - horizon],
            f"{CYCLE} years before": self.values[first + horizon - CYCLE : end - CYCLE],
        }


def load_sunspots() -> Sunspots:
    """Reads the yearly numbers that statsmodels contains."""
    data = sunspots.load_pandas().data
    return Sunspots(data["YEAR"].astype(int).to_list(), torch.tensor(data["SUNACTIVITY"].to_list()))


def make_waves(length: int, count: int) -> Tensor:
    """Makes sine waves [length, count] with random phases from torch's generator."""
    phases = 2 * math.pi * torch.rand(count, dtype=torch.float64)
    steps = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    return torch.sin(2 * math.pi * steps / PERIOD + phases)


def errors(forecasts: Tensor, truth: Tensor) -> tuple[float, float]:
    """Returns the mean absolute error and the root of the mean squared error."""
    gap = forecasts - truth
    return gap.abs().mean().item(), gap.square().mean().sqrt().item()


def take_step(
    model: Forecaster, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, skipped: int
) -> list[float]:
    """Takes one step on inputs and targets [T, N]; returns the losses (LBFGS computes several)."""
    losses = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x)[skipped:], y[skipped:])
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(evaluate)
    return losses


def train_waves(kind: str, waves: Tensor, options: argparse.Namespace) -> Run:
    """Trains on all but the last waves; `waves` is [length + future, WAVES]."""
    torch.manual_seed(options.seed)
    run = Run(kind, Forecaster(kind, options.by, options.hidden).to(waves.dtype))
    # Without a line search LBFGS can take a step so large that training fails.
    optimizer = torch.optim.LBFGS(run.model.parameters(), line_search_fn="strong_wolfe")
    known, new = waves[: options.length].split([WAVES - WAVES_HELD_OUT, WAVES_HELD_OUT], dim=1)
    x, y = known[:-1] + NOISE * torch.randn_like(known[:-1]), known[1:]
    with common.progress(options.steps, f"{common.TITLES[kind]}, waves") as bar:
        for _ in range(options.steps):
            start = time.perf_counter()
            run.losses += take_step(run.model, optimizer, x, y, WARM_UP)
            run.seconds += time.perf_counter() - start
            bar.set_postfix(loss=f"{run.losses[-1]:.1e}", refresh=False)
            bar.update()
    with torch.no_grad():  # the output for the last given value is the first forecast
        run.forecasts = run.model(new, options.future - 1)
    return run


def train_sunspots(kind: str, series: Sunspots, options: argparse.Namespace) -> Run:
    """Trains on the years up to TRAINED, and keeps the weights that are best up to VALIDATED."""
    torch.manual_seed(options.seed)
    run = Run(kind, Forecaster(kind, options.by, options.hidden))
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=5e-3, weight_decay=0.1)
    x, y = series.windows(series.years[WINDOW], TRAINED)
    x_new, y_new = series.windows(TRAINED + 1, VALIDATED)
    least, best = math.inf, {}
    with common.progress(options.sunspot_steps, f"{common.TITLES[kind]}, sunspots") as bar:
        for _ in range(options.sunspot_steps):
            start = time.perf_counter()
            run.losses += take_step(run.model, optimizer, x, y, skipped=0)
            with torch.no_grad():
                error = (run.model(x_new)[-1] - y_new[-1]).square().mean().item()
            if error < least:
                least, best = error, copy.deepcopy(run.model.state_dict())
            run.seconds += time.perf_counter() - start
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}", error=f"{error:.3f}", refresh=False)
            bar.update()
    run.model.load_state_dict(best)
    # From each year, beginning with VALIDATED, the next CYCLE years are forecast.
    given, _ = series.windows(VALIDATED + 1, series.years[-1])
    with torch.no_grad():
        run.forecasts = series.unscale(run.model(given, CYCLE - 1)[WINDOW - 1 :])  # [CYCLE, years]
    return run


def ahead(run: Run, horizon: int) -> Tensor:
    """Returns the forecasts of truth(horizon)."""
    row = run.forecasts[horizon - 1]
    return row[: len(row) - horizon + 1]


def report_waves(runs: list[Run], truth: Tensor) -> None:
    """Prints errors and times; `truth` is [future, WAVES_HELD_OUT]."""
    print(f"{f'waves, {len(truth)} steps on its own output':40}    MAE     RMSE   training")
    for run in runs:
        mae, rmse = errors(run.forecasts[-len(truth) :], truth)
        print(f"  {common.TITLES[run.kind]:36} {mae:8.4f} {rmse:8.4f} {run.seconds:8.1f} s")
    mae, rmse = errors(torch.zeros(()), truth)
    print(f"  {'always 0':36} {mae:8.4f} {rmse:8.4f}")


def report_sunspots(runs: list[Run], series: Sunspots) -> None:
    """Prints errors and times, and the errors of the naive forecasts."""
    rows = {common.TITLES[run.kind]: [ahead(run, h) for h in PRINTED] for run in runs}
    seconds = {common.TITLES[run.kind]: f"{run.seconds:8.1f} s" for run in runs}
    for name in series.naive(1):
        rows[name] = [series.naive(h)[name] for h in PRINTED]
    heads = "".join(f"{f'{h} ahead: MAE':>15}    RMSE" for h in PRINTED)
    print(f"{f'sunspots, {VALIDATED + 1} to {series.years[-1]}':24}{heads}   training")
    for name, forecasts in rows.items():
        pairs = [errors(f, series.truth(h)) for f, h in zip(forecasts, PRINTED, strict=True)]
        numbers = "".join(f"{mae:15.1f} {rmse:7.1f}" for mae, rmse in pairs)
        print(f"  {name:22}{numbers} {seconds.get(name, '')}".rstrip())


def plot(runs: dict[str, list[Run]], truth: Tensor, series: Sunspots, path: Path) -> None:
    """Plots a wave, the losses, the sunspots and the errors; `truth` is [future, held out]."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    (wave, loss), (spots, horizons) = figure.subplots(2, 2, width_ratios=[2, 1])
    grey, width = {"color": "#c4c4c4"}, 6
    wave.plot(truth[:, 0], **grey, lw=width, label="truth")
    for run in runs["waves"]:
        colour, line = common.STYLES[run.kind]
        style = {"color": colour, "lw": line, "label": common.TITLES[run.kind]}
        wave.plot(run.forecasts[-len(truth) :, 0], **style)
        loss.plot(run.losses, **style)
    wave.set(
        title="a held-out wave, forecast on its own output", xlabel="step", xlim=(0, len(truth))
    )
    loss.set(title="waves: loss", xlabel="evaluation", yscale="log")

    first = series.years.index(VALIDATED) + 1
    spots.plot(series.years[first - WINDOW :], series.values[first - WINDOW :], **grey, lw=width)
    ranges = range(1, CYCLE + 1)
    for run in runs["sunspots"]:
        colour, line = common.STYLES[run.kind]
        style = {"color": colour, "lw": line, "label": common.TITLES[run.kind]}
        spots.plot(series.years[first:], run.forecasts[0], **style)
        mae = [errors(ahead(run, h), series.truth(h))[0] for h in ranges]
        horizons.plot(ranges, mae, "o-", ms=2 + line, **style)
    spots.axvline(VALIDATED + 0.5, color="grey", ls=":")
    spots.set(title="sunspots, and forecasts of one year ahead", xlabel="year", ylim=(0, None))
    for name, dashes in zip(series.naive(1), (":", "--"), strict=True):
        mae = [errors(series.naive(h)[name], series.truth(h))[0] for h in ranges]
        horizons.plot(ranges, mae, color="black", lw=1, ls=dashes, label=name)
    horizons.set(title="sunspots: mean absolute error", xlabel="years ahead", ylim=(0, None))
    wave.set_ylim(-1.2, 1.7)
    wave.legend(loc="upper right", ncols=3, frameon=False)
    horizons.set_ylim(0, 1.6 * horizons.get_ylim()[1])
    horizons.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=70)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--by", choices=["cells", "layers"], default="cells", help="how to run the LSTMs (cells)")
    add("--length", type=int, help="steps of a wave to train on (400; 40 with --short)")
    add("--future", type=int, help="steps on its own output (1000; 40 with --short)")
    add("--hidden", type=int, help="hidden size of both LSTMs (51; 8 with --short)")
    add("--steps", type=int, help="LBFGS steps, of up to 25 evaluations (6; 1 with --short)")
    add("--sunspot-steps", type=int, help="AdamW steps on the sunspots (200; 10 with --short)")
    options = parser.parse_args(arguments)
    defaults = {"length": (400, 40), "future": (1000, 40), "hidden": (51, 8), "steps": (6, 1)}
    for name, pair in (defaults | {"sunspot_steps": (200, 10)}).items():
        if getattr(options, name) is None:
            setattr(options, name, pair[options.short])
        least = WARM_UP + 2 if name == "length" else 1
        if getattr(options, name) < least:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} must be at least {least}, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, reports and plots; returns 1 if the two kinds of layers do not agree."""
    options = parse(arguments)
    common.begin(options)
    torch.manual_seed(options.seed)
    waves, series = make_waves(options.length + options.future, WAVES), load_sunspots()
    unseen = waves[options.length :, -WAVES_HELD_OUT:]
    kinds = common.kinds(options)
    runs = {
        "waves": [train_waves(kind, waves, options) for kind in kinds],
        "sunspots": [train_sunspots(kind, series, options) for kind in kinds],
    }
    report_waves(runs["waves"], unseen)
    report_sunspots(runs["sunspots"], series)
    good = True
    if len(kinds) == 2:
        for name, (first, second) in runs.items():
            print(name)
            good &= common.agree(first.losses, second.losses)
    plot(runs, unseen, series, options.out / "sine.png")
    print(f"plot: {options.out / 'sine.png'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

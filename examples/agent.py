"""Reinforcement learning with a memory: a pole is balanced without seeing how fast it moves.

The environment is gymnasium's CartPole-v1 with its velocities hidden: an agent sees only the
positions of the cart and of the pole. One such observation does not say which way the pole
falls, so the agent needs a memory. RecurrentPPO of sb3-contrib gives it two LSTMs, one for the
policy and one for the value of a state.

The agent is trained with torch.nn's layers and with those of fusedrnn, by the one line
`fusedrnn.sb3.fuse(model)`, from one seed. The exit status is 1 if the first losses do not agree. A
third agent has no memory (PPO of stable-baselines3), for comparison. The program prints the times
of `learn`, and how much of them is spent outside the LSTMs, where no faster layer helps: in the
environment, in the other layers and in the optimizer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common  # before torch
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

gymnasium = common.need("gymnasium")
sb3_contrib = common.need("sb3_contrib")
stable_baselines3 = common.need("stable_baselines3")
callbacks = common.need("stable_baselines3.common.callbacks")
env_util = common.need("stable_baselines3.common.env_util")

ENVIRONMENTS, ROLLOUT = 8, 128  # environments side by side, steps of each between updates
LIMITS = (
    2.4,
    0.2095,
)  # the cart's position (m) and the pole's angle (rad) at which an episode ends
BEST = 500  # the return of an episode without a fall
MEAN = 50  # episodes of a mean in the plot and in the table
SETTINGS = {
    "n_steps": ROLLOUT,
    "batch_size": 256,
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "clip_range": 0.1,
}
# How many updates, from the first on, must have the same losses. Rounding grows with each update,
# and in the end it changes an action that is drawn; from then on the agents see other episodes.
COMPARED = 10
NO_MEMORY = "no memory"
STYLES = {**common.STYLES, NO_MEMORY: ("#9a9a9a", 1.5)}
TITLES = {**common.TITLES, NO_MEMORY: NO_MEMORY}


class Positions(gymnasium.ObservationWrapper):
    """Hides both velocities of CartPole, and scales the two positions to -1 to 1."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Returns what the agent sees of the four numbers."""
        return (observation[[0, 2]] / LIMITS).astype(np.float32)


@dataclass
class Run:
    """The results of one training."""

    kind: str
    losses: list[float] = field(default_factory=list)  # of the last minibatch of each update
    steps: list[int] = field(default_factory=list)  # the step at which each episode ended
    returns: list[float] = field(default_factory=list)  # of each episode
    seconds: float = 0.0  # of `learn`
    in_lstms: float = 0.0  # of these, forward and backward of the LSTMs

    def mean(self) -> float:
        """The mean return of the last episodes."""
        return float(np.mean(self.returns[-MEAN:])) if self.returns else 0.0


class Watch(callbacks.BaseCallback):
    """Fills in a run while an agent learns, and moves the progress bar."""

    def __init__(self, run: Run, bar: Any) -> None:
        super().__init__()
        self.run, self.bar = run, bar

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.run.steps.append(self.num_timesteps)
                self.run.returns.append(float(info["episode"]["r"]))
        self.bar.set_postfix(mean_return=f"{self.run.mean():.0f}", refresh=False)
        self.bar.update(self.training_env.num_envs)
        return True

    def _on_rollout_start(self) -> None:
        # The losses of an update are known when the steps for the next update begin.
        if (loss := self.logger.name_to_value.get("train/loss")) is not None:
            self.run.losses.append(float(loss))


class Stopwatch:
    """Adds the seconds that a policy spends in its LSTMs to `run.in_lstms`.

    sb3-contrib calls each LSTM through the policy's _process_sequence. The backward pass of an LSTM
    begins when autograd has the gradient of its output, and ends with the gradients of its weights.
    """

    def __init__(self, policy: nn.Module, run: Run) -> None:
        self.run = run
        self.inner = policy._process_sequence
        self.last = 0.0
        policy._process_sequence = self.forward
        for lstm in (policy.lstm_actor, policy.lstm_critic):
            for weight in lstm.parameters():
                weight.register_post_accumulate_grad_hook(self.lap)

    def forward(self, *arguments: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Runs a sequence, forward."""
        self.start()
        y, state = self.inner(*arguments)
        self.lap()
        if y.requires_grad:
            y.register_hook(self.start)
        return y, state

    def start(self, _: Any = None) -> None:
        """Begins to count."""
        self.last = time.perf_counter()

    def lap(self, _: Any = None) -> None:
        """Adds the time since the last call of `start` or `lap`."""
        now = time.perf_counter()
        self.run.in_lstms += now - self.last
        self.last = now


def environments(seed: int) -> Any:
    """Makes the environments, which run one after another in this process."""
    return env_util.make_vec_env(
        "CartPole-v1", ENVIRONMENTS, seed, wrapper_class=lambda env: Positions(env)
    )


def make(kind: str, options: argparse.Namespace) -> Any:
    """Makes an agent that has learned nothing yet."""
    settings = {**SETTINGS, "n_epochs": options.epochs}
    settings["learning_rate"] = lambda left: left * options.rate  # left falls from 1 to 0
    settings |= {"seed": options.seed, "device": options.device}
    H = options.hidden
    network = {"ortho_init": False, "activation_fn": nn.ReLU, "net_arch": {"pi": [H], "vf": [H]}}
    env = environments(options.seed)
    if kind == NO_MEMORY:
        return stable_baselines3.PPO("MlpPolicy", env, policy_kwargs=network, **settings)
    model = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", env, policy_kwargs={**network, "lstm_hidden_size": H}, **settings
    )
    if kind == "fused":
        import fusedrnn.sb3

        fusedrnn.sb3.fuse(model)
    return model


def train(kind: str, options: argparse.Namespace) -> Run:
    """Trains an agent for `options.steps` steps of the environment."""
    run = Run(kind)
    make(kind, options).learn(1)  # the first calls, which are not timed
    model = make(kind, options)
    if kind != NO_MEMORY:
        Stopwatch(model.policy, run)
    # learn() completes the last rollout.
    rollout = ENVIRONMENTS * ROLLOUT
    with common.progress(-(-options.steps // rollout) * rollout, TITLES[kind]) as bar:
        start = time.perf_counter()
        model.learn(options.steps, callback=Watch(run, bar))
        run.seconds = time.perf_counter() - start
    run.losses.append(float(model.logger.name_to_value["train/loss"]))
    return run


def report(runs: Sequence[Run]) -> None:
    """Prints the returns and the times."""
    rows = []
    for run in runs:
        outside = run.seconds - run.in_lstms
        shares = ["–", "–"]
        if run.kind != NO_MEMORY:
            shares = [f"{run.in_lstms:.1f} s", f"{outside:.1f} s ({outside / run.seconds:.0%})"]
        rows.append([TITLES[run.kind], f"{run.mean():.0f}", f"{run.seconds:.1f} s", *shares])
    head = ["", f"return, last {MEAN} episodes", "learn", "in the LSTMs", "outside of them"]
    common.table(head, rows)
    times = {run.kind: run for run in runs}
    if {"torch", "fused"} <= times.keys():
        slow, fast = times["torch"], times["fused"]
        print(
            f"  torch.nn over fusedrnn: {slow.seconds / fast.seconds:.2f} for learn, "
            f"{slow.in_lstms / fast.in_lstms:.2f} for the LSTMs"
        )


def means(values: Sequence[float]) -> np.ndarray:
    """Returns the mean of each value and the `MEAN` - 1 before it, or as many as there are."""
    sums = np.concatenate([np.zeros(1), np.cumsum(values)])
    ends = np.arange(1, len(sums))
    firsts = np.maximum(ends - MEAN, 0)
    return (sums[ends] - sums[firsts]) / (ends - firsts)


def plot_returns(axes: Axes, runs: Sequence[Run]) -> None:
    """Plots the mean returns of episodes against the steps; the recurrent agents are on top."""
    for run in sorted(runs, key=lambda run: run.kind != NO_MEMORY):
        colour, width = STYLES[run.kind]
        axes.plot(run.steps, means(run.returns), color=colour, lw=width, label=TITLES[run.kind])
    axes.axhline(BEST, color="grey", lw=1, ls=":")
    axes.text(0, BEST, "no fall", va="bottom", color="grey")
    axes.set(
        title=f"return of an episode (mean of {MEAN})",
        xlabel="step of the environments",
        ylim=(0, 1.1 * BEST),
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.92))


def plot_times(axes: Axes, runs: Sequence[Run]) -> None:
    """Plots a bar for each training: the time in the LSTMs, and the rest in grey."""
    for i, run in enumerate(runs):
        axes.barh(i, run.in_lstms, color=STYLES[run.kind][0], height=0.5)
        axes.barh(i, run.seconds - run.in_lstms, left=run.in_lstms, color="#dddddd", height=0.5)
        axes.text(run.seconds, i, f" {run.seconds:.0f} s", va="center", size=12)
    axes.set_yticks(range(len(runs)), [TITLES[run.kind] for run in runs])
    axes.set(
        title="seconds of learn: in the LSTMs, and outside (grey)",
        xlim=(0, 1.2 * max(run.seconds for run in runs)),
        ylim=(len(runs) - 0.5, -0.5),
    )


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plots the returns and the times."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    returns, times = figure.subplots(1, 2, width_ratios=[3, 2])
    plot_returns(returns, runs)
    plot_times(times, [run for run in runs if run.kind != NO_MEMORY])
    figure.savefig(path, dpi=80)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, help="steps of the environments (60000; 2048 with --short)")
    add("--epochs", type=int, default=10, help="times that an update reads its steps (10)")
    add("--hidden", type=int, default=64, help="hidden size of the LSTMs and other layers (64)")
    add(
        "--rate", type=float, default=1e-3, help="learning rate at the start; it falls to 0 (0.001)"
    )
    add("--device", default="cpu", help="where the layers are: cpu or cuda (cpu)")
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = 2048 if options.short else 60_000
    for name in ("steps", "epochs", "hidden"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 < options.rate < 1:
        parser.error(f"--rate must be between 0 and 1, got {options.rate}")
    if options.device != "cpu" and not (
        options.device.startswith("cuda") and torch.cuda.is_available()
    ):
        parser.error(f"--device must be cpu, or cuda where there is a GPU, got {options.device}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, reports and plots; returns 1 if the two kinds of layers do not agree."""
    options = parse(arguments)
    common.begin(options)
    runs = [train(kind, options) for kind in (*common.kinds(options), NO_MEMORY)]
    report(runs)
    good = len(runs) < 3 or common.agree(runs[0].losses, runs[1].losses, COMPARED)
    plot(runs, options.out / "agent.png")
    print(f"{common.threads()}; plot: {options.out / 'agent.png'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

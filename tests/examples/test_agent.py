"""examples/agent.py, which balances a pole without seeing speeds: its parts, and a short run."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fusedrnn
from tests.examples import programs

gymnasium: Any = pytest.importorskip("gymnasium", reason="requirements-examples.txt")
pytest.importorskip("sb3_contrib", reason="requirements-examples.txt")

agent = programs.load("agent")
common = programs.load("common")
TINY = ["--steps", "256", "--epochs", "1", "--hidden", "8"]


def test_velocities_are_hidden() -> None:
    env = agent.Positions(gymnasium.make("CartPole-v1"))
    first, _ = env.reset(seed=0)
    assert first.shape == (2,)
    seen = [env.observation(np.array([1.2, v, -0.2095, -v], np.float32)) for v in (0.0, 3.0)]
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_allclose(seen[0], [0.5, -1.0], rtol=1e-6)
    over = False
    while not over:
        observation, _, over, _, _ = env.step(1)
        assert observation in env.observation_space
    assert 1 < np.abs(observation).max() < 1.5  # an episode ends where a position leaves -1 to 1


def test_agents() -> None:
    options = agent.parse(TINY)
    models = {kind: agent.make(kind, options) for kind in ("torch", "fused", agent.NO_MEMORY)}
    layers = {kind: models[kind].policy.lstm_actor for kind in ("torch", "fused")}
    assert type(layers["torch"]) is nn.LSTM
    assert type(layers["fused"]) is fusedrnn.FusedLSTM
    for a, b in zip(*(layer.parameters() for layer in layers.values()), strict=True):
        assert torch.equal(a, b)
    assert not any(isinstance(m, nn.RNNBase) for m in models[agent.NO_MEMORY].policy.modules())


@pytest.mark.parametrize("kind", ["torch", "fused"])
def test_the_stopwatch_counts_forward_and_backward_of_the_lstms(kind: str) -> None:
    pause = 0.05
    policy = agent.make(kind, agent.parse(TINY)).policy
    inner = policy._process_sequence

    def slow(*arguments: Any) -> Any:
        y, state = inner(*arguments)
        time.sleep(pause)
        if y.requires_grad:
            y.register_hook(lambda _: time.sleep(2 * pause))
        return y.clone(), state

    policy._process_sequence = slow
    run = agent.Run(kind)
    agent.Stopwatch(policy, run)
    for module in (policy.action_net, policy.value_net):  # what is outside does not count
        module.register_forward_hook(lambda *_: time.sleep(4 * pause))
        module.register_full_backward_hook(lambda *_: time.sleep(4 * pause))
    state = tuple(torch.zeros(1, 2, 8) for _ in range(2))
    states = type("States", (), {"pi": state, "vf": state})
    starts = torch.tensor([0.0, 1, 0, 0, 0, 1])
    given = (torch.zeros(6, 2), torch.zeros(6), states, starts)
    start = time.perf_counter()
    with torch.no_grad():
        policy.evaluate_actions(*given)
    assert 2 * pause <= run.in_lstms
    assert run.in_lstms + 8 * pause <= time.perf_counter() - start
    run.in_lstms = 0.0
    start = time.perf_counter()
    values, log_prob, _ = policy.evaluate_actions(*given)
    (values.sum() + log_prob.sum()).backward()
    assert 6 * pause <= run.in_lstms
    assert run.in_lstms + 16 * pause <= time.perf_counter() - start


def test_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MEAN", 3)
    assert agent.means([1, 2, 6, 1, 2]).tolist() == [1, 1.5, 3, 3, 3]
    assert agent.means([]).tolist() == []
    assert agent.Run("torch", returns=[1, 2, 6, 1, 2]).mean() == 3
    assert agent.Run("torch").mean() == 0


@pytest.mark.parametrize("good", [True, False])
def test_the_exit_status_is_that_of_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], good: bool
) -> None:
    given = []

    def train(kind: str, options: Any) -> Any:
        return agent.Run(kind, [1.0, 2.0], [20, 50], [20.0, 30.0], 4.0, 1.0)

    monkeypatch.setattr(agent, "train", train)
    monkeypatch.setattr(common, "agree", lambda *losses: given.append(losses) or good)
    assert agent.main(["--short", "--out", str(tmp_path)]) == (0 if good else 1)
    assert given == [([1.0, 2.0], [1.0, 2.0], agent.COMPARED)]
    out = capsys.readouterr().out
    assert re.search(r"^  fusedrnn +25 +4\.0 s +1\.0 s +3\.0 s \(75%\)$", out, re.M)
    assert re.search(r"^  no memory +25 +4\.0 s +– +–$", out, re.M)
    assert "torch.nn over fusedrnn: 1.00 for learn, 1.00 for the LSTMs" in out
    assert agent.main(["--short", "--rnn", "fused", "--out", str(tmp_path)]) == 0
    assert len(given) == 1


def test_short_run(tmp_path: Path) -> None:
    done = programs.run("agent", "--short", *TINY, folder=tmp_path / "new")
    rows = re.findall(r"^  (torch\.nn|fusedrnn) +\d+ +([\d.]+) s +([\d.]+) s +", done.stdout, re.M)
    assert [name for name, _, _ in rows] == ["torch.nn", "fusedrnn"]
    assert all(float(learn) >= float(lstms) for _, learn, lstms in rows)
    assert re.search(r"ok +first 1 losses differ by at most", done.stdout)
    picture = tmp_path / "new" / "agent.png"
    assert str(picture) in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stderr.count("100%") >= 3
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--rate", "2"], "--rate must be between 0 and 1, got 2.0"),
        (["--device", "tpu"], "--device must be cpu, or cuda where there is a GPU, got tpu"),
        (["--rnn", "gru"], "invalid choice"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in programs.parse_fails(agent, arguments, capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = programs.help_of(agent, capsys)
    for option in ("--rnn", "--steps", "--epochs", "--hidden", "--rate", "--device", "--seed"):
        assert option in text

"""fusedrnn.sb3: recurrent policies of sb3-contrib with fused LSTMs train and act as without."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from tests.kit.layers import error

REASON = "requirements-ecosystem.txt is not installed"
gymnasium: Any = pytest.importorskip("gymnasium", reason=REASON)
sb3_contrib: Any = pytest.importorskip("sb3_contrib", reason=REASON)
stable_baselines3: Any = pytest.importorskip("stable_baselines3", reason=REASON)

from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

import fusedrnn.sb3

Box, Discrete = gymnasium.spaces.Box, gymnasium.spaces.Discrete
VECTOR = Box(-1, 1, (3,), np.float32)
IMAGE = Box(0, 255, (1, 36, 36), np.uint8)
DICT = gymnasium.spaces.Dict({"vector": VECTOR, "more": Box(-1, 1, (2,), np.float32)})


class Episodes(gymnasium.Env):
    """Random observations, and episodes of 1 to 9 steps; a half of them is truncated.

    The reward of an action depends on the sum of the last observation. A truncated episode makes
    RecurrentPPO ask for the value of its last observation.
    """

    def __init__(self, space: Any, actions: Any) -> None:
        self.observation_space, self.action_space = space, actions

    def _draw(self) -> Any:
        space = self.observation_space
        self.observation = space.sample()
        parts = self.observation.values() if isinstance(space, gymnasium.spaces.Dict) else None
        self.sum = float(sum(np.sum(part) for part in parts or [self.observation]))
        return self.observation

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.left = int(self.np_random.integers(1, 10))
        self.truncates = bool(self.np_random.integers(2))
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        reward = float(np.sum(action) * np.sign(self.sum))
        self.left -= 1
        over = self.left == 0
        ends = over and not self.truncates
        return self._draw(), reward, ends, over and self.truncates, {}


def build(
    policy: str = "MlpLstmPolicy",
    space: Any = VECTOR,
    actions: Any = None,
    envs: int = 2,
    lstm: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """An untrained model; the same one for the same arguments."""
    actions = actions or Discrete(2)
    env = DummyVecEnv(
        [lambda: Episodes(copy.deepcopy(space), copy.deepcopy(actions)) for _ in range(envs)]
    )
    options = {"n_steps": 40, "batch_size": 40, "n_epochs": 2, "seed": 3} | options
    kwargs = {"lstm_hidden_size": 16, "net_arch": [8]} | (lstm or {})
    return sb3_contrib.RecurrentPPO(policy, env, policy_kwargs=kwargs, device="cpu", **options)


class Curve(BaseCallback):
    """Keeps the three losses and the parameters after each update but the last."""

    def _on_training_start(self) -> None:
        self.losses: list[list[float]] = []
        self.parameters: list[Tensor] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        values = self.logger.name_to_value
        if "train/loss" in values:
            names = ("loss", "value_loss", "policy_gradient_loss")
            self.losses.append([float(values[f"train/{name}"]) for name in names])
            self.parameters.append(parameters(self.model))


def learn(model: Any, steps: int) -> Any:
    """Trains from a seed: torch's and numpy's generators are those of all models."""
    model.set_random_seed(5)
    return model.learn(steps)


def parameters(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.policy.parameters()])


def process(features: Tensor, states: Any, starts: Tensor, lstm: nn.Module) -> Any:
    return RecurrentActorCriticPolicy._process_sequence(features, states, starts, lstm)


# --- One sequence -------------------------------------------------------------------------------

STARTS: dict[str, Callable[[int, int], Tensor]] = {
    "anywhere": lambda N, T: (torch.rand(N, T) < 0.3).float(),
    "first step of the last sequence": lambda N, T: (
        (torch.arange(N * T) == (N - 1) * T).float().view(N, T)
    ),
    "every step": lambda N, T: torch.ones(N, T),
    "never": lambda N, T: torch.zeros(N, T),
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("N", "T"), [(4, 11), (1, 7), (3, 1), (1, 1)])
@pytest.mark.parametrize("starts", STARTS)
def test_a_sequence_in_float64(starts: str, N: int, T: int, layers: int) -> None:
    """Outputs, states and gradients are those of sb3-contrib's own loop over the steps."""
    theirs = nn.LSTM(3, 5, layers).double()
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    begins = STARTS[starts](N, T).flatten()
    x = torch.randn(N * T, 3, dtype=torch.float64)
    state = torch.randn(2, layers, N, 5, dtype=torch.float64)
    results = []
    for run, lstm in ((process, theirs), (fusedrnn.sb3._process_sequence, ours)):
        given = [x.clone().requires_grad_(), *(s.clone().requires_grad_() for s in state)]
        y, (h, c) = run(given[0], tuple(given[1:]), begins, lstm)
        assert y.shape == (N * T, 5)
        sum((t * torch.linspace(-1, 2, t.numel()).view_as(t)).sum() for t in (y, h, c)).backward()
        results.append([y, h, c, *(t.grad for t in given), *(w.grad for w in lstm.parameters())])
    for expected, found in zip(*results, strict=True):
        assert error(found, expected) < 1e-12


def test_a_sequence_of_features_with_more_sizes() -> None:
    """The features may have any shape that sb3-contrib's reshape takes."""
    lstm = nn.LSTM(6, 5)
    x, starts = torch.randn(8, 2, 3), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])
    state = (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    expected, _ = process(x, state, starts, lstm)
    found, _ = fusedrnn.sb3._process_sequence(x, state, starts, fusedrnn.convert(lstm))
    torch.testing.assert_close(found, expected)


class Calls(TorchDispatchMode):
    """Counts the calls of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("lstm", "expected"),
    [
        ({}, 2),
        ({"n_lstm_layers": 2}, 4),
        ({"enable_critic_lstm": False}, 1),
        ({"shared_lstm": True, "enable_critic_lstm": False}, 1),
    ],
)
def test_one_call_of_the_op_for_each_minibatch(lstm: dict[str, Any], expected: int) -> None:
    """A minibatch of the rollout buffer in which episodes begin is one call for each layer."""
    model = build(lstm=lstm)
    model.learn(80)
    (batch, *_) = model.rollout_buffer.get(40)
    N = batch.lstm_states.pi[0].shape[1]
    T = len(batch.episode_starts) // N
    assert batch.episode_starts.any()
    assert T > 3
    policy = model.policy
    steps = Counter[str]()
    policy.lstm_actor.register_forward_hook(lambda *_: steps.update(["actor"]))
    given = (batch.observations, batch.actions.long().flatten())
    policy.evaluate_actions(*given, batch.lstm_states, batch.episode_starts)
    assert steps["actor"] == T  # a call for each step, without fuse
    fusedrnn.sb3.fuse(model)
    with Calls() as calls:
        results = policy.evaluate_actions(*given, batch.lstm_states, batch.episode_starts)
        sum(result.sum() for result in results).backward()
    assert steps["actor"] == T + 1
    assert calls.count["fusedrnn.forward.default"] == expected
    assert calls.count["fusedrnn.backward.default"] == expected


# --- Training -----------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "two LSTMs": {},
    "one environment": {"envs": 1},
    "two layers": {"lstm": {"n_lstm_layers": 2}},
    "shared LSTM": {"lstm": {"shared_lstm": True, "enable_critic_lstm": False}},
    "linear critic": {"lstm": {"enable_critic_lstm": False}},
    "two extractors": {"lstm": {"share_features_extractor": False}},
    "continuous actions": {"actions": Box(-1, 1, (2,), np.float32), "use_sde": True},
    "images": {"policy": "CnnLstmPolicy", "space": IMAGE, "n_steps": 20},
    "dictionary": {"policy": "MultiInputLstmPolicy", "space": DICT},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_from_the_same_seed(options: dict[str, Any]) -> None:
    """Losses and parameters of both agree up to the rounding of float32 for hundreds of steps.

    After six updates the parameters of the two differ by at most 6e-8, and those of torch.nn by
    4e-8 from its own if one weight matrix is multiplied by 1 + 1.2e-7 before. Many more updates
    could not be compared so: sooner or later a draw of an action falls between the two
    probabilities, and then the two agents see different episodes.
    """
    curves, states = [], []
    for kind in ("torch", "fused"):
        model = build(**options)
        if kind == "fused":
            fusedrnn.sb3.fuse(model)
            assert type(model.policy.lstm_actor) is fusedrnn.FusedLSTM
        curve = Curve()
        updates = 6
        model.learn(model.n_steps * model.n_envs * updates, callback=curve)
        curve.parameters.append(parameters(model))
        assert len(curve.losses) == updates - 1
        curves.append(curve)
        states.append(model._last_lstm_states)
    first, second = curves
    assert (first.parameters[-1] - first.parameters[0]).abs().max() > 1e-3  # they have learned
    np.testing.assert_allclose(second.losses, first.losses, rtol=1e-5, atol=2e-6)
    for a, b in zip(first.parameters, second.parameters, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=2e-6)


def test_the_optimizer_continues_after_fuse() -> None:
    """The parameters stay the same objects, and Adam's averages of them continue to count."""
    plain, fused = build(), build()
    for model in (plain, fused):
        learn(model, 160)
    torch.testing.assert_close(parameters(fused), parameters(plain), rtol=0, atol=0)
    before = [id(p) for group in fused.policy.optimizer.param_groups for p in group["params"]]
    names = list(fused.policy.state_dict())
    assert fusedrnn.sb3.fuse(fused) is fused
    assert [id(p) for p in fused.policy.parameters()] == before
    assert list(fused.policy.state_dict()) == names
    for model in (plain, fused):
        learn(model, 240)
    torch.testing.assert_close(parameters(fused), parameters(plain), rtol=1e-5, atol=1e-6)


# --- Prediction ---------------------------------------------------------------------------------


def test_prediction_with_states_of_numpy() -> None:
    plain = build(envs=3, actions=Box(-1, 1, (2,), np.float32))
    policy = fusedrnn.sb3.fuse(copy.deepcopy(plain.policy))
    observations = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
    starts = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1]], dtype=bool)
    states: list[Any] = [None, None]
    for observation, start in zip(observations, starts, strict=True):
        actions = []
        for k, one in enumerate((plain, policy)):
            action, states[k] = one.predict(observation, states[k], start, deterministic=True)
            actions.append(action)
        np.testing.assert_allclose(actions[1], actions[0], rtol=1e-5, atol=1e-6)
        for a, b in zip(*states, strict=True):
            assert isinstance(b, np.ndarray)
            assert b.shape == (1, 3, 16)
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    # One observation that is no batch, and no beginnings.
    alone = [one.predict(observations[0, 0], deterministic=True) for one in (plain, policy)]
    np.testing.assert_allclose(alone[1][0], alone[0][0], rtol=1e-5, atol=1e-6)
    assert alone[1][0].shape == (2,)


# --- Files and copies ---------------------------------------------------------------------------


def test_files_of_models(tmp_path: Path) -> None:
    """A fused model's file has what a file of the model before had, and loads without fusedrnn."""
    plain, fused = build(), fusedrnn.sb3.fuse(build())
    plain.save(tmp_path / "plain.zip")
    fused.learn(80).save(tmp_path / "fused.zip")
    files = [zipfile.ZipFile(tmp_path / f"{name}.zip") for name in ("plain", "fused")]
    assert files[1].namelist() == files[0].namelist()
    for name in files[1].namelist():
        assert b"fusedrnn" not in files[1].read(name)

    loaded = sb3_contrib.RecurrentPPO.load(tmp_path / "fused.zip", fused.env, device="cpu")
    assert type(loaded.policy.lstm_actor) is nn.LSTM
    assert "_process_sequence" not in vars(loaded.policy)
    again = fusedrnn.sb3.fuse(
        sb3_contrib.RecurrentPPO.load(tmp_path / "fused.zip", fused.env, device="cpu")
    )
    for model in (loaded, again):
        torch.testing.assert_close(parameters(model), parameters(fused), rtol=0, atol=0)
    for model in (fused, loaded, again):
        learn(model, 160)  # Adam's averages are in the file too
    torch.testing.assert_close(parameters(again), parameters(fused), rtol=0, atol=0)
    torch.testing.assert_close(parameters(loaded), parameters(fused), rtol=1e-5, atol=1e-6)


def test_the_file_of_a_policy(tmp_path: Path) -> None:
    # The file of a policy lacks the options of the LSTM, so they must be sb3-contrib's defaults.
    policy = fusedrnn.sb3.fuse(build(lstm={"lstm_hidden_size": 256}).policy)
    policy.save(tmp_path / "policy.pt")
    loaded = type(policy).load(tmp_path / "policy.pt", device="cpu")
    assert type(loaded.lstm_actor) is nn.LSTM
    expected = policy.state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name])


def by_torch(policy: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p)), by_torch]
)
def test_copies_of_a_policy_are_fused(duplicate: Callable[[Any], Any]) -> None:
    model = fusedrnn.sb3.fuse(build())
    # sb3-contrib's policy keeps the graph of the last call with grad, which cannot be copied; one
    # without grad replaces it. This is so without fuse too.
    model.learn(80).predict(model.env.reset())
    policy = duplicate(model.policy)
    assert type(policy) is type(model.policy)
    assert type(policy.lstm_actor) is type(policy.lstm_critic) is fusedrnn.FusedLSTM
    policy.set_training_mode(True)
    assert policy._process_sequence is fusedrnn.sb3._process_sequence
    observation = model.env.reset()
    for a, b in zip(
        policy.predict(observation, deterministic=True)[1],
        model.policy.predict(observation, deterministic=True)[1],
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_copy_of_a_trained_policy_fails_as_without_fuse() -> None:
    for model in (build(), fusedrnn.sb3.fuse(build())):
        model.learn(80)
        with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
            copy.deepcopy(model.policy)


# --- The function -------------------------------------------------------------------------------


def test_fuse_twice_and_revert() -> None:
    policy = build().policy
    assert fusedrnn.sb3.fuse(policy) is policy
    held = dict(vars(policy))
    layers = [policy.lstm_actor, policy.lstm_critic]
    assert fusedrnn.sb3.fuse(policy) is policy
    assert vars(policy) == held
    assert [policy.lstm_actor, policy.lstm_critic] == layers

    # With torch.nn's layers the policy makes the calls of sb3-contrib again.
    fusedrnn.revert(policy)
    steps = Counter[str]()
    policy.lstm_actor.register_forward_hook(lambda *_: steps.update(["actor"]))
    states = (torch.zeros(1, 1, 16), torch.zeros(1, 1, 16))
    policy.get_distribution(torch.zeros(4, 3), states, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert steps["actor"] == 4
    fusedrnn.sb3.fuse(policy)
    policy.get_distribution(torch.zeros(4, 3), states, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert steps["actor"] == 5


def test_only_the_two_lstms_change() -> None:
    policy = build().policy
    policy.mine = nn.GRU(2, 2)
    fusedrnn.sb3.fuse(policy)
    assert type(policy.mine) is nn.GRU


def test_layers_that_were_fused_before() -> None:
    """Layers of `convert` or of a block of `patch_torch` keep sb3-contrib's loop until `fuse`."""
    with fusedrnn.patch_torch():
        model = build()
    layer = model.policy.lstm_actor
    assert type(layer) is fusedrnn.FusedLSTM
    fusedrnn.sb3.fuse(model)
    assert model.policy.lstm_actor is layer
    assert model.policy._process_sequence is fusedrnn.sb3._process_sequence
    model.learn(80)


class Own(nn.LSTM):
    """A subclass, which `convert` does not change."""


def test_a_layer_that_is_left() -> None:
    plain, fused = build(), build()
    for model in (plain, fused):
        model.policy.lstm_critic.__class__ = Own
    message = r"fusedrnn\.sb3\.fuse left 1 recurrent layer as it is:\n  lstm_critic .*a subclass of"
    with pytest.warns(UserWarning, match=message) as warned:
        fusedrnn.sb3.fuse(fused)
    assert warned[0].filename == __file__  # the warning names the line of the caller
    assert type(fused.policy.lstm_actor) is fusedrnn.FusedLSTM
    for model in (plain, fused):
        learn(model, 160)
    torch.testing.assert_close(parameters(fused), parameters(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "given", [None, "MlpLstmPolicy", nn.LSTM(2, 3), RecurrentActorCriticPolicy]
)
def test_what_is_no_model(given: Any) -> None:
    name = f"{type(given).__module__}.{type(given).__qualname__}".replace(".", r"\.")
    message = (
        f"^model must be a RecurrentPPO or a RecurrentActorCriticPolicy of sb3-contrib, got {name}$"
    )
    with pytest.raises(TypeError, match=message):
        fusedrnn.sb3.fuse(given)


def test_policies_without_lstms() -> None:
    env = DummyVecEnv([lambda: Episodes(VECTOR, Discrete(2))])
    model = stable_baselines3.PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
    message = "got a policy without: stable_baselines3.common.policies.ActorCriticPolicy"
    for given in (model, model.policy):
        with pytest.raises(ValueError, match=message):
            fusedrnn.sb3.fuse(given)
    assert type(model.policy) is ActorCriticPolicy
    policy = build().policy
    policy.lstm_actor = policy.lstm_critic = None
    with pytest.raises(ValueError, match=r"got a policy without: .*RecurrentActorCriticPolicy"):
        fusedrnn.sb3.fuse(policy)
    with pytest.raises(ValueError, match=r"model must have a policy, got .*RecurrentPPO without"):
        fusedrnn.sb3.fuse(build(_init_setup_model=False))


def test_policies_with_a_process_sequence_of_their_own() -> None:
    class Policy(RecurrentActorCriticPolicy):
        @staticmethod
        def _process_sequence(*arguments: Any) -> Any:
            return process(*arguments)

    model = build(Policy)  # type: ignore[arg-type]
    other = build()
    other.policy._process_sequence = process
    for given in (model, other.policy):
        with pytest.raises(ValueError, match=r"by sb3-contrib's _process_sequence, got .*Policy "):
            fusedrnn.sb3.fuse(given)
    assert type(other.policy.lstm_actor) is type(model.policy.lstm_actor) is nn.LSTM


@pytest.mark.parametrize("package", ["sb3_contrib", "stable_baselines3"])
def test_import_without_the_package(package: str) -> None:
    program = f"import sys\nsys.modules[{package!r}] = None\nimport fusedrnn\nimport fusedrnn.sb3"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    if package == "sb3_contrib":
        assert last == (
            "ModuleNotFoundError: fusedrnn.sb3 needs the package sb3_contrib, which is not "
            "installed: pip install sb3-contrib"
        )
    assert last.startswith("ModuleNotFoundError: ")
    assert package in last

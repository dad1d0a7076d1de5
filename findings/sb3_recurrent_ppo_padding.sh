#!/usr/bin/env bash
# sb3-contrib 2.9.2: RecurrentPPO's padding can turn its parameters into NaN.
#
# One would expect the steps that pad short episodes to have no effect: RecurrentPPO masks them in every loss. But
# it takes exp(log_prob - old_log_prob) of all steps first and the mask afterwards (ppo_recurrent/ppo_recurrent.py,
# train). In padding old_log_prob is 0, so where the log probability exceeds 88 the exponential is infinite in
# float32, and its gradient is 0 * inf = NaN, which the mask cannot take back. This needs only many continuous actions
# and a small standard deviation, such as 30 actions with log_std_init=-4. The next rollout then ends in an error of
# torch's Normal. With Python 3.11 the script prints:
#     log_std_init=-2.0: ok
#     log_std_init=-4.0: NaN
#
# The script exits with 0 if this is still so, and with 1 if it has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 sb3-contrib==2.9.2 stable-baselines3==2.9.2 gymnasium==1.4.0

cat >"$folder/program.py" <<'PROGRAM'
import gymnasium
import numpy as np
import torch
from sb3_contrib import RecurrentPPO

torch.set_num_threads(1)


class Episodes(gymnasium.Env):
    """Episodes of the given lengths in turns, and actions that change nothing."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (30,), np.float32)

    def __init__(self, lengths):
        self.lengths, self.episode = lengths, 0

    def reset(self, *, seed=None, options=None):
        self.left = self.lengths[self.episode % len(self.lengths)]
        self.episode += 1
        return np.full(3, 0.5, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.full(3, 0.5, np.float32), 0.0, self.left == 0, False, {}


def learn(log_std_init, lengths):
    options = {"n_steps": 36, "batch_size": 36, "seed": 0, "device": "cpu"}
    policy = {"log_std_init": log_std_init}
    model = RecurrentPPO("MlpLstmPolicy", Episodes(lengths), policy_kwargs=policy, **options)
    try:
        model.learn(72)
    except ValueError:  # of torch.distributions.Normal
        pass
    return "NaN" if any(p.isnan().any() for p in model.policy.parameters()) else "ok"


results = [learn(-2.0, [1, 9]), learn(-4.0, [1, 9])]
print("log_std_init=-2.0:", results[0])
print("log_std_init=-4.0:", results[1])
raise SystemExit(0 if results == ["ok", "NaN"] else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"

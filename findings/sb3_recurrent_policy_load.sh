#!/usr/bin/env bash
# sb3-contrib 2.9.2: a recurrent policy that was saved does not load, unless its LSTM has the default size.
#
# One would expect `Policy.load` to make the policy that `save` wrote, as it does for the policies of
# stable-baselines3, which store their constructor's arguments. RecurrentActorCriticPolicy
# (common/recurrent/policies.py) has no _get_constructor_parameters of its own, so its lstm_hidden_size,
# n_lstm_layers, shared_lstm, enable_critic_lstm and lstm_kwargs are not in the file, and load makes an LSTM of the
# default size. Files of a whole RecurrentPPO are not affected: they hold policy_kwargs. With Python 3.11 the script
# prints:
#     lstm_hidden_size=256: loads
#     lstm_hidden_size=16: RuntimeError
#     lstm_hidden_size of the file: None
#
# The script exits with 0 if this is still so, and with 1 if it has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 sb3-contrib==2.9.2 stable-baselines3==2.9.2 gymnasium==1.4.0

cat >"$folder/program.py" <<'PROGRAM'
import io

import gymnasium
import numpy as np
import torch
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy as Policy

box = gymnasium.spaces.Box(-1, 1, (3,), np.float32)


def load_again(size):
    """Saves and loads a policy; returns what came, and the size in the file."""
    file = io.BytesIO()
    Policy(box, box, lambda _: 3e-4, lstm_hidden_size=size).save(file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)["data"].get("lstm_hidden_size")
    file.seek(0)
    try:
        Policy.load(file, device="cpu")
    except RuntimeError:
        return "RuntimeError", stored
    return "loads", stored


default, _ = load_again(256)
other, stored = load_again(16)
print("lstm_hidden_size=256:", default)
print("lstm_hidden_size=16:", other)
print("lstm_hidden_size of the file:", stored)
raise SystemExit(0 if (default, other, stored) == ("loads", "RuntimeError", None) else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"

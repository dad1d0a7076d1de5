"""Runs the LSTMs of sb3-contrib's recurrent policies as fused layers, whole sequences in one call.

    import fusedrnn.sb3

    model = fusedrnn.sb3.fuse(RecurrentPPO("MlpLstmPolicy", env))
    model.learn(100_000)

A minibatch of RecurrentPPO is a batch of padded sequences. If an episode begins in any of them,
sb3-contrib calls the LSTM once for each step, because torch.nn's LSTM cannot begin anew within a
sequence. That is nearly every minibatch unless episodes are long. A fused LSTM takes the beginnings
as ``starts=``, so one call does. Outputs and gradients are the same up to rounding.

The import of this module needs sb3-contrib (tested with 2.9.2).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor, nn

from ._conversion import convert_for
from ._importing import need
from ._modules import FusedLSTM

__all__ = ["fuse"]

need("sb3_contrib", "fusedrnn.sb3")  # it requires stable_baselines3
# import_module gives Any, so mypy needs neither package.
_Policy = import_module("sb3_contrib.common.recurrent.policies").RecurrentActorCriticPolicy
_Algorithm = import_module("stable_baselines3.common.base_class").BaseAlgorithm
_AnyPolicy = import_module("stable_baselines3.common.policies").BaseModel

Model = TypeVar("Model")


def fuse(model: Model) -> Model:
    """Makes the LSTMs of a recurrent model or policy fused layers, and runs them in single calls.

    The model is changed in place. ``lstm_actor``, and ``lstm_critic`` if there is one, stay the
    same objects with the same Parameters, so ``policy.optimizer`` continues to work. The policy
    keeps its class. It gets an attribute ``_process_sequence``, a function of this module, in place
    of the static method of this name, through which sb3-contrib makes every call of an LSTM. So a
    copy, a pickle or a file of `torch.save` of the policy is fused too. A second call of `fuse`
    changes nothing. `fusedrnn.revert` makes the layers torch.nn's again, and the policy then runs
    them as sb3-contrib does.

    ``model.save`` writes the file that it writes without `fuse`. ``RecurrentPPO.load`` makes a
    model with torch.nn's layers from it, which may be fused again:

        model = fusedrnn.sb3.fuse(RecurrentPPO.load("model.zip", env))

    With dropout between layers (``lstm_kwargs``) the masks of a sequence are drawn in one call, and
    those of sb3-contrib step by step, so trainings from one seed may then differ.

    Args:
        model: a `RecurrentPPO` model, or another algorithm or a policy by itself, whose policy is a
            `RecurrentActorCriticPolicy` (``MlpLstmPolicy``, ``CnnLstmPolicy``,
            ``MultiInputLstmPolicy`` or a subclass).

    Returns:
        `model`.

    Raises:
        TypeError: `model` is neither an algorithm nor a policy.
        ValueError: the model has no policy yet, the policy has no LSTMs, or it has a
            ``_process_sequence`` of its own, which `fuse` would replace; in the last case
            `fusedrnn.convert` changes the layers alone.

    Warns:
        UserWarning: a layer was left as it is, for a reason that `fusedrnn.convert` names. Such a
            layer runs as in sb3-contrib.
    """
    policy: Any = model
    if isinstance(model, _Algorithm):
        policy = getattr(model, "policy", None)
        if policy is None:
            raise ValueError(
                f"model must have a policy, got {_name(model)} without one; call its _setup_model()"
            )
    elif not isinstance(model, _AnyPolicy):
        raise TypeError(
            "model must be a RecurrentPPO or a RecurrentActorCriticPolicy of sb3-contrib, got "
            f"{_name(model)}"
        )
    layers = nn.ModuleDict()
    if isinstance(policy, _Policy):
        for name in ("lstm_actor", "lstm_critic"):
            if (layer := getattr(policy, name, None)) is not None:
                layers[name] = layer
    if not layers:
        raise ValueError(
            "model must have the LSTMs of a RecurrentActorCriticPolicy, got a policy without: "
            f"{_name(policy)}"
        )
    if policy._process_sequence not in (_Policy._process_sequence, _process_sequence):
        raise ValueError(
            "model must run its LSTMs by sb3-contrib's _process_sequence, got "
            f"{_name(policy)} with one of its own; fusedrnn.convert changes the layers alone"
        )
    convert_for("sb3.fuse", layers)
    # An attribute that holds a function is called without self, as the static method is. It is
    # pickled by its name, and deepcopy keeps it, so no class has to be made for each policy.
    policy._process_sequence = _process_sequence
    return model


def _process_sequence(
    features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: nn.Module
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Takes the place of RecurrentActorCriticPolicy._process_sequence; pickles have its name.

    Args:
        features: ``[N*T, I]``, or more sizes behind, the steps of each sequence one after another.
        lstm_states: h and c ``[L, N, H]`` before the first step.
        episode_starts: ``[N*T]``, not zero where an episode begins at the step.
        lstm: the layer.

    Returns:
        y ``[N*T, H]`` and the states after the last step.
    """
    if not isinstance(lstm, FusedLSTM):
        result: tuple[Tensor, tuple[Tensor, Tensor]]
        result = _Policy._process_sequence(features, lstm_states, episode_starts, lstm)
        return result
    N = lstm_states[0].shape[1]
    x = features.reshape(N, -1, lstm.input_size).transpose(0, 1)
    starts = episode_starts.reshape(N, -1).transpose(0, 1).bool()
    # A rollout has T = 1. There too starts= costs least: about 8 µs, where the products of h and c
    # with 1 - episode_starts cost 20 µs, and the question whether any episode begins 14 µs.
    y, states = lstm(x, lstm_states, starts=starts)
    return y.transpose(0, 1).flatten(0, 1), states


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"

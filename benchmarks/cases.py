"""Builds the layers of a row, torch.nn's and ours with the same weights, and their input.

Everything comes from one seed, so that every process has the same numbers. This module also judges
parity: it compares both layers with torch.nn in the next wider dtype and relates our error to
torch.nn's own.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn

from .measure import TimedCall
from .shapes import FORWARD, TRAINING, Row

Layer = nn.Module
Tensors = dict[str, Tensor]

# torch.nn's class and ours, by the cell and by whether a row is one call of a cell module.
LAYERS: dict[tuple[str, bool], tuple[type[Layer], type[Layer]]] = {
    ("lstm", False): (nn.LSTM, fusedrnn.FusedLSTM),
    ("gru", False): (nn.GRU, fusedrnn.FusedGRU),
    ("rnn", False): (nn.RNN, fusedrnn.FusedRNN),
    ("lstm", True): (nn.LSTMCell, fusedrnn.FusedLSTMCell),
    ("gru", True): (nn.GRUCell, fusedrnn.FusedGRUCell),
    ("rnn", True): (nn.RNNCell, fusedrnn.FusedRNNCell),
}
_WIDER = {
    torch.float64: torch.float64,
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
# Ours may differ by this many roundings in addition to twice torch.nn's error. float64 can only be
# compared with torch.nn in float64, so torch.nn's error counts as zero there.
_ROUNDINGS = {torch.float64: 256, torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


@dataclass
class Case:
    """The layers, the input and the gradient of the output of a row."""

    row: Row
    torch: Layer
    ours: Layer
    x: Any  # [T, N, I], a PackedSequence of it, or [N, I] for one call of a cell module
    d_y: Tensor  # the gradient of y, in y's form: [T, N, D*P], [S, D*P] or [N, H]


def build(row: Row) -> Case:
    """Makes the layers, the input and the gradient of the output of a row."""
    generator = torch.Generator().manual_seed(7)
    dtype = row.torch_dtype
    kinds = LAYERS[row.cell, row.single]
    options: dict[str, Any] = {"dtype": dtype}
    if not row.single:
        options |= {"num_layers": row.L, "bidirectional": row.D == 2}
    if row.P:
        options["proj_size"] = row.P
    torch.manual_seed(7)
    with _quiet():
        theirs, ours = (kind(row.I, row.H, **options) for kind in kinds)
    ours.load_state_dict(theirs.state_dict())

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if row.single:
        return Case(row, theirs, ours, randn(row.N, row.I), randn(row.N, row.H))
    x: Any = randn(row.T, row.N, row.I)
    d_y = randn(row.T, row.N, row.D * row.out)
    if row.packed:
        lengths = torch.tensor(row.lengths())
        x, d_y_packed = (pack_padded_sequence(t, lengths, enforce_sorted=False) for t in (x, d_y))
        d_y = d_y_packed.data
    return Case(row, theirs, ours, x, d_y)


def there(case: Case, device: torch.device) -> Case:
    """Returns the case with its layers and tensors on a device."""
    return replace(
        case,
        torch=case.torch.to(device),
        ours=case.ours.to(device),
        x=case.x.to(device),
        d_y=case.d_y.to(device),
    )


def run(layer: Layer, x: Any) -> tuple[Tensor, list[Tensor]]:
    """Runs a layer or cell module. Returns y (its data, if packed) and the final states."""
    result = layer(x)
    if isinstance(result, Tensor):
        return result, [result]
    if isinstance(layer, nn.RNNBase):
        y, states = result
        y = y.data if isinstance(y, PackedSequence) else y
    else:
        y, states = result[0], result
    return y, list(states) if isinstance(states, tuple) else [states]


@contextmanager
def mode_of(layer: Layer, mode: str) -> Iterator[None]:
    """The context in which a mode is timed: inference_mode and eval, or gradients and train."""
    layer.train(mode == TRAINING)
    with _quiet(), torch.inference_mode(mode == FORWARD):
        yield


def step(layer: Layer, x: Any, d_y: Tensor, mode: str) -> TimedCall:
    """Returns the function that is timed; it must be called within `mode_of`."""
    if mode == FORWARD:
        return lambda: layer(x)
    x, leaf = with_grad(x)
    leaves = [leaf, *layer.parameters()]

    def training() -> None:
        run(layer, x)[0].backward(d_y)
        for tensor in leaves:
            tensor.grad = None

    return training


def with_grad(x: Any) -> tuple[Any, Tensor]:
    """Returns the input as a leaf that takes a gradient, and that leaf's tensor."""
    if not isinstance(x, PackedSequence):
        leaf = x.detach().requires_grad_()
        return leaf, leaf
    leaf = x.data.detach().requires_grad_()
    return PackedSequence(leaf, x.batch_sizes, x.sorted_indices, x.unsorted_indices), leaf


def padded(case: Case) -> tuple[Tensor, Tensor]:
    """The input as [T, N, I] and the lengths [N], for libraries without a PackedSequence."""
    if case.row.packed:
        x, lengths = pad_packed_sequence(case.x, total_length=case.row.T)
        return x, lengths
    return case.x, torch.full((case.row.N,), case.row.T)


def live(case: Case, padded: Tensor) -> Tensor:
    """Returns [T, N, ·] as a PackedSequence's data if the row is packed, else unchanged."""
    if not case.row.packed:
        return padded
    order, sizes = case.x.sorted_indices, case.x.batch_sizes.tolist()
    return torch.cat([padded[t, order[:n]] for t, n in enumerate(sizes)])


@dataclass(frozen=True)
class Parity:
    """Worst errors over outputs, final states and gradients, and whether ours may be timed."""

    ours: float
    torch: float
    limit: float
    worst: str  # the name of the tensor whose error is nearest to its limit, or above it
    right: bool
    seconds: float  # the faster one of the two runs

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """What ours are compared with: torch.nn in the next wider dtype, and its own errors."""

    exact: Tensors
    errors: dict[str, float]
    seconds: float  # of torch.nn in the row's dtype


def reference(case: Case, mode: str) -> Reference:
    """Runs torch.nn in the next wider dtype and in the row's own."""
    exact = expected(case, mode)
    start = time.perf_counter()
    theirs = tensors(case.torch, case.x, case.d_y, mode)
    seconds = time.perf_counter() - start
    return Reference(exact, {name: error(theirs[name], exact[name]) for name in exact}, seconds)


def check(
    case: Case,
    mode: str,
    against: Reference | None = None,
    in_backward: AbstractContextManager[Any] | None = None,
) -> Parity:
    """Compares ours with torch.nn in the next wider dtype.

    An error is the largest difference over the largest value. Ours may be twice torch.nn's own in
    the row's dtype, plus a few roundings. `against` saves the time of computing it again, and our
    backward pass runs within `in_backward`.
    """
    dtype = case.row.torch_dtype
    start = time.perf_counter()
    results = tensors(case.ours, case.x, case.d_y, mode, in_backward)
    seconds = time.perf_counter() - start
    against = against or reference(case, mode)
    seconds = min(seconds, against.seconds)
    worst = None
    for name, exact in against.exact.items():
        ours, theirs = error(results[name], exact), against.errors[name]
        limit = 2 * theirs + _ROUNDINGS[dtype] * torch.finfo(dtype).eps
        right = ours <= limit and math.isfinite(ours)
        used = ours / limit if right else math.inf
        if worst is None or used > worst[0]:
            worst = (used, Parity(ours, theirs, limit, name, right, seconds))
    assert worst is not None
    return worst[1]


def expected(case: Case, mode: str) -> Tensors:
    """Returns torch.nn's outputs, final states and gradients in the next wider dtype."""
    dtype = _WIDER[case.row.torch_dtype]
    wide = copy.deepcopy(case.torch).to(dtype)
    return tensors(wide, case.x.to(dtype), case.d_y.to(dtype), mode)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; infinite for nan and bad shapes."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return math.inf
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / max(expected.double().abs().max().item(), 1e-300)


def tensors(
    layer: Layer,
    x: Any,
    d_y: Tensor,
    mode: str,
    in_backward: AbstractContextManager[Any] | None = None,
) -> Tensors:
    """Runs a layer and returns y, the final states and, in training, the gradients."""
    with mode_of(layer, mode):
        leaf = None
        if mode == TRAINING:
            x, leaf = with_grad(x)
            layer.zero_grad(set_to_none=True)
        y, states = run(layer, x)
        found = {"y": y.detach()} | {f"state {i}": s.detach() for i, s in enumerate(states)}
        if leaf is not None:
            with in_backward or nullcontext():
                y.backward(d_y)
            named = {"d_x": leaf} | {f"d_{n}": p for n, p in layer.named_parameters()}
            for name, tensor in named.items():
                assert tensor.grad is not None, f"{name} has no gradient"
                found[name] = tensor.grad
            layer.zero_grad(set_to_none=True)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the warning that torch.nn gives for the first projected LSTM of a process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections")
        yield

"""Pairs of our module and torch.nn's, inputs, runs with gradients, and errors, for all tests."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

import fusedrnn
from fusedrnn import functional as F
from fusedrnn._library import CELLS as SPECS
from fusedrnn._library import cuda_problem, torch_lacks_cuda

Tensors = dict[str, Tensor]


def why_not_on_cuda() -> str:
    """The reason why no test runs on a GPU, or "" if tests run there."""
    if lacks := torch_lacks_cuda():
        return lacks
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return cuda_problem(torch.cuda.current_device())


# The devices that the fixture `device` goes through.
DEVICES = ["cpu"] if why_not_on_cuda() else ["cpu", "cuda"]


States = tuple[Tensor, ...]  # h, or h and c


class Naive(nn.RNNBase):
    """A layer that torch.nn does not have, computed step by step, to compare ours with.

    A subclass implements its step after the formula and uses nothing of fusedrnn._reference. It
    computes in its own dtype, as torch.nn's layers do.
    """

    def step(self, x: Tensor, states: States, suffix: str) -> States:
        """One step of x [N, I]. The names of its parameters end in `suffix`."""
        raise NotImplementedError

    def gates(self, kind: str, suffix: str, count: int) -> list[Tensor]:
        """The rows of a parameter for each gate, or zeros for an absent bias."""
        p = getattr(self, kind + suffix, None)
        if p is None:
            return [torch.zeros((), dtype=self.weight_ih_l0.dtype)] * count
        # Biases may change in place before backward, which slices allow and chunk() does not.
        H = self.hidden_size
        return [p[k * H : (k + 1) * H] for k in range(count)]

    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        packed = isinstance(input, PackedSequence)
        unbatched = not packed and input.dim() == 2
        if packed:
            padded, lengths = pad_packed_sequence(input)
        else:
            padded = input.unsqueeze(1) if unbatched else input
            padded = padded.transpose(0, 1) if self.batch_first and not unbatched else padded
            lengths = torch.full((padded.size(1),), padded.size(0))
        D = 2 if self.bidirectional else 1
        has_c = isinstance(self, nn.LSTM)
        if hx is None:
            zeros = padded.new_zeros(self.num_layers * D, padded.size(1), self.hidden_size)
            initial = (zeros, zeros) if has_c else (zeros,)
        else:
            initial = tuple(hx) if has_c else (hx,)
            initial = tuple(s.unsqueeze(1) for s in initial) if unbatched else initial
        # The sequences of a plain batch run together, and those of a packed batch one by one.
        N = padded.size(1)
        groups = [slice(n, n + 1) for n in range(N)] if packed else [slice(0, N)]
        rows = [padded[: int(lengths[g][0]) if packed else None, g] for g in groups]
        finals: list[States] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.training and self.dropout > 0:
                assert not packed
                rows = [nn.functional.dropout(rows[0], self.dropout)]
            halves = []
            for d in range(D):
                suffix = f"_l{layer}{'_reverse' if d == 1 else ''}"
                runs = [
                    self._sequences(row, tuple(s[layer * D + d][g] for s in initial), suffix)
                    for row, g in zip(rows, groups, strict=True)
                ]
                halves.append([y for y, _ in runs])
                finals.append(tuple(map(torch.cat, zip(*(last for _, last in runs), strict=True))))
            rows = [torch.cat(both, dim=-1) for both in zip(*halves, strict=True)]
        last = [torch.stack(states) for states in zip(*finals, strict=True)]
        if packed:
            sequences = [row.squeeze(1) for row in rows]
            y: Any = pack_sequence(sequences, enforce_sorted=input.unsorted_indices is None)
        elif unbatched:
            y, last = rows[0].squeeze(1), [s.squeeze(1) for s in last]
        else:
            y = rows[0].transpose(0, 1) if self.batch_first else rows[0]
        return y, tuple(last) if has_c else last[0]

    def _sequences(self, x: Tensor, states: States, suffix: str) -> tuple[Tensor, States]:
        """Runs sequences of the same length: x [T, N, I], states [N, H]."""
        y: list[Tensor] = []
        reverse = suffix.endswith("_reverse")
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            states = self.step(x[t], states, suffix)
            y.append(states[0])
        return torch.stack(y[::-1] if reverse else y), states


class NaiveGRUResetBefore(Naive, nn.GRU):
    """The GRU of Cho et al. 2014, which FusedGRU(reset_after=False) is compared with."""

    def step(self, x: Tensor, states: States, suffix: str) -> States:
        (h,) = states
        W_r, W_z, W_n = self.gates("weight_ih", suffix, 3)
        U_r, U_z, U_n = self.gates("weight_hh", suffix, 3)
        b_r, b_z, b_n = self.gates("bias_ih", suffix, 3)
        c_r, c_z, c_n = self.gates("bias_hh", suffix, 3)
        r = torch.sigmoid(x @ W_r.T + b_r + h @ U_r.T + c_r)
        z = torch.sigmoid(x @ W_z.T + b_z + h @ U_z.T + c_z)
        n = torch.tanh(x @ W_n.T + b_n + (r * h) @ U_n.T + c_n)
        return ((1 - z) * n + z * h,)


class NaivePeepholeLSTM(Naive, nn.LSTM):
    """The LSTM of Gers & Schmidhuber 2000, which FusedLSTM(peephole=True) is compared with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        H = self.hidden_size
        for names in self._all_weights:
            weight = nn.Parameter(torch.empty(3 * H, dtype=self.weight_ih_l0.dtype))
            nn.init.uniform_(weight, -(H**-0.5), H**-0.5)
            names.append(names[0].replace("weight_ih", "weight_ch"))
            self.register_parameter(names[-1], weight)
        for name in (name for names in self._all_weights for name in names):
            self._parameters[name] = self._parameters.pop(name)

    def step(self, x: Tensor, states: States, suffix: str) -> States:
        h, c = states
        p_i, p_f, p_o = self.gates("weight_ch", suffix, 3)
        parts = (self.gates(kind, suffix, 4) for kind in ("weight_ih", "weight_hh"))
        biases = (self.gates(kind, suffix, 4) for kind in ("bias_ih", "bias_hh"))
        i, f, g, o = (x @ W.T + b + h @ U.T + d for W, U, b, d in zip(*parts, *biases, strict=True))
        new_c = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
        return torch.sigmoid(o + p_o * new_c) * torch.tanh(new_c), new_c


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the ops, our layer for it, and torch.nn's layer or a naive one."""

    name: str
    ours: type[nn.RNNBase]
    theirs: type[nn.RNNBase]
    options: tuple[tuple[str, Any], ...] = ()  # for both constructors
    ours_only: tuple[tuple[str, Any], ...] = ()

    @property
    def has_c(self) -> bool:
        return SPECS[self.name].has_c

    @property
    def projects(self) -> bool:
        return SPECS[self.name].projects

    def make(
        self, I: int, H: int, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Makes our layer on the device, and torch.nn's on the CPU, with the same weights.

        torch.nn's layer draws the weights with torch's seed.
        """
        if self.projects:
            kwargs["proj_size"] = max(1, H // 2)
        kwargs = dict(self.options) | kwargs
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="dropout option adds dropout")
            theirs = self.theirs(I, H, **kwargs)
            ours = self.ours(I, H, **kwargs, **dict(self.ours_only))
        ours.load_state_dict(theirs.state_dict())
        return ours.to(device), theirs

    def __str__(self) -> str:
        return self.name


CELLS = [
    Cell("lstm", fusedrnn.FusedLSTM, nn.LSTM),
    Cell("lstm_proj", fusedrnn.FusedLSTM, nn.LSTM),
    Cell("gru", fusedrnn.FusedGRU, nn.GRU),
    Cell(
        "gru_reset_before",
        fusedrnn.FusedGRU,
        NaiveGRUResetBefore,
        ours_only=(("reset_after", False),),
    ),
    Cell("rnn_tanh", fusedrnn.FusedRNN, nn.RNN),
    Cell("rnn_relu", fusedrnn.FusedRNN, nn.RNN, options=(("nonlinearity", "relu"),)),
    Cell("lstm_peephole", fusedrnn.FusedLSTM, NaivePeepholeLSTM, ours_only=(("peephole", True),)),
]

# For each cell, the function of fusedrnn.functional with the options that choose the cell.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "lstm": F.lstm,
    "lstm_proj": F.lstm,
    "gru": partial(F.gru, reset_after=True),
    "gru_reset_before": partial(F.gru, reset_after=False),
    "rnn_tanh": partial(F.rnn, nonlinearity="tanh"),
    "rnn_relu": partial(F.rnn, nonlinearity="relu"),
    "lstm_peephole": partial(F.lstm, peephole=True),
}
# For each cell of the ops, our cell module.
CELL_MODULES: dict[str, Callable[..., Any]] = {
    "lstm": fusedrnn.FusedLSTMCell,
    "gru": fusedrnn.FusedGRUCell,
    "gru_reset_before": lambda *a, **k: fusedrnn.FusedGRUCell(*a, reset_after=False, **k),
    "rnn_tanh": fusedrnn.FusedRNNCell,
    "rnn_relu": lambda *a, **k: fusedrnn.FusedRNNCell(*a, nonlinearity="relu", **k),
}
BY_NAME = {cell.name: cell for cell in CELLS}
# The cells for which torch.nn has a layer.
TORCH_CELLS = [cell for cell in CELLS if not issubclass(cell.theirs, Naive)]


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float64,
    seed: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Normal numbers, drawn in float64 on the CPU: for each dtype and device the same, rounded."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)


def make_states(module: nn.RNNBase, N: int | None, dtype: torch.dtype) -> Any:
    """Makes hx for a module: (h_0, c_0) or h_0, without the batch if N is None."""
    LD = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if N is None else (N,)
    device = device_of(module)
    h = randn(LD, *batch, module.proj_size or module.hidden_size, dtype=dtype, device=device)
    if not next(cell for cell in CELLS if isinstance(module, (cell.ours, cell.theirs))).has_c:
        return h
    return h, randn(LD, *batch, module.hidden_size, dtype=dtype, device=device)


def flat(result: Any) -> list[Tensor]:
    """Makes a list of the tensors of a module's result (or of hx)."""
    if result is None:
        return []
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to each tensor of an input or a state, keeping the structure."""
    if value is None:
        return None
    if isinstance(value, PackedSequence):
        return PackedSequence(function(value.data), *value[1:])
    if isinstance(value, Tensor):
        return function(value)
    return tuple(map_tensors(function, part) for part in value)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next(module.parameters()).device


def on(device: torch.device, value: Any) -> Any:
    """Moves a tensor, a PackedSequence, or a tuple of them to a device. None stays None."""
    if value is None:
        return None
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(on(device, part) for part in value)
    return value.to(device)


def run(module: nn.Module, input: Any, hx: Any = None, seed: int = 0, **kwargs: Any) -> Tensors:
    """Runs forward and backward; returns outputs, and gradients of inputs, states, weights.

    The loss is a weighted sum of all outputs with random weights that depend on the seed alone.
    torch's generator is seeded before forward, for dropout. The computation is on the module's
    device, and the returned tensors are on the CPU.
    """
    device = device_of(module)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_()

    input, hx = (map_tensors(leaf, on(device, value)) for value in (input, hx))
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = flat(module(input, hx, **kwargs))
    names = ["h_n", "c_n"] if isinstance(module, RNNCellBase) else ["y", "h_n", "c_n"]
    result = dict(zip(names, outputs, strict=False))
    weights = [randn(*o.shape, seed=1000 + k).to(o) for k, o in enumerate(outputs)]
    torch.autograd.backward(outputs, weights)
    for name, leaves in (("d_x", [input]), ("d_h0", flat(hx)[:1]), ("d_c0", flat(hx)[1:])):
        for t in leaves:
            gradient = t.data.grad if isinstance(t, PackedSequence) else t.grad
            assert gradient is not None, name
            result[name] = gradient
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        result["d_" + name] = parameter.grad
    assert all(t.device == device for t in result.values())
    return {name: t.detach().clone().cpu() for name, t in result.items()}


def assert_close(actual: Tensor, expected: Tensor, limit: float = 1e-12, **options: Any) -> None:
    """Asserts that values agree. The tensors may be on different devices."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=limit, atol=limit, **options)


def error(actual: Tensor, reference: Tensor) -> float:
    """The largest absolute difference, divided by the reference's largest absolute value."""
    assert actual.shape == reference.shape, (actual.shape, reference.shape)
    if reference.numel() == 0:
        return 0.0
    scale = reference.double().abs().max().item()
    difference = (actual.double() - reference.double()).abs().max().item()
    return difference / scale if scale > 0 else difference


def assert_same(actual: Tensors, expected: Tensors, limit: float = 1e-12) -> None:
    """Asserts that all tensors of two runs agree to a relative error."""
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name]) for name in expected}
    wrong = {name: e for name, e in errors.items() if not e <= limit}
    assert not wrong, f"errors above {limit}: {wrong}"


def ragged(
    lengths: Sequence[int],
    I: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> list[Tensor]:
    """Makes sequences of these lengths."""
    return [randn(T, I, dtype=dtype, device=device) for T in lengths]


def pad(sequences: list[Tensor], T: int, fill: float, batch_first: bool = False) -> Tensor:
    """Pads sequences to T steps with a number. With nan, a read of the padding shows."""
    x = pad_sequence(sequences, padding_value=fill)
    if x.size(0) < T:
        x = torch.cat([x, x.new_full((T - x.size(0), *x.shape[1:]), fill)])
    return x.transpose(0, 1) if batch_first else x


def options(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """All combinations of keyword arguments."""
    combinations: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        combinations = [{**c, name: v} for c in combinations for v in values]
    yield from combinations


LENGTHS = [3, 7, 6, 1, 6]  # steps of five sequences


def make_input(form: str, sequences: list[Tensor], fill: float = 0.0) -> tuple[Any, dict[str, Any]]:
    """Makes the input and the keyword arguments of a module from sequences.

    A plain batch has as many steps as the longest sequence, and shorter ones are repeated in it. A
    padded batch has two steps more.
    """
    lengths = [len(s) for s in sequences]
    T = max(lengths)
    if form == "plain":
        return torch.stack([s.repeat(T, 1)[:T] for s in sequences], 1), {}
    if form == "packed":
        is_sorted = lengths == sorted(lengths, reverse=True)
        return torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=is_sorted), {}
    return pad(sequences, T + 2, fill), {"lengths": torch.tensor(lengths)}

"""What is checked, in which order: a list of tasks that a supervisor gives to a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "gru_reset_before", "lstm_proj")
# What a GPU can be asked for. Per step first: it is the simpler one, so that of two failures the
# first says more.
REGIMES = ("per_step", "resident")
DEVICES = ("cuda", "cpu", "interpreter")

REGIME = "FUSEDRNN_CUDA_REGIME"
SPIN_LIMIT = "FUSEDRNN_CUDA_SPIN_LIMIT"
ALLOCATORS = {
    "without caching": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    # Both names of the setting: torch 2.10 and later read the first, all read the second.
    "cudaMallocAsync": {
        "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync",
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
    },
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing that a worker is asked to do.

    Args:
        kind: what, the name of a function of checks.py.
        options: its arguments.
        env: variables of the process that does it, which is then another one than before.
        fresh: whether that process must have done nothing else.
        loses_context: whether the GPU's context is expected to be lost by it.
    """

    kind: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fresh: bool = False
    loses_context: bool = False

    @property
    def label(self) -> str:
        """What it is called."""
        return " ".join([self.kind, *(value for value in self.options.values() if value)])

    @property
    def regime(self) -> str:
        """The regime that it asks for; "" for none."""
        return self.options.get("regime", "")

    @property
    def subject(self) -> tuple[str, ...]:
        """What it looks at: a cell in a regime. Where that took two workers it is left alone."""
        cell = self.options.get("cell", "")
        return (cell, self.regime) if cell else ()


# Large sizes come last: their references take the CPU's time, and what is timed is checked too.
GROUPS = ("limits", "smoke", "parity", "sections", "surroundings", "stress", "large")
# Of a dry run: tasks that fail on purpose, each in its own way.
PLANTED = ("hang", "crash", "wrong", "raise")


def tasks_of(groups: Sequence[str], device: str, quick: bool) -> list[Task]:
    """The tasks of some groups, in the order in which they are done.

    Raises:
        ValueError: there is no group, or planted task, of that name.
    """
    found: list[Task] = []
    for group in groups:
        if group in PLANTED:
            found.append(Task(group))
        elif group in GROUPS:
            found += _GROUPS[group](device, quick)
        else:
            names = ", ".join((*GROUPS, *PLANTED))
            raise ValueError(f"tasks must be of {names}, got {group!r}")
    return found


def regimes_of(device: str) -> tuple[str, ...]:
    """The regimes that can be asked for there; the CPU has none to choose from."""
    return ("",) if device == "cpu" else REGIMES


def _limits(device: str, quick: bool) -> Iterator[Task]:
    if device == "cuda":
        yield Task("limits")


def _smoke(device: str, quick: bool) -> Iterator[Task]:
    yield Task("products")
    for regime in regimes_of(device):
        yield Task("smoke", {"regime": regime})
    if device != "cpu":
        yield Task("kernels")


def _parity(device: str, quick: bool) -> Iterator[Task]:
    yield from _parity_at("small", device)


def _large(device: str, quick: bool) -> Iterator[Task]:
    if not quick:
        yield from _parity_at("large", device)


def _parity_at(size: str, device: str) -> Iterator[Task]:
    for cell in CELLS:
        for regime in regimes_of(device):
            if cell != "lstm_proj" or regime != "resident":
                yield Task("parity", {"cell": cell, "size": size, "regime": regime})


def _sections(device: str, quick: bool) -> Iterator[Task]:
    if device != "cpu":
        yield Task("tf32")
    if device == "interpreter":
        return
    for regime in regimes_of(device):
        yield Task("determinism", {"regime": regime})
    if device == "cuda":
        for kind in ("streams", "graphs"):
            for regime in REGIMES:
                yield Task(kind, {"regime": regime})
    for kind in ("modules", "errors", "memory", "offsets", "deterministic_mode", "two_devices"):
        yield Task(kind)


def _surroundings(device: str, quick: bool) -> Iterator[Task]:
    """Processes of their own: other allocators, a capture as the first call, a barrier given up."""
    if device != "cuda":
        return
    yield Task("cold_capture", fresh=True)
    for name, env in ALLOCATORS.items():
        yield Task("allocator", {"name": name}, env)
    for which in ("forward", "backward"):
        yield Task("watchdog", {"which": which}, {SPIN_LIMIT: "1"}, True, loses_context=True)


def _stress(device: str, quick: bool) -> Iterator[Task]:
    if device == "interpreter":
        return
    for cell in ("lstm", "gru"):
        for regime in regimes_of(device):
            yield Task("stress", {"cell": cell, "regime": regime})
    if device == "cuda":
        for regime in REGIMES:
            yield Task("two_streams", {"regime": regime})


_GROUPS = {
    "limits": _limits,
    "smoke": _smoke,
    "parity": _parity,
    "sections": _sections,
    "surroundings": _surroundings,
    "stress": _stress,
    "large": _large,
}

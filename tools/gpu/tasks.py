"""The checks and their order, as a list of tasks that a supervisor gives to a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "gru_reset_before", "lstm_proj", "lstm_peephole")
# The resident regime does not run a layer with a projection.
NOT_RESIDENT = ("lstm_proj",)
# The cells whose weights are streamed from L2 in a check: with one stage, two, and a projection.
STREAMED = ("lstm", "gru_reset_before", "lstm_proj")
# The regimes of a GPU, the simplest first: if several fail, its failure is easier to understand.
# The streamed kernels do what the resident ones do, and also read weights from L2.
REGIMES = ("per_step", "resident", "streamed")
DEVICES = ("cuda", "cpu", "interpreter")

REGIME = "FUSEDRNN_CUDA_REGIME"
SPIN_LIMIT = "FUSEDRNN_CUDA_SPIN_LIMIT"
# What is only there for those who ask: an exchange of words, and clusters in both ways to arrive.
CHOICES = ("cores=fma,exchange=words", "cluster=2", "cluster=4,arrive=clusters")
ALLOCATORS = {
    "without caching": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    # The setting has two names: torch 2.10 and later read the first, and all read the second.
    "cudaMallocAsync": {
        "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync",
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
    },
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task for a worker.

    Args:
        kind: the name of a function of checks.py.
        options: the arguments of the function.
        env: environment variables of the worker; a task with other variables gets a new worker.
        fresh: whether the worker must be new.
        loses_context: whether the task is expected to destroy the GPU's context.
    """

    kind: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fresh: bool = False
    loses_context: bool = False

    @property
    def label(self) -> str:
        """The name of the task."""
        return " ".join([self.kind, *(value for value in self.options.values() if value)])

    @property
    def regime(self) -> str:
        """The regime that the task asks for; "" for none."""
        return self.options.get("regime", "")

    @property
    def subject(self) -> tuple[str, ...]:
        """The cell and regime of the task. It is left out after it has cost too many workers."""
        cell = self.options.get("cell", "")
        return (cell, self.regime) if cell else ()


# Large sizes come last, because their references take CPU time, and because timed rows are checked
# anyway.
GROUPS = ("limits", "smoke", "parity", "sections", "surroundings", "stress", "choices", "large")
# The tasks of a dry run that fail on purpose, each in its own way.
PLANTED = ("hang", "crash", "wrong", "raise")


def tasks_of(groups: Sequence[str], device: str, quick: bool) -> list[Task]:
    """Returns the tasks of some groups in the order in which they run.

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
    """The regimes that a device can be asked for; the CPU has no regimes."""
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
    if quick:
        return
    if device == "cuda":
        for cell in STREAMED:
            yield Task("from_l2", {"cell": cell, "regime": "streamed"})
    yield from _parity_at("large", device)


def _parity_at(size: str, device: str) -> Iterator[Task]:
    for cell in CELLS:
        for regime in regimes_of(device):
            if cell not in NOT_RESIDENT or regime != "resident":
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
    """Tasks in new processes: a capture as first call, other allocators, barriers that give up."""
    if device != "cuda":
        return
    yield Task("cold_capture", fresh=True)
    for name, env in ALLOCATORS.items():
        yield Task("allocator", {"name": name}, env)
    # Both regimes have the same barrier, and each task needs a process of its own.
    for which, regime in (
        ("forward", "resident"),
        ("backward", "resident"),
        ("backward", "streamed"),
    ):
        options = {"which": which, "regime": regime}
        yield Task("watchdog", options, {SPIN_LIMIT: "1"}, True, loses_context=True)


def _stress(device: str, quick: bool) -> Iterator[Task]:
    if device == "interpreter":
        return
    for cell in ("lstm", "gru"):
        for regime in regimes_of(device):
            yield Task("stress", {"cell": cell, "regime": regime})
    if device == "cuda":
        for regime in REGIMES:
            yield Task("two_streams", {"regime": regime})


def _choices(device: str, quick: bool) -> Iterator[Task]:
    """Parity of plans that must be asked for. Where a plan is refused, nothing is compared."""
    if device == "cpu":
        return
    for choice in CHOICES:
        for cell in ("lstm", "gru_reset_before"):
            options = {"cell": cell, "regime": "resident", "choice": choice}
            yield Task("choice", options)


_GROUPS = {
    "limits": _limits,
    "smoke": _smoke,
    "parity": _parity,
    "sections": _sections,
    "surroundings": _surroundings,
    "stress": _stress,
    "choices": _choices,
    "large": _large,
}

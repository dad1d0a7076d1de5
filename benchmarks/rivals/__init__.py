"""The other libraries. Each has a module with the same names, and runs in a separate process.

A module of this package has

    VERSION_OF                     the packages whose versions are reported
    prepare(case, threads, mode)   returns the row as a Ready, or raises Unsupported with the reason
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol, cast

from torch import Tensor

from ..cases import Case
from ..measure import TimedCall

# By the name for --rivals: the module, and the name in tables.
RIVALS = {
    "ort": ("onnx_runtime", "ONNX Runtime"),
    "openvino": ("openvino_cpu", "OpenVINO"),
    "jax": ("jax_scan", "JAX"),
    "compile": ("compiled_loop", "torch.compile of a cell loop"),
}


class Unsupported(Exception):
    """The library cannot compute the row; the message says why."""


@dataclass(frozen=True)
class Ready:
    """A row in the form that a library needs."""

    step: TimedCall
    # Turns the result of `step` into torch.nn's form, by the names that `cases.tensors` gives.
    read: Callable[[Any], dict[str, Tensor]]


class Rival(Protocol):
    """The names that a module of this package has."""

    VERSION_OF: tuple[str, ...]

    def prepare(self, case: Case, threads: int, mode: str) -> Ready:
        """Prepares a row so that it can be timed."""
        ...


def load(name: str) -> Rival:
    """The module of a rival.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    return cast(Rival, importlib.import_module(f".{RIVALS[name][0]}", __name__))


def versions(rival: Rival) -> str:
    """Returns the rival's packages with their versions."""
    return ", ".join(f"{name} {version(name)}" for name in rival.VERSION_OF)

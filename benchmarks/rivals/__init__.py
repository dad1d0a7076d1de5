"""The other libraries, each behind the same two functions, each in a process of its own.

A module of this package has

    VERSION_OF                     the packages that it is
    prepare(case, threads, mode)   the row as a Ready; raises Unsupported with the reason
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol, cast

from torch import Tensor

from ..cases import Case
from ..measure import Call

# What --rivals calls it: the module, and the name in tables.
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
    """A row in a library's own form."""

    step: Call  # what is timed
    # The results of a call of `step` in torch.nn's form, by the names that `results` gives.
    read: Callable[[Any], dict[str, Tensor]]


class Rival(Protocol):
    """What a module of this package offers."""

    VERSION_OF: tuple[str, ...]

    def prepare(self, case: Case, threads: int, mode: str) -> Ready:
        """Brings a row to where it can be timed."""
        ...


def load(name: str) -> Rival:
    """The module of a rival.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    return cast(Rival, importlib.import_module(f".{RIVALS[name][0]}", __name__))


def versions(rival: Rival) -> str:
    """What is compared with: package and version."""
    return ", ".join(f"{name} {version(name)}" for name in rival.VERSION_OF)

"""What both directions of `fusedrnn.onnx` share."""

from __future__ import annotations

from typing import Any

from . import _importing

__all__ = ["GATES", "need"]

# Of ONNX's gates (LSTM iofc, GRU zrh), the place in our order (LSTM ifgo, GRU rzn).
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def need(package: str, task: str) -> Any:
    """Imports a package, or says that `fusedrnn.onnx.<task>` needs it."""
    return _importing.need(package, f"fusedrnn.onnx.{task}")

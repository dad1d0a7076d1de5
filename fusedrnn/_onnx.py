"""What both directions of `fusedrnn.onnx` share."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["GATES", "need"]

# Of ONNX's gates (LSTM iofc, GRU zrh), the place in our order (LSTM ifgo, GRU rzn).
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def need(package: str, task: str) -> Any:
    """Imports a package, or says that `fusedrnn.onnx.<task>` needs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"fusedrnn.onnx.{task} needs the package {error.name}, which is not installed: "
            f"pip install {error.name}",
            name=error.name,
        ) from None

"""Helpers that export and import of `fusedrnn.onnx` share."""

from __future__ import annotations

from typing import Any

from . import _importing

__all__ = ["PEEPHOLES_TO_ONNX", "TO_ONNX", "attribute", "need", "text"]

# For each gate in ONNX's order (LSTM iofc, GRU zrh), its index in torch's (LSTM ifgo, GRU rzn).
TO_ONNX = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}

# For each peephole in ONNX's order (i o f), its index in weight_ch (i f o).
PEEPHOLES_TO_ONNX = (0, 2, 1)

_REQUIRED = object()


def need(package: str, task: str) -> Any:
    """Imports a package, or raises ModuleNotFoundError that `fusedrnn.onnx.<task>` needs it."""
    return _importing.need(package, f"fusedrnn.onnx.{task}")


def text(value: str | bytes) -> str:
    """Returns a file's string for a message; protobuf gives bytes if it is not UTF-8."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def attribute(node: Any, name: str, kind: str, default: Any = _REQUIRED) -> Any:
    """Returns the value of a node's attribute, or `default` if the node has none of this name.

    Raises:
        ValueError: it is not of type `kind` (INT, FLOATS...), or is missing and has no default.
    """
    found = [a for a in node.attribute if a.name == name]
    if not found:
        if default is _REQUIRED:
            raise ValueError(f"the attribute {name} is missing")
        return default
    types = type(found[0]).AttributeType
    code = found[0].type
    said = types.Name(code) if code in types.values() else str(code)
    if len(found) > 1 or found[0].ref_attr_name or said != kind:
        if found[0].ref_attr_name:
            said = "a reference to an attribute of a function"
        raise ValueError(f"{name} must be one attribute of type {kind}, got {said}")
    fields = {"INT": "i", "FLOAT": "f", "STRING": "s", "TENSOR": "t"}
    if kind in fields:
        return getattr(found[0], fields[kind])
    return list(getattr(found[0], kind.lower()))

"""Computes values that depend only on the constants of an ONNX file, with numpy.

A file may come from an untrusted source, so this module never runs a whole graph. It follows a
value back to the tensors that the file stores. Every node on the way must be one of `OPERATORS`.
The number of elements that the nodes write is checked before they are written.
"""

from __future__ import annotations

import math
import os
from typing import Any, TypeAlias

import numpy as np

from ._onnx import attribute, need, text
from ._onnx_operators import OPERATORS, Array, form

__all__ = ["Constants", "Scope"]

# The elements that are written for one recurrent node may be at most this multiple of those that
# the file stores for it. An operator that copies writes about as many elements as it reads. Real
# files have at most five of them one after another (a weight is dequantized, its gates are
# reordered, and it is concatenated with that of the other direction). In addition, both directions
# may share a stored tensor.
COPIES = 8
# As many elements more are allowed, for arithmetic on sizes in very small layers.
SMALL = 1024

STANDARD = ("", "ai.onnx")  # the two names of ONNX's standard domain
IS_INPUT = "is an input of the graph"
# The operators that repeat an initial state for each sequence.
_REPEAT = ("Expand", "Tile")

# The bits of an element, for each type that can be read. The types of the last two lines occur only
# in quantized weights.
BITS = {
    "FLOAT": 32, "DOUBLE": 64, "FLOAT16": 16, "BFLOAT16": 16,
    "INT8": 8, "INT16": 16, "INT32": 32, "INT64": 64,
    "UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64,
    "INT4": 4, "UINT4": 4,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8,
}  # fmt: skip


class NotConstant(ValueError):
    """A value does not depend only on constants; `given`: it depends on an input of a graph."""

    def __init__(self, message: str, given: bool = False) -> None:
        super().__init__(message)
        self.given = given


class Scope:
    """The names that the nodes of a graph can use, with their sources."""

    def __init__(self, graph: Any, outer: Scope | None) -> None:
        self.outer = outer
        # For each name its stored tensor, the node that computes it, or the reason for neither.
        self.sources: dict[Any, Any] = {}
        for tensor in graph.initializer:
            self._add(tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            self._add(sparse.values.name, "is a sparse tensor, which load does not read")
        for value in graph.input:  # an initializer of this name is the default
            reason = f"{IS_INPUT} {text(graph.name)!r}, not a tensor stored in it"
            self.sources.setdefault(value.name, reason)
        for node in graph.node:
            for name in filter(None, node.output):
                self._add(name, node)

    def _add(self, name: Any, source: Any) -> None:
        if name in self.sources:
            source = "is defined twice"
        self.sources[name] = source

    def find(self, name: Any) -> tuple[Scope, Any]:
        """Returns the scope that defines a name, and the source of the name."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.sources:
                return scope, scope.sources[name]
            scope = scope.outer
        return self, "is computed by nothing in the file"


Key: TypeAlias = "tuple[Scope, Any]"  # a value: the scope that defines its name, and the name


class Constants:
    """Computes the constant inputs of a recurrent node, and limits the elements written for it."""

    def __init__(self, scope: Scope, folder: str | None) -> None:
        self.scope = scope
        self.folder = folder  # with the files of external tensors; None if unknown
        self.read: set[Key] = set()
        self.stored = 0  # elements of the tensors that were read, each counted once
        self.written = 0
        self.repeated = False  # whether `of` left out an Expand or Tile

    def of(self, what: str, name: Any, any_batch: bool = False) -> Array:
        """Computes the value of a name.

        Args:
            what: the input of the recurrent node to which the value belongs, for messages.
            name: the name of the value.
            any_batch: whether the value has a part for each sequence. Then an Expand or Tile, which
                repeats one part for a number of sequences that the graph computes, is left out, and
                `repeated` is set.

        Raises:
            NotConstant: it does not depend only on constants, or needs an operator that is not in
                `OPERATORS`.
            ValueError: the file contradicts itself.
        """
        self.repeated = False
        leaves, nodes = self._plan(what, name, any_batch)
        values = {key: self._read(what, key, source) for key, source in leaves.items()}

        def value_of(scope: Scope, each: Any) -> Array:
            try:
                return values[scope.find(each)[0], each]
            except KeyError:
                raise ValueError(f"{text(each)!r} is an output that its node has not") from None

        for scope, node in nodes:
            run, needed, allowed = OPERATORS[node.op_type]
            try:
                names = list(node.input)
                if any_batch and node.op_type in _REPEAT:
                    run, needed, names = _one_row, 1, names[:1]
                if not all([*names, *[""] * needed][:needed]):
                    raise ValueError(f"it needs {needed} inputs, got {names}")
                unknown = {a.name for a in node.attribute} - {*allowed}
                if unknown:
                    raise ValueError(f"unknown attribute {text(unknown.pop())!r}")
                inputs = [value_of(scope, each) if each else None for each in names]
                with np.errstate(all="ignore"):  # infinities and NaN are allowed
                    outputs = run(self, node, *inputs)
            except (ValueError, TypeError, OverflowError) as error:
                # A TypeError means too many inputs, an OverflowError an axis that is no C int.
                raise ValueError(f"{what} is prepared by {_said(node)}: {error}") from None
            outputs = outputs if isinstance(outputs, list) else [outputs]
            values |= {(scope, o): v for o, v in zip(node.output, outputs, strict=False)}
        return value_of(self.scope, name)

    def _plan(
        self, what: str, name: Any, any_batch: bool
    ) -> tuple[dict[Key, Any], list[tuple[Scope, Any]]]:
        """Returns the stored tensors that determine a value, and the nodes to compute in order."""
        leaves: dict[Key, Any] = {}
        nodes: list[tuple[Scope, Any]] = []
        opened: set[int] = set()
        done: set[int] = set()
        odd: NotConstant | None = None
        stack: list[tuple[Scope, Any, bool]] = [(self.scope, name, False)]
        while stack:
            start, value, ready = stack.pop()
            scope, source = start.find(value)
            if isinstance(source, str):
                subject = repr(text(value))
                if value != name:
                    subject = f"{text(name)!r} depends on {subject}, which"
                raise NotConstant(
                    f"{what} must be constant, but {subject} {source}",
                    given=source.startswith(IS_INPUT),
                )
            if not hasattr(source, "op_type"):
                leaves[scope, value] = source
            elif ready:
                done.add(id(source))
                nodes.append((scope, source))
            elif id(source) in done:
                continue
            elif id(source) in opened:
                raise ValueError(f"{what} depends on itself, through {_said(source)}")
            elif source.op_type == "Constant" and source.domain in STANDARD:
                leaves[scope, value] = source
            else:
                opened.add(id(source))
                stack.append((scope, value, True))
                inputs = [each for each in source.input if each]
                if not _known(source):
                    odd = odd or NotConstant(
                        f"{what} is prepared by {_said(source)}; load computes "
                        f"{', '.join(sorted(OPERATORS))}"
                    )
                elif any_batch and source.op_type in _REPEAT:
                    inputs = [each for each in source.input[:1] if each]
                stack += [(scope, each, False) for each in reversed(inputs)]
        if odd is not None:
            raise odd
        return leaves, nodes

    def _read(self, what: str, key: Key, source: Any) -> Array:
        """Reads a stored tensor or the value of a Constant, and counts its elements as stored."""
        read = self._constant if hasattr(source, "op_type") else self.tensor
        try:
            array = read(source)
        except ValueError as error:
            name = text(key[1])
            raise ValueError(f"{what}: the tensor {name!r} cannot be read: {error}") from None
        if key not in self.read:
            self.read.add(key)
            self.stored += array.size
        return array

    def _constant(self, node: Any) -> Array:
        """Reads the value of a Constant, whose only attribute has a name that tells the type."""
        kinds: dict[str, tuple[str, Any]] = {
            "value_float": ("FLOAT", np.float32),
            "value_floats": ("FLOATS", np.float32),
            "value_int": ("INT", np.int64),
            "value_ints": ("INTS", np.int64),
        }
        names = [a.name for a in node.attribute]
        if names == ["value"]:
            return self.tensor(attribute(node, "value", "TENSOR"))
        if len(names) != 1 or names[0] not in kinds:
            raise ValueError(f"a Constant with the attributes {[text(n) for n in names]}")
        kind, dtype = kinds[names[0]]
        return np.array(attribute(node, names[0], kind), dtype)

    def tensor(self, tensor: Any) -> Array:
        """Returns a TensorProto as an array; ValueError if its data and its sizes do not fit."""
        proto = need("onnx", "load").TensorProto
        code = tensor.data_type
        kind = proto.DataType.Name(code) if code in proto.DataType.values() else str(code)
        if kind not in BITS:
            raise ValueError(f"data of type {kind}")
        dims = list(tensor.dims)
        if any(d < 0 for d in dims):
            raise ValueError(f"sizes must not be negative, got {dims}")
        elements = math.prod(dims)
        size = (elements * BITS[kind] + 7) // 8
        if tensor.data_location == proto.EXTERNAL:
            self._check_file(tensor, size)
        elif tensor.HasField("raw_data"):
            if len(tensor.raw_data) != size:
                raise ValueError(f"{dims} of {kind} are {size} bytes, got {len(tensor.raw_data)}")
        else:
            field = getattr(tensor, need("onnx.helper", "load").tensor_dtype_to_field(code))
            count = (elements * BITS[kind] + 7) // 8 if BITS[kind] < 8 else elements
            if len(field) != count:
                raise ValueError(f"{dims} of {kind} are {count} values, got {len(field)}")
        try:
            array = need("onnx.numpy_helper", "load").to_array(tensor, self.folder or "")
        except Exception as error:  # onnx may raise anything for a bad tensor
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if array.size != elements:
            raise ValueError(f"{dims} are {elements} values, got {array.size}")
        return array

    def _check_file(self, tensor: Any, size: int) -> None:
        """Raises ValueError if the tensor's own file does not contain its `size` bytes."""
        if self.folder is None:
            raise ValueError("it is stored in another file: give load the path of the model")
        entries = {e.key: e.value for e in tensor.external_data}
        path = os.path.join(self.folder, text(entries.get("location", "")))
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size))
        except ValueError:
            raise ValueError(f"offset and length in {path!r} must be numbers") from None
        if length != size:
            raise ValueError(f"{list(tensor.dims)} are {size} bytes, got {length} of {path!r}")
        if "\0" in path or not os.path.isfile(path):
            raise ValueError(f"the file {path!r} that stores it does not exist")
        if offset < 0 or offset + size > os.path.getsize(path):
            raise ValueError(f"the file {path!r} does not hold {size} bytes from {offset} on")
        if "length" not in entries and offset + size != os.path.getsize(path):
            raise ValueError(f"the file {path!r} must hold {size} bytes from {offset} on, no more")

    def charge(self, elements: int) -> None:
        """Counts elements that will be written, and raises ValueError if they are too many."""
        self.written += elements
        limit = COPIES * self.stored + SMALL
        if self.written > limit:
            raise ValueError(
                f"it would write {elements} elements, {self.written} with those before it, but "
                f"{limit} are the most for {self.stored} that are stored"
            )


def _known(node: Any) -> bool:
    """Whether a node is one of `OPERATORS`."""
    also = ("com.microsoft",) if node.op_type in ("DequantizeLinear", "QuantizeLinear") else ()
    return node.op_type in OPERATORS and node.domain in (*STANDARD, *also)


def _said(node: Any) -> str:
    """Describes a node in a message."""
    domain = "" if node.domain in STANDARD else f"{text(node.domain)}::"
    name = f"the node {text(node.name)!r} " if node.name else "a node "
    return f"{name}({domain}{text(node.op_type)})"


def _one_row(constants: Constants, node: Any, x: Array) -> Array:
    """Replaces an Expand or Tile that repeats x for each sequence: returns x, sets `repeated`."""
    if node.op_type == "Tile" and (x.ndim != 3 or x.shape[1] != 1):
        raise ValueError(f"load does not know how often it repeats {form(x)}")
    constants.repeated = True
    return x

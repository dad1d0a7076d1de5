"""Values that an ONNX file's constants determine: judged first, then computed with numpy.

The files come from anywhere, so nothing here runs a graph. A value is followed back to the tensors
that the file stores; every node on the way must be one of `OPERATORS`, and the elements that they
write are counted before they are written.
"""

from __future__ import annotations

import math
import os
from typing import Any, TypeAlias

import numpy as np

from ._onnx import attribute, need, text
from ._onnx_operators import OPERATORS, Array, form

__all__ = ["Constants", "Scope"]

# For one node at most this multiple of the elements that the file stores for it is computed: what
# is stored bounds the layer's own size. A step that copies writes about what it reads, and real
# files have at most five in a row (a kernel that is dequantized, put into the order of the gates
# and laid beside that of the other direction); besides, one tensor can be stored for both.
COPIES = 8
# For the arithmetic on sizes that goes with it, in layers of a few elements.
SMALL = 1024

STANDARD = ("", "ai.onnx")  # the names of ONNX's own domain
IS_INPUT = "is an input of the graph"
# The nodes that repeat a row for the batch.
_REPEAT = ("Expand", "Tile")

# The bits of an element of each type that is read; the last two lines are of quantized weights.
BITS = {
    "FLOAT": 32, "DOUBLE": 64, "FLOAT16": 16, "BFLOAT16": 16,
    "INT8": 8, "INT16": 16, "INT32": 32, "INT64": 64,
    "UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64,
    "INT4": 4, "UINT4": 4,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8,
}  # fmt: skip


class NotConstant(ValueError):
    """A value that is not determined by constants; `given`: it depends on an input of a graph."""

    def __init__(self, message: str, given: bool = False) -> None:
        super().__init__(message)
        self.given = given


class Scope:
    """The names that the nodes of a graph see."""

    def __init__(self, graph: Any, outer: Scope | None) -> None:
        self.outer = outer
        # For each name: its stored tensor, the node that computes it, or why there is neither.
        self.sources: dict[Any, Any] = {}
        for tensor in graph.initializer:
            self._add(tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            self._add(sparse.values.name, "is a sparse tensor, which load does not read")
        for value in graph.input:  # an initializer of that name is its default
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
        """The scope that defines a name, and its source there."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.sources:
                return scope, scope.sources[name]
            scope = scope.outer
        return self, "is computed by nothing in the file"


Key: TypeAlias = "tuple[Scope, Any]"  # a value: where its name is defined, and the name


class Constants:
    """The constant values that feed one node, and the elements that may be computed for them."""

    def __init__(self, scope: Scope, folder: str | None) -> None:
        self.scope = scope
        self.folder = folder  # of files that hold tensors; None where that is not known
        self.read: set[Key] = set()
        self.stored = 0  # elements of what was read, each tensor once
        self.written = 0
        self.repeated = False  # whether `of` left out how often a row is repeated

    def of(self, what: str, name: Any, any_batch: bool = False) -> Array:
        """The value of a name.

        Args:
            what: the input of the recurrent node that it is.
            name: of the value.
            any_batch: it has rows for the batch, and what repeats one row for a batch whose size
                the graph computes (Expand, Tile) leaves it one row, and sets `repeated`.

        Raises:
            NotConstant: it does not follow from constants, or not by `OPERATORS`.
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
                with np.errstate(all="ignore"):  # infinities and NaN are values like others
                    outputs = run(self, node, *inputs)
            except (ValueError, TypeError, OverflowError) as error:
                # TypeError: an input too many. OverflowError: an axis beyond an int of C's.
                raise ValueError(f"{what} is prepared by {_said(node)}: {error}") from None
            outputs = outputs if isinstance(outputs, list) else [outputs]
            values |= {(scope, o): v for o, v in zip(node.output, outputs, strict=False)}
        return value_of(self.scope, name)

    def _plan(
        self, what: str, name: Any, any_batch: bool
    ) -> tuple[dict[Key, Any], list[tuple[Scope, Any]]]:
        """Returns the stored tensors of a value, and the nodes that compute it, in order."""
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
        """A stored tensor, or the value of a Constant."""
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
        """The value of a Constant: one attribute, which says its type by its name."""
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
        """A TensorProto as an array, after a look at whether its data fits its type and sizes."""
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
        except Exception as error:  # another package's, of a tensor from anywhere
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if array.size != elements:
            raise ValueError(f"{dims} are {elements} values, got {array.size}")
        return array

    def _check_file(self, tensor: Any, size: int) -> None:
        """Raises where the file beside the model does not hold `size` bytes for a tensor."""
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
        """Counts elements that are about to be written."""
        self.written += elements
        limit = COPIES * self.stored + SMALL
        if self.written > limit:
            raise ValueError(
                f"it would write {elements} elements, {self.written} with those before it, but "
                f"{limit} are the most for {self.stored} that are stored"
            )


def _known(node: Any) -> bool:
    """Whether a node may prepare a value."""
    also = ("com.microsoft",) if node.op_type in ("DequantizeLinear", "QuantizeLinear") else ()
    return node.op_type in OPERATORS and node.domain in (*STANDARD, *also)


def _said(node: Any) -> str:
    """A node in a message."""
    domain = "" if node.domain in STANDARD else f"{text(node.domain)}::"
    name = f"the node {text(node.name)!r} " if node.name else "a node "
    return f"{name}({domain}{text(node.op_type)})"


def _one_row(constants: Constants, node: Any, x: Array) -> Array:
    """Returns the result of an Expand or Tile for a batch of any size, as for a batch of one."""
    if node.op_type == "Tile" and (x.ndim != 3 or x.shape[1] != 1):
        raise ValueError(f"load does not know how often it repeats {form(x)}")
    constants.repeated = True
    return x

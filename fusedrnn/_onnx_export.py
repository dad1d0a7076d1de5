"""Exports models with fused layers to ONNX files."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._library import CELLS
from ._onnx import PEEPHOLES_TO_ONNX, TO_ONNX, need

__all__ = ["export", "translations"]

# The operator of each cell and the attributes that choose the cell. A list has a value for one
# direction.
_OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", {"linear_before_reset": 0}),
    "rnn_tanh": ("RNN", {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),
    "lstm_peephole": ("LSTM", {}),
}

# torch's exporter writes these opsets itself. For others it calls onnx's version converter, which
# loses the information to which layer a node belongs. So `export` asks torch for one of these
# opsets, names the nodes, and then converts the model itself.
_OF_TORCH = range(18, 26)
# The first opset in which LSTM, GRU and RNN take bfloat16.
_BFLOAT16 = 22

# Two keys of a node's metadata (ir.Node.meta): the name of its first weight, and whether it has
# lengths and its T or N is dynamic.
_WEIGHT, _DYNAMIC_LENGTHS = "fusedrnn.weight", "fusedrnn.dynamic_lengths"


class _NoForm(NotImplementedError):
    """Raised for a layer that ONNX's operators cannot express."""


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | torch.Tensor = (),
    file: str | os.PathLike[str] | None = None,
    *,
    external_data: bool | None = None,
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Exports a model with `torch.onnx.export`; every fused layer becomes one ONNX node.

    A module with L layers gives L nodes. Those of a module ``encoder`` are named ``encoder_l0``,
    ``encoder_l1`` and so on, or ``model_l0`` and so on if the model itself is the module.
    ``lengths=`` becomes the input sequence_lens, and reset_after the attribute linear_before_reset.
    The weights are stored in ONNX's layout and order of gates.

    Args:
        model: a model in eval mode, as for `torch.onnx.export`.
        args: example inputs.
        file: the path of the file to write; None writes nothing.
        external_data: whether weights are written to a file beside `file`; None: only above 1.5 GB.
        custom_translation_table: translations of other operators, in addition to `translations`.
        options: other options of `torch.onnx.export`: kwargs, dynamic_shapes, input_names,
            output_names, opset_version (14 or later; 22 or later for bfloat16), optimize, report...

    Returns:
        The program, which can be saved, run with ONNX Runtime and inspected.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        ValueError: the model cannot be written in opset_version; ``dynamo=False``; ``f``; options
            that `torch.onnx.export` takes but ignores (training, custom_opsets...).
        NotImplementedError: ONNX's operators cannot compute a layer: one with a projection
            (proj_size), a PackedSequence (use ``lengths=``), ``starts=``, c of every step
            (``return_states=``), or bfloat16 before opset 22.
        torch.onnx.OnnxExporterError: torch cannot export something else.

    Warns:
        UserWarning: one warning per export if T or N is dynamic in layers with ``lengths=``:
            OpenVINO ignores their sequence_lens.
    """
    _check_options(options)
    opset = options.get("opset_version")
    if opset is not None:
        options["opset_version"] = min(max(opset, _OF_TORCH[0]), _OF_TORCH[-1])
    table = {**translations(opset_version=opset), **(custom_translation_table or {})}
    options.setdefault("verbose", False)
    stored = {
        "include_initializers": options.pop("export_params", True),
        "keep_initializers_as_inputs": options.pop("keep_initializers_as_inputs", False),
    }
    try:
        program = torch.onnx.export(
            model,
            args,  # type: ignore[arg-type]
            dynamo=True,
            custom_translation_table=table,
            **options,
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _NoForm):
            cause = cause.__cause__
        if cause is None:
            raise
        raise NotImplementedError(str(cause)) from None
    assert program is not None
    recurrent = [
        node
        for node in program.model.graph.all_nodes()
        if node.domain == "" and node.op_type in TO_ONNX
    ]
    _store_weights(program.model, recurrent)
    _give_names(program, recurrent)
    ignored = [str(node.name) for node in recurrent if node.meta.get(_DYNAMIC_LENGTHS)]
    if opset is not None:
        _convert(program.model, opset)
    if ignored:
        warnings.warn(
            f"fusedrnn.onnx.export: T or N is dynamic in {', '.join(ignored)}, where lengths= "
            "became the input sequence_lens: OpenVINO 2026.4.1 ignores that input on the CPU then, "
            "and computes the padding too. There, give the model fixed sizes with model.reshape "
            "before it is compiled. ONNX Runtime is not affected",
            UserWarning,
            stacklevel=2,
        )
    if file is not None:
        program.save(file, external_data=external_data, **stored)
    return program


def _check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for an option that cannot take effect; removes dynamo from the options."""
    if options.pop("dynamo", True) is not True:
        raise ValueError(
            "dynamo must be True: only torch's exporter that stands on torch.export knows the "
            "fused layers, got False. torch.onnx.export(dynamo=False) takes "
            "fusedrnn.to_torch(model), the same model in torch.nn's layers, if torch.nn has them"
        )
    if "f" in options:
        raise ValueError("f must not be given: the argument for the path is file here")
    opset = options.get("opset_version")
    if opset is not None and (not isinstance(opset, int) or isinstance(opset, bool) or opset < 1):
        raise ValueError(f"opset_version must be None or a positive int, got {opset!r}")
    known = inspect.signature(torch.onnx.export).parameters
    for name in _IGNORED_BY_TORCH:
        if name in options and options[name] != known[name].default:
            raise ValueError(
                f"{name} must be left at {known[name].default!r}: torch's exporter ignores it, got "
                f"{options[name]!r}"
            )


_IGNORED_BY_TORCH = (
    "training",
    "operator_export_type",
    "do_constant_folding",
    "custom_opsets",
    "export_modules_as_functions",
    "autograd_inlining",
)


def translations(*, opset_version: int | None = None) -> dict[Any, Callable[..., Any]]:
    """Returns the translations of fused layers that `torch.onnx.export` needs if you call it.

    Pass them as ``custom_translation_table``. `export` reorders the weights once. torch's exporter
    adds a few nodes before each layer that reorder them; ONNX Runtime runs these once when it loads
    the model. The warning about lengths with a dynamic T or N comes only from `export`.

    Args:
        opset_version: the opset_version for `torch.onnx.export`; layers may be bfloat16 if it is 22
            or later.

    Returns:
        A function for each of our ops that an exported program can contain.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
    """
    need("onnx", "export")
    bfloat16 = opset_version is not None and opset_version >= _BFLOAT16
    op = need("onnxscript", "export").opset18

    def forward(
        x: Any,
        h0: Any,
        c0: Any,
        weights: Any,
        batch_sizes: Any,
        lengths: Any,
        batch: Any,
        cell: str,
        bidirectional: bool,
        keep: bool,
        starts: Any = None,
        c_in_y: bool = False,
    ) -> Any:
        if starts is not None:
            raise _NoForm("starts= has no form in ONNX, whose operators cannot reset a state")
        if c_in_y:
            raise _NoForm("return_states=True has no form in ONNX for an LSTM: Y has h alone")
        if not bfloat16 and x.dtype is not None and x.dtype.name == "BFLOAT16":
            raise _NoForm(
                "bfloat16 has no form in ONNX's recurrent operators before opset 22: give "
                "opset_version=22 or later, which OpenVINO 2026.4.1 runs and ONNX Runtime 1.31.1 "
                "does not; or use model.float()"
            )
        return _translate(op, x, h0, c0, weights, batch_sizes, lengths, cell, bidirectional)

    return {torch.ops.fusedrnn.forward.default: forward}


def _translate(
    op: Any,
    x: Any,  # [T, N, I]
    h0: Any,  # [D, N, H] or None
    c0: Any,  # [D, N, H] or None
    weights: Sequence[Any],
    batch_sizes: Any,
    lengths: Any,  # int64 [N] or None
    cell: str,
    bidirectional: bool,
) -> list[Any]:
    """Makes the nodes of one layer; returns y [T, N, D*H], h_n [D, N, H] and for an LSTM c_n."""
    if CELLS[cell].projects:
        raise _NoForm("proj_size must be 0: ONNX's LSTM has no projection, so this has no form")
    if batch_sizes is not None:
        raise _NoForm(
            "a PackedSequence has no form in ONNX; call the layer with the padded batch and "
            "lengths=, which becomes the input sequence_lens"
        )
    if cell not in _OPERATORS:
        raise _NoForm(f"the cell {cell} has no form in ONNX's recurrent operators")
    D = 2 if bidirectional else 1
    name, of_cell = _OPERATORS[cell]
    per_direction = len(weights) // D
    directions = [
        CELLS[cell].named(weights[d * per_direction : (d + 1) * per_direction]) for d in range(D)
    ]
    H = directions[0]["weight_hh"].shape[1]

    def gates(weight: Any, order: Sequence[int] = TO_ONNX[name]) -> Any:
        """A weight [G*H, K] or [G*H] as [1, G*H, ...], with the gates in this order."""
        rest = list(weight.shape)[1:]
        G = len(order)
        if G > 1:
            weight = op.Reshape(weight, op.Constant(value_ints=[G, H, *rest]))
            weight = op.Gather(weight, op.Constant(value_ints=list(order)), axis=0)
        return op.Reshape(weight, op.Constant(value_ints=[1, G * H, *rest]))

    def side_by_side(parts: list[Any], axis: int) -> Any:
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)

    W, R = (
        side_by_side([gates(w[kind]) for w in directions], 0) for kind in ("weight_ih", "weight_hh")
    )
    B = None
    if "bias_ih" in directions[0]:
        both = [op.Concat(gates(w["bias_ih"]), gates(w["bias_hh"]), axis=1) for w in directions]
        B = side_by_side(both, 0)
    options: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if bidirectional else "forward",
    }
    sequence_lens = None if lengths is None else op.Cast(lengths, to=6)  # int32
    inputs = [x, W, R, B, sequence_lens, h0]
    if name == "LSTM":
        inputs.append(c0)
        if "weight_ch" in directions[0]:
            parts = [gates(w["weight_ch"], PEEPHOLES_TO_ONNX) for w in directions]
            inputs.append(side_by_side(parts, 0))
    for option, value in of_cell.items():
        options[option] = value * D if isinstance(value, list) else value
    Y, *last = getattr(op, name)(*inputs, **options)
    meta = Y.producer().meta
    meta[_WEIGHT] = _stored(weights[0])
    dynamic = x.shape is None or not all(isinstance(size, int) for size in x.shape[:2])
    meta[_DYNAMIC_LENGTHS] = lengths is not None and dynamic

    if lengths is not None:
        # A sequence of length 0 keeps its initial state. ONNX Runtime alone would give zeros.
        empty = op.Unsqueeze(
            op.Equal(lengths, op.Constant(value_int=0)), op.Constant(value_ints=[0, 2])
        )
        last = [
            s if s0 is None else op.Where(empty, s0, s)
            for s0, s in zip((h0, c0), last, strict=False)
        ]
    if D == 1:
        y = op.Squeeze(Y, op.Constant(value_ints=[1]))
    else:
        y = op.Reshape(op.Transpose(Y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, D * H]))
    return [y, *last]


def _stored(value: Any) -> str:
    """The name of the stored value from which a weight is computed, for example by casts."""
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
    return str(value.name)


def _weights_of(node: Any) -> dict[str, Any]:
    """The inputs of a recurrent node that are weights, by ONNX's names."""
    inputs = {"W": 1, "R": 2, "B": 3} | ({"P": 7} if node.op_type == "LSTM" else {})
    given = {name: node.inputs[k] for name, k in inputs.items() if k < len(node.inputs)}
    return {name: value for name, value in given.items() if value is not None}


def _store_weights(model: Any, recurrent: Sequence[Any]) -> None:
    """Computes the inputs of recurrent nodes that are weights, and stores the results."""
    wanted: set[int] = set()

    def want(value: Any) -> None:
        node = None if value is None else value.producer()
        if node is not None and id(node) not in wanted:
            wanted.add(id(node))
            for source in node.inputs:
                want(source)

    for node in recurrent:
        for value in _weights_of(node).values():
            want(value)
    optimizer = need("onnxscript.optimizer", "export")
    # Folding leaves out a node that does not depend on stored values only.
    optimizer.fold_constants_ir(model, should_fold=lambda node: id(node) in wanted)
    optimizer.remove_unused_nodes(model)


def _give_names(program: Any, recurrent: Sequence[Any]) -> None:
    """Names recurrent nodes after the layers, and their stored weights after the nodes."""
    signature = program.exported_program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    levels: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for node in recurrent:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = scopes[-2] if len(scopes) > 1 else ""  # ["", "encoder", "the call"]
        # Under torch.autocast or torch.no_grad, and in a branch of torch.cond, a node has only the
        # scopes outside of this block. The name of its weight tells its module.
        weight = re.fullmatch(
            r"(?:(.*?)\.)??(?:parametrizations\.)?weight_ih(?:_l(\d+))?(?:_reverse)?(?:[._].*)?",
            held.get(node.meta.get(_WEIGHT), ""),
        )
        level = levels[path]
        if weight is not None and f"{weight[1] or ''}.".startswith(f"{path}." if path else ""):
            path, level = weight[1] or "", int(weight[2] or 0)
        levels[path] += 1
        name = f"{path or 'model'}_l{level}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"  # a repeated call
        for letter, value in _weights_of(node).items():
            if value.is_initializer() and len(value.uses()) == 1:
                value.name = f"{node.name}.{letter}"


class _Kept(logging.Filter):
    """Collects the records of a logger, which are then not printed."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.records.append(record)
        return False


def _convert(model: Any, opset: int) -> None:
    """Converts a model in place to another opset.

    Raises:
        ValueError: the converter cannot convert it.
    """
    converter = need("onnxscript.version_converter", "export")
    kept = _Kept()
    converter.logger.addFilter(kept)
    try:
        converter.convert_version(model, opset, fallback=True)
    finally:
        converter.logger.removeFilter(kept)
    if model.opset_imports.get("", opset) != opset:
        errors = [str(record.exc_info[1]) for record in kept.records if record.exc_info]
        reasons = [error.rpartition("failed: ")[2].replace("$", "") for error in errors]
        raise ValueError(
            f"opset_version must be one in which the model can be written, got {opset}: onnx's "
            f"version converter cannot go there from {model.opset_imports['']}"
            + "".join(f" ({reason})" for reason in reasons)
        )

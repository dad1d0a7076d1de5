"""Models with fused layers to ONNX files."""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._library import CELLS
from ._onnx import GATES, need

__all__ = ["export", "translations"]

_OPERATORS = {
    "lstm": "LSTM",
    "gru": "GRU",
    "gru_reset_before": "GRU",
    "rnn_tanh": "RNN",
    "rnn_relu": "RNN",
}


class _NoForm(NotImplementedError):
    """What ONNX cannot say."""


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | torch.Tensor = (),
    file: str | os.PathLike[str] | None = None,
    *,
    external_data: bool | None = None,
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Exports a model with `torch.onnx.export`, every fused layer as one ONNX node.

    A stack of L layers gives L nodes; those of a layer ``encoder`` are named ``encoder_l0`` and on
    (``model_l0`` where the model is the layer). ``lengths=`` becomes the input sequence_lens,
    reset_after linear_before_reset. The weights are stored in ONNX's layout and order of gates.

    Args:
        model: in eval mode, as for `torch.onnx.export`.
        args: example inputs.
        file: where to write the model; None to write nothing.
        external_data: whether weights go to a file beside `file`; None: only above 1.5 GB.
        custom_translation_table: of other operators, beside `translations`.
        options: any of `torch.onnx.export`: kwargs, dynamic_shapes, input_names, output_names,
            opset_version (18 or later), optimize, report...

    Returns:
        The program, which can be saved, called (by ONNX Runtime) and looked at.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        NotImplementedError: something in the model that ONNX's operators cannot compute: a
            projection (proj_size), a PackedSequence (use ``lengths=``), bfloat16.
        torch.onnx.OnnxExporterError: whatever else torch cannot export.
    """
    table = {**translations(), **(custom_translation_table or {})}
    options.setdefault("verbose", False)
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
    _store_weights(program.model)
    if file is not None:
        program.save(file, external_data=external_data)
    return program


def translations() -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` must know of fused layers, for those who call it themselves.

    Pass it as ``custom_translation_table``. Unlike `export`, which reorders the weights once,
    torch's exporter leaves that to a few nodes before each layer; ONNX Runtime runs them once when
    it loads the model.

    Returns:
        A function for each operator of ours that can be in an exported program.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
    """
    need("onnx", "export")
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
    ) -> Any:
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
    """The nodes of one layer: y [T, N, D*H], h_n and, for an LSTM, c_n [D, N, H]."""
    if CELLS[cell].projects:
        raise _NoForm("proj_size must be 0: ONNX's LSTM has no projection, so this has no form")
    if batch_sizes is not None:
        raise _NoForm(
            "a PackedSequence has no form in ONNX; call the layer with the padded batch and "
            "lengths=, which becomes the input sequence_lens"
        )
    if x.dtype is not None and x.dtype.name == "BFLOAT16":
        raise _NoForm("bfloat16 has no form in ONNX's recurrent operators; use model.float()")
    D = 2 if bidirectional else 1
    G = CELLS[cell].gates
    name = _OPERATORS[cell]
    H = weights[1].shape[1]
    bias = len(weights) == 4 * D

    def gates(weight: Any) -> Any:
        """A weight [G*H, K] or [G*H] as [1, G*H, ...], its gates in ONNX's order."""
        rest = list(weight.shape)[1:]
        if G > 1:
            weight = op.Reshape(weight, op.Constant(value_ints=[G, H, *rest]))
            weight = op.Gather(weight, op.Constant(value_ints=list(GATES[name])), axis=0)
        return op.Reshape(weight, op.Constant(value_ints=[1, G * H, *rest]))

    def side_by_side(parts: list[Any], axis: int) -> Any:
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)

    kinds = 4 if bias else 2
    W, R = (side_by_side([gates(w) for w in weights[k::kinds]], 0) for k in (0, 1))
    B = None
    if bias:
        both = [op.Concat(gates(weights[k]), gates(weights[k + 1]), axis=1) for k in (2, 6)[:D]]
        B = side_by_side(both, 0)
    options: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if bidirectional else "forward",
    }
    sequence_lens = None if lengths is None else op.Cast(lengths, to=6)  # int32
    inputs = [x, W, R, B, sequence_lens, h0]
    if name == "LSTM":
        inputs.append(c0)
    elif name == "GRU":
        options["linear_before_reset"] = int(cell == "gru")
    else:
        options["activations"] = ["Tanh" if cell == "rnn_tanh" else "Relu"] * D
    Y, *last = getattr(op, name)(*inputs, **options)

    if lengths is not None:
        # The state of a row of length 0 is its initial one; ONNX Runtime gives zeros.
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


def _store_weights(model: Any) -> None:
    """Stores W, R and B of recurrent nodes as the nodes want them, and gives the nodes names."""
    wanted: set[int] = set()
    recurrent = [n for n in model.graph.all_nodes() if n.domain == "" and n.op_type in GATES]

    def want(value: Any) -> None:
        node = None if value is None else value.producer()
        if node is not None and id(node) not in wanted:
            wanted.add(id(node))
            for source in node.inputs:
                want(source)

    for node in recurrent:
        for value in node.inputs[1:4]:
            want(value)
    optimizer = need("onnxscript.optimizer", "export")
    # Where one of them does not depend on stored weights alone, folding stops before it.
    optimizer.fold_constants_ir(model, should_fold=lambda node: id(node) in wanted)
    optimizer.remove_unused_nodes(model)
    layers: Counter[str] = Counter()
    for node in recurrent:
        scopes = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
        path = scopes[-2] if len(scopes) > 1 else ""  # ["", "encoder", the call]
        node.name = f"{path or 'model'}_l{layers[path]}"
        layers[path] += 1
        for letter, value in zip("WRB", node.inputs[1:4], strict=False):
            if value is not None and value.is_initializer() and len(value.uses()) == 1:
                value.name = f"{node.name}.{letter}"

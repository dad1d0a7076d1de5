"""ONNX Runtime's own LSTM, GRU and RNN operators, for inference in float32."""

from __future__ import annotations

import onnxruntime

from ..cases import Case
from ..shapes import FORWARD
from . import Ready, Unsupported, onnx_graph

VERSION_OF = ("onnxruntime",)


def prepare(case: Case, threads: int, mode: str) -> Ready:
    """Makes a session with `threads` threads."""
    if mode != FORWARD:
        raise Unsupported("inference only")
    if case.row.dtype != "float32":
        raise Unsupported(f"no {case.row.dtype} recurrent operators on the CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx_graph.model(case), options, providers=["CPUExecutionProvider"]
    )
    feeds = onnx_graph.feeds(case)
    return Ready(lambda: session.run(None, feeds)[0], lambda y: onnx_graph.in_torch_form(case, y))

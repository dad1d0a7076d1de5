"""OpenVINO's CPU plugin with the ONNX model, for inference in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import openvino

from ..cases import Case
from ..shapes import FORWARD
from . import Ready, Unsupported, onnx_graph

VERSION_OF = ("openvino",)
# Without a hint the plugin may choose bfloat16. The input and the output stay float32.
PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def prepare(case: Case, threads: int, mode: str) -> Ready:
    """Compiles the model for `threads` threads and low latency."""
    if mode != FORWARD:
        raise Unsupported("inference only")
    if case.row.dtype not in PRECISION:
        raise Unsupported(f"no {case.row.dtype} on the CPU")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(onnx_graph.model(case)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISION[case.row.dtype],
        },
    )
    request, feeds = compiled.create_infer_request(), onnx_graph.feeds(case)

    def step() -> Any:
        return request.infer(feeds, share_inputs=True, share_outputs=True)[0]

    return Ready(step, lambda y: onnx_graph.in_torch_form(case, y))

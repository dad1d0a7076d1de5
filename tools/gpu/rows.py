"""The rows that are timed on a GPU, with the most informative first.

They are layers of published models and of DeepBench (benchmarks/shapes.py has more of the latter),
and a few rows of the core set. They are chosen so that each alternative of csrc/cuda/plan.h is
timed; tests check this for an H100 and an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.shapes import FORWARD, Row

PRECISIONS = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "tf32": "float32",
    "f64": "float64",
}
SHORT_CELLS = {"rnn": "rnn_tanh"}


@dataclass(frozen=True)
class Timed:
    """A row in a precision.

    Args:
        row: the layer, its sizes and its dtype.
        precision: the precision of the row's products: its dtype, or tf32 for float32.
        source: the model or benchmark with such a layer.
    """

    row: Row
    precision: str
    source: str

    @property
    def name(self) -> str:
        """The name of the row: cell, sizes, precision."""
        plain = replace(self.row, dtype="float32")
        return f"{plain.name} {self.precision}"

    @property
    def cell(self) -> str:
        """The engine's name of the cell."""
        if self.row.P:
            return "lstm_proj"
        return SHORT_CELLS.get(self.row.cell, self.row.cell)

    @property
    def dtype(self) -> str:
        """The plan's name of the dtype."""
        return "f32" if self.precision == "tf32" else self.precision

    def layers(self) -> list[list[int]]:
        """T, N, I, H, P and D of each layer, in the plan's order."""
        r = self.row
        return [[r.T, r.N, I, r.H, r.out, r.D] for I in r.inputs()]


# source, row, precisions
_ROWS: list[tuple[str, Row, tuple[str, ...]]] = [
    ("DeepBench", Row("lstm", 25, 32, 1024, 1024), ("bf16", "f32", "tf32", "f16")),
    ("DeepBench", Row("lstm", 150, 1, 256, 256), ("bf16", "f32")),
    ("DeepBench", Row("lstm", 150, 32, 256, 256), ("bf16", "f32", "tf32")),
    ("DeepBench", Row("gru", 1500, 32, 1024, 1024), ("bf16",)),
    ("DeepBench", Row("lstm", 25, 32, 2048, 2048), ("bf16", "f32", "f16")),
    ("DeepBench", Row("lstm", 25, 128, 512, 512), ("bf16", "f32")),
    ("AWD-LSTM", Row("lstm", 70, 40, 400, 1150), ("bf16", "f32")),
    ("agents, learning", Row("lstm", 64, 256, 128, 128), ("bf16", "f32")),
    ("agents, acting", Row("lstm", 1, 1024, 128, 128, modes=(FORWARD,)), ("bf16", "f32")),
    ("RNN-T", Row("lstm", 40, 16, 640, 640, L=2), ("bf16", "f32")),
    ("Open-Unmix", Row("lstm", 255, 4, 512, 256, L=3, D=2), ("f32", "bf16")),
    ("band-split RNN", Row("lstm", 30, 200, 128, 256, D=2), ("bf16", "f32")),
    ("dual-path RNN", Row("lstm", 100, 120, 64, 128, D=2), ("bf16", "f32")),
    ("core", Row("lstm", 1000, 8, 64, 64), ("bf16", "f32")),
    ("one sequence", Row("lstm", 1000, 1, 64, 64), ("f32",)),
    ("DeepBench", Row("lstm", 25, 1, 1024, 1024, modes=(FORWARD,)), ("bf16", "f32")),
    ("DeepBench", Row("lstm", 50, 1, 1536, 1536, modes=(FORWARD,)), ("bf16", "f32")),
    ("DeepFilterNet", Row("gru", 500, 1, 256, 256, L=3), ("f32",)),
    ("RNNoise", Row("gru", 1000, 1, 128, 384), ("f32",)),
    ("DeepBench", Row("rnn", 50, 32, 1760, 1760), ("bf16", "f32")),
    ("DeepBench", Row("gru", 187, 32, 2560, 2560), ("bf16",)),
    ("DeepBench", Row("lstm", 25, 16, 2048, 2048), ("bf16", "f32")),
    ("float64", Row("lstm", 150, 8, 256, 256), ("f64",)),
    ("DeepBench", Row("gru", 750, 1, 2048, 2048, modes=(FORWARD,)), ("bf16",)),
    ("DeepAR", Row("lstm", 60, 32, 40, 40, L=3), ("f32",)),
    ("LSTMP", Row("lstm", 20, 16, 512, 2048, P=512), ("f32", "bf16")),
    ("CRNN", Row("lstm", 50, 64, 512, 256, L=2, D=2), ("f32",)),
    ("many short sequences", Row("gru", 12, 4000, 8, 16, D=2), ("f32",)),
    ("no whole vector", Row("lstm", 60, 12, 96, 200), ("f32",)),
    ("packed", Row("lstm", 100, 32, 256, 256, packed=True), ("bf16", "f32")),
    ("Dreamer", Row("gru", 1, 16, 512, 512), ("f32",)),
    ("WaveRNN", Row("gru", 1, 1, 512, 512, modes=(FORWARD,)), ("f32",)),
    ("VAD", Row("lstm", 1, 1, 128, 128, modes=(FORWARD,)), ("f32",)),
]


def timed_rows(substring: str = "") -> Iterator[Timed]:
    """The rows whose name contains a text: all in their first precision, then in the others."""
    longest = max(len(precisions) for _, _, precisions in _ROWS)
    for place in range(longest):
        for source, row, precisions in _ROWS:
            if place < len(precisions):
                precision = precisions[place]
                timed = Timed(replace(row, dtype=PRECISIONS[precision]), precision, source)
                if substring in timed.name:
                    yield timed

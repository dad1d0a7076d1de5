"""The cases of the selftest: cells, shapes, reference results, and limits of errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops, _reference
from ._library import CELLS
from ._options import Batch, Options

REGIME = "FUSEDRNN_CUDA_REGIME"
PLAN = "FUSEDRNN_CUDA_PLAN"


@dataclasses.dataclass(frozen=True)
class Precision:
    """A dtype, or TF32 for float32, and the largest error allowed in it."""

    name: str
    dtype: torch.dtype
    limit: float  # of the error over the largest value of the tensor, in eps
    tf32: bool = False

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number; TF32 keeps 10 bits of a factor's mantissa."""
        return 2**-10 if self.tf32 else torch.finfo(self.dtype).eps


FLOAT32 = Precision("float32", torch.float32, 200)
FLOAT64 = Precision("float64", torch.float64, 1000)
FLOAT16 = Precision("float16", torch.float16, 8)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, 8)
TF32 = Precision("tf32", torch.float32, 8, tf32=True)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a call, the lengths of its sequences if they differ, and beginnings inside.

    With `starts` sequences begin inside the rows of the batch, and y also has c of every step.
    """

    T: int
    N: int
    I: int
    H: int
    D: int = 1
    lengths: tuple[int, ...] = ()
    packed: bool = False
    starts: bool = False

    def __str__(self) -> str:
        form = "packed" if self.packed else "lengths" if self.lengths else "plain"
        form += " starts" if self.starts else ""
        return f"{self.T},{self.N},{self.I},{self.H} D={self.D} {form}"


STARTS = Shape(6, 4, 3, 9, D=2, lengths=(6, 2, 0, 5), starts=True)
SMALL = (
    Shape(5, 3, 4, 7, D=2),
    Shape(1, 1, 3, 5),
    Shape(9, 12, 6, 17, D=2, lengths=(9, 2, 0, 5, 9, 1, 3, 3, 7, 9, 4, 6)),
    Shape(7, 9, 6, 16, D=2, lengths=(7, 7, 5, 4, 4, 3, 2, 1, 1), packed=True),
    STARTS,
)
LARGE = (Shape(40, 32, 64, 256), Shape(50, 1, 128, 512), Shape(20, 64, 96, 300, D=2))


class Call:
    """The arguments of `_ops.layer` for a cell and a shape, and checks of the results."""

    def __init__(self, cell: str, shape: Shape) -> None:
        self.cell, self.shape = cell, shape
        spec = CELLS[cell]
        T, N, I, H, D = shape.T, shape.N, shape.I, shape.H, shape.D
        P = max(1, H // 2) if spec.projects else H
        generator = torch.Generator().manual_seed(T * 1000 + H)

        def randn(*sizes: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*sizes, dtype=torch.float64, generator=generator)

        S = (sum(shape.lengths), I) if shape.packed else (T, N, I)
        self.inputs: list[Tensor | None] = [
            randn(*S),
            randn(D, N, P),
            randn(D, N, H) if spec.has_c else None,
        ]
        for parameter in spec.parameters * D:
            size = parameter.shape(G=spec.gates, H=H, I=I, P=P)
            # The weights are as large as those of a new layer. With larger weights a long sequence
            # is chaotic: rounding errors change its gradients by more than any limit.
            scale = I**-0.5 if parameter.sizes[-1] == "I" else H**-0.5
            if parameter.is_bias:
                scale = 1.0
            self.inputs.append(randn(*size, scale=scale))
        sizes = [sum(length > t for length in shape.lengths) for t in range(T)]
        self.batch = Batch(
            torch.tensor(sizes) if shape.packed else None,
            torch.tensor(shape.lengths) if shape.lengths and not shape.packed else None,
            N,
            torch.rand(*S[:-1], generator=generator) < 0.3 if shape.starts else None,
        )
        self.options = Options(cell, D == 2, shape.starts and spec.has_c)

    def leaves(self, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
        """Returns the inputs on a device and in a dtype, as leaves that require grad."""
        return [
            None if t is None else t.clone().to(device, dtype).requires_grad_() for t in self.inputs
        ]

    def outputs(self, leaves: Sequence[Tensor | None], layer: Any = None) -> list[Tensor]:
        """Runs `layer`, or ours if it is None, and returns the outputs."""
        x, h0, c0, *weights = leaves
        assert x is not None
        starts = self.batch.starts
        batch = self.batch._replace(starts=None if starts is None else starts.to(x.device))
        run: Any = layer or _ops.layer
        return [t for t in run(x, h0, c0, weights, batch, self.options) if t is not None]

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Returns gradients of the outputs, which are the same for every device and dtype."""
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o) for o in outputs
        ]

    def results(
        self,
        leaves: Sequence[Tensor | None],
        cotangents: Sequence[Tensor] | None = None,
        layer: Any = None,
    ) -> dict[str, Tensor]:
        """Returns outputs and gradients by name, such as "output 0" and "gradient 3"."""
        outputs = self.outputs(leaves, layer)
        wanted = {f"gradient {k}": t for k, t in enumerate(leaves) if t is not None}
        gradients = torch.autograd.grad(
            outputs,
            list(wanted.values()),
            self.cotangents(outputs) if cotangents is None else cotangents,
            allow_unused=True,
        )
        named = zip(wanted, gradients, strict=True)
        return {f"output {k}": o.detach() for k, o in enumerate(outputs)} | {
            name: t for name, t in named if t is not None
        }

    def compares_gradients(self, precision: Precision) -> bool:
        """Whether the gradients of every correct layer are within the limit.

        The derivative of relu jumps at 0. In a large case some values are so near to 0 that
        rounding changes their sign, and then their gradients are wrong by their full size.
        """
        jumps = self.cell == "rnn_relu" and precision.dtype != torch.float64
        return not jumps or self.shape in SMALL

    def error(self, device: torch.device, precision: Precision) -> tuple[float, str]:
        """Runs our layer; returns the largest error in eps, and the name of its tensor."""
        return self.error_of(self.results(self.leaves(device, precision.dtype)), precision)

    def error_of(self, actual: dict[str, Tensor], precision: Precision) -> tuple[float, str]:
        """Returns the same for given results."""
        expected = expected_results(self.cell, self.shape, precision.dtype)
        assert actual.keys() == expected.keys(), "other gradients than the reference has"
        errors = {}
        for name, wanted in expected.items():
            got = actual[name].cpu().double()
            assert got.shape == wanted.shape, f"{name} is {list(got.shape)}"
            assert got.isfinite().all(), f"{name} is not finite"
            if wanted.numel() == 0:
                continue
            if name.startswith("gradient") and not self.compares_gradients(precision):
                continue
            errors[name] = float(error_in_eps(got, wanted, precision).max())
        where = max(errors, key=errors.__getitem__)
        return errors[where], where


def error_in_eps(got: Tensor, wanted: Tensor, precision: Precision) -> Tensor:
    """The error of each number in eps, relative to the largest number of `wanted` (1 at least)."""
    scale = max(float(wanted.abs().max()), 1.0)
    return (got - wanted).abs() / scale / precision.eps


@functools.lru_cache(maxsize=64)
def expected_results(cell: str, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results in float64 for inputs rounded to a dtype. They are cached for the other regimes."""
    call = Call(cell, shape)
    rounded = call.leaves(torch.device("cpu"), dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in rounded]
    return call.results(exact, layer=_reference.layer)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two results have the same tensors with the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Captures the work of the block in a graph, and restores the stream even if this fails."""
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(stream)


@contextlib.contextmanager
def asking_for(regime: str, choice: str = "") -> Iterator[None]:
    """Makes the engine use a regime within the block; with "" the engine chooses.

    `choice` is what PLAN is within the block. With "" it stays what it is.
    """
    asked = {REGIME: regime} | ({PLAN: choice} if choice else {})
    before = {name: os.environ.pop(name, None) for name in asked}
    os.environ.update({name: value for name, value in asked.items() if value})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Allows or forbids TF32 in float32 products of torch, cuDNN and our kernels in the block."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

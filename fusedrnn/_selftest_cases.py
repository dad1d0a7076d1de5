"""The cases of the selftest: cells and shapes, the reference, and the limits of errors."""

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


@dataclasses.dataclass(frozen=True)
class Precision:
    """A dtype, or TF32 for float32, and the largest error allowed in it."""

    name: str
    dtype: torch.dtype
    limit: float  # over the largest value of a tensor, in eps
    tf32: bool = False

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number; products of TF32 take 10 bits of a factor."""
        return 2**-10 if self.tf32 else torch.finfo(self.dtype).eps


FLOAT32 = Precision("float32", torch.float32, 200)
FLOAT64 = Precision("float64", torch.float64, 1000)
FLOAT16 = Precision("float16", torch.float16, 8)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, 8)
TF32 = Precision("tf32", torch.float32, 8, tf32=True)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call, and the lengths of its sequences where they differ."""

    T: int
    N: int
    I: int
    H: int
    D: int = 1
    lengths: tuple[int, ...] = ()
    packed: bool = False

    def __str__(self) -> str:
        form = "packed" if self.packed else "lengths" if self.lengths else "plain"
        return f"{self.T},{self.N},{self.I},{self.H} D={self.D} {form}"


SMALL = (
    Shape(5, 3, 4, 7, D=2),
    Shape(1, 1, 3, 5),
    Shape(9, 12, 6, 17, D=2, lengths=(9, 2, 0, 5, 9, 1, 3, 3, 7, 9, 4, 6)),
    Shape(7, 9, 6, 16, D=2, lengths=(7, 7, 5, 4, 4, 3, 2, 1, 1), packed=True),
)
LARGE = (Shape(40, 32, 64, 256), Shape(50, 1, 128, 512), Shape(20, 64, 96, 300, D=2))


class Call:
    """Arguments of `_ops.layer` for a cell and a shape, and what they should give."""

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
            # Weights as large as a new layer's. With larger ones a long sequence is chaotic, and
            # rounding changes its gradients by more than any limit, in whatever order it happens.
            scale = I**-0.5 if parameter.sizes[-1] == "I" else H**-0.5
            if parameter.is_bias:
                scale = 1.0
            self.inputs.append(randn(*size, scale=scale))
        sizes = [sum(length > t for length in shape.lengths) for t in range(T)]
        self.batch = Batch(
            torch.tensor(sizes) if shape.packed else None,
            torch.tensor(shape.lengths) if shape.lengths and not shape.packed else None,
            N,
        )
        self.options = Options(cell, D == 2)

    def leaves(self, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
        """The inputs there, as leaves that require grad."""
        return [
            None if t is None else t.clone().to(device, dtype).requires_grad_() for t in self.inputs
        ]

    def outputs(self, leaves: Sequence[Tensor | None], layer: Any = None) -> list[Tensor]:
        """Runs a layer on them, ours if none is given."""
        x, h0, c0, *weights = leaves
        run: Any = layer or _ops.layer
        return [t for t in run(x, h0, c0, weights, self.batch, self.options) if t is not None]

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the outputs, the same for every device and dtype."""
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
        """Outputs and gradients by name."""
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
        """Whether every correct layer gives the reference's gradients within the limit.

        That of relu jumps at 0. Of the many values of a large case some lie so near to 0 that
        rounding moves them across, and then a gradient is wrong by all of itself.
        """
        jumps = self.cell == "rnn_relu" and precision.dtype != torch.float64
        return not jumps or self.shape in SMALL

    def error(self, device: torch.device, precision: Precision) -> tuple[float, str]:
        """The largest error in eps, and in which tensor it is."""
        return self.error_of(self.results(self.leaves(device, precision.dtype)), precision)

    def error_of(self, actual: dict[str, Tensor], precision: Precision) -> tuple[float, str]:
        """The same for results that are there."""
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
    """How far each number is off, over the largest one wanted, in eps."""
    scale = max(float(wanted.abs().max()), 1.0)
    return (got - wanted).abs() / scale / precision.eps


@functools.lru_cache(maxsize=64)
def expected_results(cell: str, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results in float64, from inputs rounded to a dtype; kept for the next regime that asks."""
    call = Call(cell, shape)
    rounded = call.leaves(torch.device("cpu"), dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in rounded]
    return call.results(exact, layer=_reference.layer)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two results are the same to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Captures what is enqueued into a graph; a capture that fails leaves no stream behind."""
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(stream)


@contextlib.contextmanager
def asking_for(regime: str) -> Iterator[None]:
    """Asks the kernels for a regime; for none where it is ""."""
    before = os.environ.pop(REGIME, None)
    if regime:
        os.environ[REGIME] = regime
    try:
        yield
    finally:
        os.environ.pop(REGIME, None)
        if before is not None:
            os.environ[REGIME] = before


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Lets torch, cuDNN and our kernels compute float32 products in TF32, or forbids it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

"""Calls of whole layers of the CPU engine without torch, and the expected results from numpy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from fusedrnn._library import CELLS
from tests.kit import numpy_reference
from tests.kit.build import native
from tests.kit.numpy_reference import WEIGHTS, Array


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a layer. All of its numbers follow from these fields."""

    cell: str
    N: int
    I: int
    H: int
    P: int
    D: int
    bias: bool
    batch_sizes: tuple[int, ...]
    c_in_y: bool = dataclasses.field(default=False, kw_only=True)

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """The arguments of numpy_reference.layer, as float64 numbers that are exact in float32."""
        rng = np.random.default_rng([len(self.batch_sizes), *dataclasses.astuple(self)[1:7]])

        def normal(*shape: int) -> Array:
            return rng.normal(size=shape).astype(np.float32).astype(np.float64)

        spec = CELLS[self.cell]
        scale = np.float32(1 / np.sqrt(self.H))
        parameters = {p.name: p for p in spec.parameters_with(self.bias)}
        sizes = {"G": spec.gates, "I": self.I, "H": self.H, "P": self.P}

        def weight(*shape: int) -> Array:
            return (rng.uniform(-1, 1, size=shape) * scale).astype(np.float32).astype(np.float64)

        rows = sum(self.batch_sizes)
        return {
            "cell": self.cell,
            "x": normal(rows, self.I),
            "weights": [
                [
                    weight(*parameters[name].shape(**sizes)) if name in parameters else None
                    for name in WEIGHTS.values()
                ]
                for _ in range(self.D)
            ],
            "batch_sizes": list(self.batch_sizes),
            "h0": normal(self.D, self.N, self.P),
            "c0": normal(self.D, self.N, self.H) if spec.has_c else None,
            # Some are 0 and some are 1, as in a mask.
            "row_input": rng.integers(0, 5, rows) / 4.0 if spec.takes_row else None,
            "c_in_y": self.c_in_y,
        }

    @functools.cached_property
    def loss_weights(self) -> dict[str, Array]:
        """Gradients of the outputs, which are exact in float32."""
        rng = np.random.default_rng(0)
        outputs = numpy_reference.layer(**self.inputs)
        return {
            name: rng.normal(size=output.shape).astype(np.float32).astype(np.float64)
            for name, output in outputs.items()
        }

    @functools.cached_property
    def expected(self) -> dict[str, Array]:
        """Outputs of the numpy layer, and gradients of the portable kernels in float64."""
        gradients = run(self, "portable", np.float64)
        return gradients | numpy_reference.layer(**self.inputs)


def cast(value: Any, dtype: type) -> Any:
    if isinstance(value, list):
        return [cast(v, dtype) for v in value]
    return value.astype(dtype) if isinstance(value, np.ndarray) else value


def run(case: Case, isa: str, dtype: type, **how: Any) -> dict[str, Array]:
    """Outputs and gradients by their names in numpy_reference. Gradients begin with "d_"."""
    inputs = {name: cast(value, dtype) for name, value in case.inputs.items()}
    d_out = {name: cast(value, dtype) for name, value in case.loss_weights.items()}
    x, weights, batch_sizes = inputs["x"], inputs["weights"], inputs["batch_sizes"]
    y, h, c, reserve = native().layer_forward(isa, **inputs, keep=True, **how)
    before = reserve.copy()
    d_x, d_h0, d_c0, d_weights = native().layer_backward(
        isa,
        case.cell,
        x,
        weights,
        batch_sizes,
        reserve,
        *(d_out["y"], d_out["h_n"], d_out.get("c_n")),
        row_input=inputs["row_input"],
        c_in_y=case.c_in_y,
        **how,
    )
    np.testing.assert_array_equal(reserve, before)
    result = {"y": y, "h_n": h, "c_n": c, "d_x": d_x, "d_h0": d_h0, "d_c0": d_c0}
    for d, gradients in enumerate(d_weights):
        result |= {f"d_{name} {d}": g for name, g in zip(WEIGHTS, gradients, strict=True)}
    return {name: value for name, value in result.items() if value is not None}


each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def assert_same_bits(actual: dict[str, Array], expected: dict[str, Array], where: object) -> None:
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if actual[name].tobytes() != expected[name].tobytes()]
    assert not wrong, f"{wrong} differ: {where}"

"""Calls of whole layers of the CUDA engine in the interpreter, and the limits of their errors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from fusedrnn._library import CELLS
from tests.kit import build
from tests.kit.build import native
from tests.kit.cases import Case
from tests.kit.device import STORAGE, Device, Limits, from_device, to_device
from tests.kit.numpy_reference import WEIGHTS, Array

DTYPES = ["f32", "f64", "f16", "bf16"]
EPS = {"f32": 2.0**-23, "f64": 2.0**-52, "f16": 2.0**-10, "bf16": 2.0**-7}
EPS_OF_TF32 = 2.0**-10
# Limits of the largest error of a tensor, as a multiple of eps and of the tensor's largest value.
EPS_OF_OUTPUTS = {"f32": 12, "f64": 12, "f16": 2, "bf16": 2}
EPS_OF_GRADIENTS = {"f32": 32, "f64": 32, "f16": 8, "bf16": 8}


@dataclasses.dataclass(frozen=True)
class DeviceCase(Case):
    """A call of a layer whose inputs are exact in the dtype in which a device stores them."""

    dtype: str = "f32"

    # tests.kit.starts has cases in which this is set.
    starts: ClassVar[Array | None] = None  # [rows] whether a sequence begins

    def _round(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._round(v) for v in value]
        if not isinstance(value, np.ndarray):
            return value
        return from_device(to_device(value, self.dtype), self.dtype).astype(np.float64)

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        return {k: v if k == "batch_sizes" else self._round(v) for k, v in super().inputs.items()}

    @functools.cached_property
    def loss_weights(self) -> dict[str, Array]:
        return {k: self._round(v) for k, v in super().loss_weights.items()}


def some_cases(cell: str, dtype: str) -> Iterator[DeviceCase]:
    """Odd sizes, plain and packed batches, one and two directions, one step, one sequence."""
    for D, N, H, sizes, bias in [
        (1, 3, 5, (3, 3, 3, 3), True),
        (2, 5, 33, (5, 3, 3, 1), True),
        (2, 4, 7, (2, 1), False),  # two sequences without steps
        (1, 1, 1, (1,), True),
    ]:
        P = max(1, 2 * H // 3) if CELLS[cell].projects else H
        yield DeviceCase(cell, N, 4, H, P, D, bias, sizes, dtype)


@dataclasses.dataclass
class Run:
    """The results of a device in float64, the reserve, and the device."""

    results: dict[str, Array]
    reserve: bytes
    device: Device


def beginnings(case: DeviceCase) -> list[Array | None]:
    """The arrays of `Beginnings` in csrc/cuda/layer.h: drops [rows] by direction, begins [N]."""
    if case.starts is None:
        return [None] * 3
    sizes = [*case.batch_sizes, 0]
    first = np.cumsum([0, *sizes])
    drops = np.zeros((2, len(case.starts)), np.uint8)
    for t, (n, following) in enumerate(itertools.pairwise(sizes)):
        here, there = slice(first[t], first[t] + n), slice(first[t + 1], first[t + 1] + following)
        drops[0, first[t] : first[t] + following] = case.starts[there]
        drops[1, here] = case.starts[here] if t > 0 else 0
    begins = np.zeros(case.N, np.uint8)
    begins[: sizes[0]] = case.starts[: sizes[0]]
    return [drops[0], drops[1] if case.D == 2 else None, begins]


def run_on(
    case: DeviceCase,
    device: Device,
    keep: bool = True,
    regime: str = "per_step",
    allow_tf32: bool = False,
    gates_bytes: int = 1 << 26,
    spin_limit: int | None = None,
    choice: str = "",
    want_x: bool = True,
    want_weights: bool = True,
    with_d_y: bool = True,
) -> Run:
    """Outputs and, with a reserve, gradients. Their names are those of tests.kit.cases.run."""
    how = (regime, allow_tf32, gates_bytes, spin_limit or build.host().SPIN_LIMIT, choice)
    dtype, i = case.dtype, case.inputs
    real = "f64" if dtype == "f64" else "f32"
    host = build.host()
    call = host.Call(
        *(case.cell, i["batch_sizes"], case.N, case.I, case.H, case.P, case.D),
        has_starts=case.starts is not None,
        c_in_y=case.c_in_y,
    )

    def address(array: Array | None) -> int:
        return 0 if array is None else int(array.ctypes.data)

    memory = device.memory
    x = device.put(i["x"], dtype, "x")
    weights = [
        [device.put(w, dtype, name) for name, w in zip(WEIGHTS, direction, strict=True)]
        for direction in i["weights"]
    ]
    weight_addresses = [[address(w) for w in direction] for direction in weights]
    row_input = device.put(i["row_input"], real, "row_input")
    h, c = (device.put(i[f"{name}0"], real, name, writable=True) for name in ("h", "c"))
    marks = [
        None if m is None else memory.copy(m, "beginnings", writable=False)
        for m in beginnings(case)
    ]
    begins = [address(m) for m in marks]
    y = memory.empty((len(x), case.D * (case.P + case.H * case.c_in_y)), x.dtype, "y")
    size = getattr(host, f"reserve_bytes_{dtype}")(call)
    reserve = memory.empty((size,), np.uint8, "reserve") if keep else None
    forward = getattr(host, f"layer_forward_{dtype}")
    forward(
        *(device, call, address(x), weight_addresses, address(row_input)),
        *(address(h), address(c), address(y), address(reserve), begins, *how),
    )
    assert memory.written(y).all()
    results = {"y": from_device(y, dtype), "h_n": h} | ({} if c is None else {"c_n": c})
    if reserve is None:
        return Run(_doubles(results), b"", device)
    # With 16-bit types there may be a gap before c_in, which is float32 and aligned.
    assert memory.written(reserve).all() or dtype in ("f16", "bf16")
    before = reserve.tobytes()
    d_y = device.put(case.loss_weights["y"], dtype, "d_y") if with_d_y else None
    d_h, d_c = (
        device.put(case.loss_weights.get(f"{name}_n"), real, f"d_{name}", writable=True)
        for name in ("h", "c")
    )
    d_x = memory.empty(x.shape, x.dtype, "d_x") if want_x else None
    d_weights = [
        [
            None if w is None or not want_weights else memory.empty(w.shape, w.dtype, "d_weight")
            for w in direction
        ]
        for direction in weights
    ]
    getattr(host, f"layer_backward_{dtype}")(
        *(device, call, address(x), weight_addresses, address(row_input), address(reserve)),
        *(address(d_y), address(d_h), address(d_c), address(d_x)),
        [[address(w) for w in direction] for direction in d_weights],
        *(begins, *how),
    )
    assert reserve.tobytes() == before
    results["d_h0"] = d_h
    if d_x is not None:
        results["d_x"] = from_device(d_x, dtype)
    if d_c is not None:
        results["d_c0"] = d_c
    for d, direction in enumerate(d_weights):
        for name, gradient in zip(WEIGHTS, direction, strict=True):
            if gradient is not None:
                assert memory.written(gradient).all()
                results[f"d_{name} {d}"] = from_device(gradient, dtype)
    return Run(_doubles(results), before, device)


def plan_of(case: DeviceCase, limits: Limits, backward: bool, tf32: bool) -> dict[str, Any]:
    """The plan of a case in the streamed regime."""
    sizes = [len(case.batch_sizes), case.batch_sizes[0], case.I, case.H, case.P, case.D]
    return build.host().plan(
        *(case.cell, case.dtype, sizes, "sm_80"),
        backward=backward,
        allow_tf32=tf32,
        regime="streamed",
        device=SimpleNamespace(device=limits),
    )


def tight(case: DeviceCase, sms: int, cores: str, spare: int = 0) -> Limits:
    """A device with just enough shared memory for both passes of a case, and `spare` KiB."""
    tf32 = cores == "mma_tf32"
    for kib in range(2, 228, 2):
        limits = Limits(sms=sms, shared_per_block=kib << 10, shared_per_sm=(kib + 1) << 10)
        plans = [plan_of(case, limits, backward, tf32) for backward in (False, True)]
        if all((p["regime"], p["cores"]) == ("streamed", cores[:3]) for p in plans):
            more = (kib + spare) << 10
            return dataclasses.replace(limits, shared_per_block=more, shared_per_sm=more + 1024)
    raise AssertionError(f"no shared memory is enough for {case}")


def _doubles(results: dict[str, Array]) -> dict[str, Array]:
    return {name: np.array(value, np.float64) for name, value in results.items()}


def assert_close(
    actual: dict[str, Array], expected: dict[str, Array], case: DeviceCase, eps: float
) -> None:
    """Compares with errors relative to the largest value, or to 1 if that is larger.

    The terms of a gradient are about 1, and may cancel.
    """
    assert actual.keys() == expected.keys()
    for name, got in actual.items():
        wanted = expected[name]
        assert got.shape == wanted.shape, (name, case)
        if got.size == 0:
            continue
        scale = max(1.0, np.abs(wanted).max())
        error = np.abs(got - wanted).max() / scale / eps
        gradient = name.startswith("d_")
        limit = (EPS_OF_GRADIENTS if gradient else EPS_OF_OUTPUTS)[case.dtype]
        assert error <= limit, f"{name} is off by {error:.1f} eps: {case}"


def reserve_values(case: DeviceCase, reserve: bytes) -> Array:
    """The values of a reserve, converted to the float64 reserve of the CPU engine."""
    dtype, rows, H = case.dtype, sum(case.batch_sizes), case.H
    spec = CELLS[case.cell]
    real = "f64" if dtype == "f64" else "f32"
    parts, at = [], 0
    for _ in range(case.D):
        # If saved is h_t itself, only the last step of each sequence has it: h_in has the others.
        saved = case.N if spec.saves_h else spec.saved * rows
        kept = [(dtype, saved * H), (dtype, rows * case.P)]
        kept += [(real, rows * H)] if spec.has_c else []
        kept += [(dtype, rows * H)] if spec.stages > 1 else []
        for stored, size in kept:
            width = np.dtype(STORAGE[stored]).itemsize
            at = -(-at // width) * width
            values = np.frombuffer(reserve, STORAGE[stored], size, at)
            parts.append(from_device(values, stored).astype(np.float64))
            at += size * width
        at = -(-at // 4) * 4
    assert at == len(reserve)
    return np.concatenate(parts)


def gradients_of(case: DeviceCase, reserve: Array) -> dict[str, Array]:
    """The CPU engine's gradients in float64, from the reserve of another engine's forward."""
    i, d_out = case.inputs, case.loss_weights
    states = (d_out["y"], d_out["h_n"], d_out.get("c_n"))
    call = ("portable", case.cell, i["x"], i["weights"], i["batch_sizes"], reserve, *states)
    d_x, d_h0, d_c0, d_weights = native().layer_backward(
        *call, row_input=i["row_input"], c_in_y=case.c_in_y
    )
    result = {"d_x": d_x, "d_h0": d_h0, "d_c0": d_c0}
    for d, gradients in enumerate(d_weights):
        result |= {f"d_{name} {d}": g for name, g in zip(WEIGHTS, gradients, strict=True)}
    return {name: value for name, value in result.items() if value is not None}


def assert_right(got: Run, case: DeviceCase, eps: float | None = None) -> None:
    """Asserts that outputs equal those of numpy, and gradients those of the CPU engine.

    The CPU engine's backward reads the values that the device's forward kept: rounding to 16 bits
    may move the argument of a relu across zero, where its gradient jumps, so that only gradients at
    the same point can be compared.

    Args:
        eps: the eps of the products, if it differs from the dtype's.
    """
    gradients = gradients_of(case, reserve_values(case, got.reserve))
    assert_close(got.results, case.expected | gradients, case, eps or EPS[case.dtype])
    if case.dtype in ("f32", "f64") and eps is None:
        assert_close(got.results, case.expected, case, EPS[case.dtype])

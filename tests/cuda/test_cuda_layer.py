"""Whole layers of the CUDA engine: nvcc's PTX in the interpreter, started by the real host side.

Outputs are compared with numpy in float64. Gradients and the reserve are compared with the CPU
engine's portable kernels in float64. Every access is checked for its bounds, for races, and for
uninitialised and stale reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import setup_build
from fusedrnn._library import CELLS
from tests.kit import build
from tests.kit.build import native
from tests.kit.device import Device, Limits
from tests.kit.device_cases import (
    DTYPES,
    EPS,
    EPS_OF_TF32,
    DeviceCase,
    Run,
    assert_right,
    reserve_values,
    run_on,
    some_cases,
)

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_per_step(cell: str, dtype: str) -> None:
    for case in some_cases(cell, dtype):
        got = run_on(case, Device(build.ptx(80)))
        assert_right(got, case)
        plain = run_on(case, Device(build.ptx(80), seed=2), keep=False)
        assert all((plain.results[k] == got.results[k]).all() for k in plain.results)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_reserve_equals_that_of_the_cpu_engine(cell: str, dtype: type) -> None:
    """Both engines write the same values to the same places of the reserve."""
    name = "f32" if dtype is np.float32 else "f64"
    for case in some_cases(cell, name):
        inputs = case.inputs | {
            k: case.inputs[k].astype(dtype)
            for k in ("x", "h0", "c0", "row_input")
            if case.inputs[k] is not None
        }
        inputs["weights"] = [
            [None if w is None else w.astype(dtype) for w in d] for d in inputs["weights"]
        ]
        expected = native().layer_forward("portable", **inputs, keep=True)[3]
        got = np.frombuffer(run_on(case, Device(build.ptx(80))).reserve, dtype)
        np.testing.assert_allclose(got, expected, rtol=0, atol=12 * np.finfo(dtype).eps)


RESIDENT_CELLS = [cell for cell, spec in CELLS.items() if not spec.projects]


def check_resident(case: DeviceCase, cores: str, seed: int, sms: int = 4) -> Device:
    """Runs a case in the resident regime and checks that its cores were the expected ones."""
    limits, tf32 = Limits(sms=sms), cores == "mma_tf32"
    how = {"regime": "resident", "allow_tf32": tf32}
    got = run_on(case, Device(build.ptx(80), seed, limits), **how)
    names = {name for name in got.device.launches if name.startswith("resident")}
    assert names == {f"resident_forward_{cores}", f"resident_backward_{cores}"}
    assert_right(got, case, EPS_OF_TF32 if tf32 else None)
    plain = run_on(case, Device(build.ptx(80), seed + 1, limits), keep=False, **how)
    assert all((plain.results[k] == got.results[k]).all() for k in plain.results)
    return got.device


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_resident(cell: str, dtype: str) -> None:
    for case in some_cases(cell, dtype):
        check_resident(case, f"fma_{dtype}", seed=1)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_resident_on_tensor_cores(cell: str, dtype: str) -> None:
    cores = "mma_tf32" if dtype == "f32" else f"mma_{dtype}"
    for D, N, H, sizes, bias in [
        (1, 8, 16, (8, 8), True),
        (2, 19, 21, (19, 11, 3), True),
        (1, 9, 37, (9,), False),
    ]:
        check_resident(DeviceCase(cell, N, 3, H, H, D, bias, sizes, dtype), cores, seed=1)


@pytest.mark.parametrize(
    ("cores", "case", "sms"),
    [
        # The weights do not fit into the registers, so that some are in shared memory.
        ("fma_f32", DeviceCase("lstm", 2, 3, 70, 70, 1, True, (2, 1)), 2),
        ("fma_bf16", DeviceCase("gru", 2, 3, 70, 70, 1, True, (2, 1), "bf16"), 1),
        ("mma_tf32", DeviceCase("rnn_tanh", 8, 3, 530, 530, 1, True, (8, 8)), 9),
        ("mma_f16", DeviceCase("lstm", 9, 3, 135, 135, 1, True, (9, 8), "f16"), 9),
        # There are more sequences than one block takes.
        ("fma_f32", DeviceCase("lstm", 70, 3, 8, 8, 2, True, (70, 41, 3)), 4),
        ("mma_bf16", DeviceCase("gru", 40, 3, 16, 16, 1, True, (40, 23, 3), "bf16"), 4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resident_sizes(cores: str, case: DeviceCase, sms: int) -> None:
    check_resident(case, cores, seed=3, sms=sms)


@pytest.mark.parametrize("cores", ["fma_f32", "mma_bf16"])
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_the_order_of_threads_changes_no_bit(cell: str, cores: str) -> None:
    mma, dtype = cores.split("_")
    N = 9 if mma == "mma" else 3
    case = DeviceCase(cell, N, 3, 18, 18, 2, True, (N, 2), dtype)
    runs = [
        run_on(case, Device(build.ptx(80), seed), regime="resident").results for seed in range(4)
    ]
    for other in runs[1:]:
        assert all((other[name] == value).all() for name, value in runs[0].items())


@pytest.mark.parametrize("cores", ["fma_f32", "mma_bf16"])
def test_blocks_poll_far_less_often_than_the_limit(cores: str) -> None:
    """No block gives up with a limit 8192 times smaller, though threads take turns here."""
    mma, dtype = cores.split("_")
    N = 9 if mma == "mma" else 3
    case = DeviceCase("lstm", N, 3, 70, 70, 2, True, (N, N, 2), dtype)
    for seed in range(3):
        limits = Limits(sms=8)
        got = run_on(
            case,
            Device(build.ptx(80), seed, limits),
            regime="resident",
            spin_limit=build.host().SPIN_LIMIT >> 13,
        )
        assert_right(got, case)


def test_the_regimes_agree() -> None:
    """Either regime can run backward from the reserve of either regime."""
    case = DeviceCase("gru", 3, 4, 19, 19, 2, True, (3, 2, 2))
    per_step, resident = (
        run_on(case, Device(build.ptx(80)), regime=regime) for regime in ("per_step", "resident")
    )
    np.testing.assert_allclose(
        reserve_values(case, per_step.reserve),
        reserve_values(case, resident.reserve),
        rtol=0,
        atol=8 * EPS["f32"],
    )


def test_sizes_that_do_not_fit_are_refused() -> None:
    case = DeviceCase("lstm_proj", 2, 3, 8, 4, 1, True, (2,))
    with pytest.raises(ValueError, match="resident regime was asked for, but a projection"):
        run_on(case, Device(build.ptx(80)), regime="resident")
    case = DeviceCase("lstm", 2, 3, 200, 200, 1, True, (2,))
    with pytest.raises(ValueError, match="do not fit"):
        run_on(case, Device(build.ptx(80), limits=Limits(sms=1)), regime="resident")
    assert not any(
        name.startswith("resident")
        for name in run_on(
            case, Device(build.ptx(80), limits=Limits(sms=1)), regime=""
        ).device.launches
    )


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@pytest.mark.parametrize("regime", ["per_step", "resident"])
def test_chunks_of_steps(regime: str, cell: str) -> None:
    """x W is computed for a few steps at a time. States pass from launch to launch."""
    case = DeviceCase(cell, 3, 3, 6, 6, 2, True, (3, 3, 3, 2, 2, 1, 1))
    step = 2 * 3 * CELLS[cell].gates * 6 * 4
    for steps in (1, 3, 6):
        got = run_on(case, Device(build.ptx(80)), regime=regime, gates_bytes=steps * step)
        if regime == "resident":
            assert got.device.launches.count("resident_forward_fma_f32") == -(-7 // steps)
        assert_right(got, case)


def test_offsets_of_long_sequences_need_several_launches() -> None:
    case = DeviceCase("rnn_tanh", 2, 1, 2, 2, 1, True, (2,) * 300 + (1,) * 400)
    device = Device(build.ptx(80))
    got = run_on(case, device, regime="resident")
    assert device.launches.count("write_numbers") == 2 * 2
    assert_right(got, case)


@pytest.mark.parametrize("regime", ["per_step", "resident"])
def test_no_rows(regime: str) -> None:
    """Without rows the initial states are the result, and gradients of weights are zero."""
    case = DeviceCase("gru", 2, 3, 4, 4, 2, True, ())
    got = run_on(case, Device(build.ptx(80)), regime=regime)
    np.testing.assert_array_equal(got.results["h_n"], case.inputs["h0"])
    np.testing.assert_array_equal(got.results["d_h0"], case.loss_weights["h_n"])
    assert not got.results["d_w_hh 1"].any()
    assert got.device.launches == []


ALL_CORES = ["per_step", "fma", "mma"]


def run_with(cores: str, case: DeviceCase, seed: int = 1, **options: Any) -> Run:
    regime = "per_step" if cores == "per_step" else "resident"
    got = run_on(case, Device(build.ptx(80), seed), regime=regime, **options)
    if regime == "resident":
        assert any(f"_{cores}_" in name for name in got.device.launches)
    return got


@pytest.mark.parametrize("cores", ALL_CORES)
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_nan_stays_in_its_sequence(cell: str, cores: str) -> None:
    N = 9 if cores == "mma" else 3
    case = DeviceCase(cell, N, 3, 18, 18, 2, True, (N, N - 1), "bf16")
    clean = run_with(cores, case)
    sick = dataclasses.replace(case)  # a copy computes its own inputs
    sick.inputs["x"][[1, N + 1]] = sick.inputs["h0"][:, 1] = np.nan
    got = run_with(cores, sick)
    assert np.isnan(got.results["y"][[1, N + 1]]).all()
    for name in ("y", "d_x"):
        others = [np.delete(r.results[name], [1, N + 1], axis=0) for r in (got, clean)]
        np.testing.assert_array_equal(*others)
    for name in ("h_n", "c_n", "d_h0", "d_c0"):
        if name in clean.results:
            others = [np.delete(r.results[name], 1, axis=1) for r in (got, clean)]
            np.testing.assert_array_equal(*others)


@pytest.mark.parametrize("cores", ALL_CORES)
def test_gradients_that_are_not_wanted(cores: str) -> None:
    """An absent gradient of y counts as zero. Leaving out some gradients changes no other."""
    N = 9 if cores == "mma" else 3
    case = DeviceCase("gru", N, 3, 18, 18, 2, True, (N, 2), "bf16")
    whole = run_with(cores, case).results
    for options in ({"want_x": False}, {"want_weights": False}):
        part = run_with(cores, case, **options).results
        assert part.keys() < whole.keys()
        assert all((whole[name] == value).all() for name, value in part.items())
    silent = dataclasses.replace(case)
    silent.loss_weights["y"][...] = 0
    without = run_with(cores, case, with_d_y=False).results
    for name, value in run_with(cores, silent).results.items():
        np.testing.assert_array_equal(value, without[name])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_oldest_gpu(cell: str, dtype: str) -> None:
    """The PTX of sm_75 runs with 64 KB of shared memory and without tensor cores."""
    limits = Limits(75, 4, 1024, 65536, 65536, 65536, 0)
    case = DeviceCase(cell, 9, 3, 18, 12 if CELLS[cell].projects else 18, 1, True, (9, 4), dtype)
    device = Device(build.ptx(75), limits=limits)
    got = run_on(case, device, regime="")
    resident = {name for name in device.launches if name.startswith("resident")}
    wanted = {f"resident_forward_fma_{dtype}", f"resident_backward_fma_{dtype}"}
    assert resident == (set() if CELLS[cell].projects else wanted)
    assert_right(got, case)


def random_case(rng: np.random.Generator) -> tuple[DeviceCase, dict[str, Any], Limits]:
    """A call with small sizes, options for it, and a device with few multiprocessors."""
    cell, dtype = list(CELLS)[rng.integers(len(CELLS))], DTYPES[rng.integers(len(DTYPES))]
    N, H, T, D = (int(rng.integers(1, most)) for most in (30, 60, 5, 3))
    sizes = np.sort(rng.integers(1, N + 1, size=T))[::-1] if rng.random() < 0.6 else [N] * T
    P = max(1, int(H * rng.uniform(0.2, 1))) if CELLS[cell].projects else H
    bias = bool(rng.random() < 0.7)
    case = DeviceCase(
        cell, N, int(rng.integers(1, 6)), H, P, D, bias, tuple(map(int, sizes)), dtype
    )
    options = {
        "regime": ["", "streamed", "per_step"][rng.integers(3)],
        "allow_tf32": bool(rng.integers(2)),
        "gates_bytes": int(rng.integers(1, 1 << 16)),
    }
    return case, options, Limits(sms=int(rng.integers(D, 9)))


def test_random_sizes() -> None:
    rng = np.random.default_rng(0)
    started: set[str] = set()
    for seed in range(300):
        case, options, limits = random_case(rng)
        got = run_on(case, Device(build.ptx(80), seed, limits), **options)
        started |= set(got.device.launches)
        tf32 = any("tf32" in name for name in got.device.launches)
        assert_right(got, case, EPS_OF_TF32 if tf32 else None)
    kernels = set(Device(build.ptx(80)).kernels)
    kernels.remove("drop_states")  # of calls that say where sequences begin (test_cuda_starts.py)
    # Clusters have to be asked for (test_cuda_clusters.py).
    assert started == {name for name in kernels if not name.startswith("clustered")}

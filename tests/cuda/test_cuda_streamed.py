"""Layers of the streamed regime: nvcc's PTX in the interpreter, started by the real host side.

The comparisons and the checks are those of test_cuda_layer.py. Most devices here have so little
shared memory that a part of the weights is streamed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import setup_build
from fusedrnn._library import CELLS
from tests.kit import build
from tests.kit.device import Device, Limits
from tests.kit.device_cases import (
    DTYPES,
    EPS,
    EPS_OF_TF32,
    DeviceCase,
    Run,
    assert_right,
    plan_of,
    reserve_values,
    run_on,
    some_cases,
    tight,
)

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)


def run_streamed(case: DeviceCase, limits: Limits | None = None, seed: int = 1, **how: Any) -> Run:
    device = Device(build.ptx(80), seed, limits)
    return run_on(case, device, regime="streamed", **how)


def check_streamed(
    case: DeviceCase, cores: str, limits: Limits | None = None, seed: int = 1
) -> Run:
    """Runs a case in the streamed regime and checks that its cores were the expected ones."""
    tf32 = cores == "mma_tf32"
    got = run_streamed(case, limits, seed, allow_tf32=tf32)
    names = {name for name in got.device.launches if "ward_" in name}
    assert names == {f"streamed_forward_{cores}", f"streamed_backward_{cores}"}
    assert_right(got, case, EPS_OF_TF32 if tf32 else None)
    plain = run_streamed(case, limits, seed + 1, allow_tf32=tf32, keep=False)
    assert all((plain.results[k] == got.results[k]).all() for k in plain.results)
    return got


def cores_of(dtype: str, mma: bool) -> str:
    return f"mma_{'tf32' if dtype == 'f32' else dtype}" if mma else f"fma_{dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_streamed(cell: str, dtype: str) -> None:
    for case in some_cases(cell, dtype):
        check_streamed(case, cores_of(dtype, mma=False))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cell", CELLS)
def test_streamed_on_tensor_cores(cell: str, dtype: str) -> None:
    for D, N, H, sizes, bias in [
        (1, 8, 16, (8, 8), True),
        (2, 19, 21, (19, 11, 3), True),
        (1, 9, 37, (9,), False),
    ]:
        P = 2 * H // 3 if CELLS[cell].projects else H
        check_streamed(DeviceCase(cell, N, 3, H, P, D, bias, sizes, dtype), cores_of(dtype, True))


def sms_for(case: DeviceCase, cores: str) -> int:
    """Enough multiprocessors for the weight rows, of which a block has 250 or 64 at most."""
    return -(-case.H * CELLS[case.cell].gates // (64 if cores.startswith("mma") else 240))


def wide_case(cell: str, dtype: str, mma: bool) -> DeviceCase:
    """A case whose weights do not fit the least shared memory with which it runs."""
    if mma:
        N, H = 17, 160
    else:
        N, H = 3, {"f32": 150, "f64": 100, "f16": 210, "bf16": 210}[dtype]
    P = 3 * H // 4 if CELLS[cell].projects else H
    return DeviceCase(cell, N, 3, H, P, 1, True, (N, N, N - 1, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_are_streamed(cell: str, dtype: str) -> None:
    case, cores = wide_case(cell, dtype, mma=False), cores_of(dtype, mma=False)
    limits = tight(case, sms_for(case, cores), cores)
    for backward in (False, True):
        assert plan_of(case, limits, backward, False)["streamed_bytes"] > 0
    check_streamed(case, cores, limits)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cell", CELLS)
def test_little_shared_memory_on_tensor_cores(cell: str, dtype: str) -> None:
    case, cores = wide_case(cell, dtype, mma=True), cores_of(dtype, mma=True)
    limits = tight(case, sms_for(case, cores), cores)
    check_streamed(case, cores, limits)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("cell", "N"), [("rnn_tanh", 25), ("gru", 8)])
def test_weights_that_are_streamed_to_tensor_cores(cell: str, N: int, dtype: str) -> None:
    """Each warp has several groups of K, and some warps have one fewer."""
    H = 300 if dtype == "f32" else 580
    case = DeviceCase(cell, N, 3, H, H, 1, True, (N, N), dtype)
    cores = cores_of(dtype, mma=True)
    limits = tight(case, sms_for(case, cores), cores)
    for backward in (False, True):
        assert plan_of(case, limits, backward, dtype == "f32")["streamed_bytes"] > 0
    check_streamed(case, cores, limits)


@pytest.mark.parametrize(
    ("case", "spare"),
    [
        # Many groups of sequences, sequences that begin and end within each of them.
        (DeviceCase("gru", 70, 2, 24, 24, 2, True, (70, 41, 40, 17, 16, 1), "bf16"), 0),
        (DeviceCase("lstm", 29, 2, 60, 60, 2, True, (29, 17, 9, 8, 3), "f32"), 0),
        (DeviceCase("gru_reset_before", 29, 2, 60, 60, 2, True, (29, 17, 9, 8, 3), "f64"), 0),
        (DeviceCase("lstm_proj", 40, 2, 48, 20, 2, True, (40, 17, 16, 15), "f16"), 0),
        # Both stages are streamed, or only the first one.
        (DeviceCase("gru_reset_before", 3, 2, 110, 110, 1, True, (3, 3, 2), "f32"), 0),
        (DeviceCase("gru_reset_before", 3, 2, 110, 110, 1, True, (3, 3, 2), "f32"), 40),
        # A projection that is wider than a block's units, and blocks without outputs.
        (DeviceCase("lstm_proj", 3, 2, 40, 3, 1, True, (3, 3, 2), "f32"), 4),
        (DeviceCase("lstm_proj", 9, 2, 40, 39, 1, True, (9, 9, 2), "bf16"), 4),
    ],
    ids=lambda value: f"{value.cell}-{value.dtype}" if isinstance(value, DeviceCase) else "",
)
def test_groups_and_stages(case: DeviceCase, spare: int) -> None:
    sms = 12 * case.D if case.N > 8 else 2
    mma = case.N > 8 and case.dtype in ("f16", "bf16")
    cores = cores_of(case.dtype, mma)
    check_streamed(case, cores, tight(case, sms, cores, spare), seed=5)


@pytest.mark.parametrize("cores", ["fma_f32", "fma_f64", "mma_bf16"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_order_of_threads_changes_no_bit(cell: str, cores: str) -> None:
    mma, dtype = cores.split("_")
    case = wide_case(cell, dtype, mma == "mma")
    case = dataclasses.replace(case, batch_sizes=(case.N, 2))
    limits = tight(case, sms_for(case, cores), cores)
    runs = [run_streamed(case, limits, seed).results for seed in range(3)]
    for other in runs[1:]:
        assert all((other[name] == value).all() for name, value in runs[0].items())


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "lstm_proj"])
def test_chunks_of_steps(cell: str) -> None:
    """x W is computed for a few steps at a time. States pass from launch to launch."""
    P = 4 if CELLS[cell].projects else 6
    case = DeviceCase(cell, 3, 3, 6, P, 2, True, (3, 3, 3, 2, 2, 1, 1))
    step = 2 * 3 * CELLS[cell].gates * 6 * 4
    for steps in (1, 3, 6):
        got = run_streamed(case, gates_bytes=steps * step)
        assert got.device.launches.count("streamed_forward_fma_f32") == -(-7 // steps)
        assert_right(got, case)


def test_the_regimes_agree() -> None:
    """Backward can take the reserve of any regime."""
    case = DeviceCase("gru", 3, 4, 19, 19, 2, True, (3, 2, 2))
    reserves = [
        reserve_values(case, run_on(case, Device(build.ptx(80)), regime=regime).reserve)
        for regime in ("per_step", "resident", "streamed")
    ]
    for other in reserves[1:]:
        np.testing.assert_allclose(other, reserves[0], rtol=0, atol=8 * EPS["f32"])


def test_blocks_that_do_not_fit_are_refused() -> None:
    case = DeviceCase("lstm", 2, 3, 200, 200, 1, True, (2,))
    with pytest.raises(ValueError, match="streamed regime was asked for, but a block's part"):
        run_streamed(case, Limits(sms=1))
    assert not any(
        name.startswith(("resident", "streamed"))
        for name in run_on(
            case, Device(build.ptx(80), limits=Limits(sms=1)), regime=""
        ).device.launches
    )


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_oldest_gpu(cell: str, dtype: str) -> None:
    """sm_75 has no asynchronous copies."""
    case, cores = wide_case(cell, dtype, mma=False), cores_of(dtype, mma=False)
    limits = tight(case, sms_for(case, cores), cores)
    limits = dataclasses.replace(limits, capability=75, threads_per_sm=1024, shared_reserved=0)
    device = Device(build.ptx(75), limits=limits)
    got = run_on(case, device, regime="streamed")
    assert_right(got, case)


def test_a_nan_stays_in_its_sequence() -> None:
    case = DeviceCase("lstm_proj", 20, 3, 18, 11, 2, True, (20, 19), "bf16")
    clean = run_streamed(case)
    sick = dataclasses.replace(case)  # a copy computes its own inputs
    sick.inputs["x"][[1, 21]] = sick.inputs["h0"][:, 1] = np.nan
    got = run_streamed(sick)
    assert np.isnan(got.results["y"][[1, 21]]).all()
    for name in ("y", "d_x"):
        others = [np.delete(r.results[name], [1, 21], axis=0) for r in (got, clean)]
        np.testing.assert_array_equal(*others)


@pytest.mark.parametrize("regime", ["resident", "streamed"])
@pytest.mark.parametrize(
    ("cores", "choice"),
    [
        ("fma_f32", "units=3,rows=2"),
        ("fma_f32", "units=20,rows=11"),
        ("fma_bf16", "cores=fma,rows=11"),
        ("mma_bf16", "units=5,rows=4"),
        ("mma_bf16", "units=16,rows=6"),
    ],
)
def test_chosen_blocks(regime: str, cores: str, choice: str) -> None:
    case = DeviceCase("gru_reset_before", 11, 3, 20, 20, 1, True, (11, 10, 3), cores[4:])
    limits = Limits(sms=48)
    device = Device(build.ptx(80), limits=limits)
    got = run_on(case, device, regime=regime, choice=choice)
    assert {f"{regime}_forward_{cores}", f"{regime}_backward_{cores}"} <= set(device.launches)
    assert_right(got, case)


def test_a_choice_that_does_not_fit_is_refused() -> None:
    case = DeviceCase("lstm", 3, 3, 20, 20, 1, True, (3, 3))
    message = (
        "a plan of the forward pass was asked for, but units=2 does not fit, "
        "what fits is rows=3 with units=5 to "
    )
    with pytest.raises(ValueError, match=message):
        run_on(case, Device(build.ptx(80)), choice="units=2", regime="")

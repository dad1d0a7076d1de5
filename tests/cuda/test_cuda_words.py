"""The resident regime with an exchange of words in place of values and a barrier."""

from __future__ import annotations

import pytest

import setup_build
from fusedrnn._library import CELLS
from tests.kit import build
from tests.kit.device import Device, Limits
from tests.kit.device_cases import DeviceCase, Run, assert_right, run_on, some_cases
from tests.ptxvm import Fault

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

RESIDENT_CELLS = [cell for cell, spec in CELLS.items() if not spec.projects]


def run_words(case: DeviceCase, seed: int = 1, sms: int = 8, **how: object) -> Run:
    device = Device(build.ptx(80), seed, Limits(sms=sms))
    got = run_on(case, device, regime="resident", choice="exchange=words", **how)  # type: ignore[arg-type]
    names = {name for name in device.launches if name.startswith("resident")}
    assert names <= {f"resident_{way}_fma_{case.dtype}" for way in ("forward", "backward")}
    return got


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_words_give_the_same_bits_as_values(cell: str, dtype: str) -> None:
    cases = [*some_cases(cell, dtype), DeviceCase(cell, 6, 3, 30, 30, 2, True, (6, 4, 4, 1), dtype)]
    for case in cases:
        got = run_words(case)
        assert_right(got, case)
        device = Device(build.ptx(80), 2, Limits(sms=8))
        values = run_on(case, device, regime="resident", choice="cores=fma")
        assert all((got.results[name] == value).all() for name, value in values.results.items())
        plain = run_words(case, seed=3, keep=False)
        assert all((got.results[name] == value).all() for name, value in plain.results.items())


@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_the_order_of_threads_changes_no_bit(cell: str) -> None:
    case = DeviceCase(cell, 4, 3, 18, 18, 2, True, (4, 4, 3, 3, 1, 1, 1, 1))
    runs = [run_words(case, seed).results for seed in range(12)]
    for other in runs[1:]:
        assert all((other[name] == value).all() for name, value in runs[0].items())


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_numbers_go_on_from_launch_to_launch(cell: str) -> None:
    case = DeviceCase(cell, 3, 3, 6, 6, 2, True, (3, 3, 3, 2, 2, 1, 1))
    step = 2 * 3 * CELLS[cell].gates * 6 * 4
    for steps in (1, 2, 3, 6):
        got = run_words(case, seed=steps, gates_bytes=steps * step)
        assert got.device.launches.count("resident_forward_fma_f32") == -(-7 // steps)
        assert_right(got, case)


def test_sequences_that_enter_after_the_first_positions() -> None:
    """In the reverse direction, blocks of later sequences begin with positions without any."""
    case = DeviceCase("gru", 20, 2, 12, 12, 2, True, (20, 17, 9, 9, 3, 1, 1))
    got = run_on(
        case,
        Device(build.ptx(80), limits=Limits(sms=16)),
        regime="resident",
        choice="exchange=words,rows=5",
        gates_bytes=3 * 20 * 3 * 12 * 4 * 2,
    )
    assert_right(got, case)


def test_a_word_that_never_comes_ends_in_an_error() -> None:
    case = DeviceCase("lstm", 3, 3, 40, 40, 1, True, (3, 3))
    with pytest.raises(Fault, match=r"assert.*others that do not arrive.*in resident_forward_fma"):
        run_words(case, spin_limit=1)


@pytest.mark.parametrize(
    ("case", "choice", "regime"),
    [
        (DeviceCase("lstm", 9, 3, 8, 8, 1, True, (9,), "bf16"), "exchange=words,cores=mma", ""),
        (DeviceCase("lstm", 3, 3, 8, 8, 1, True, (3,), "f64"), "exchange=words", ""),
        (DeviceCase("lstm_proj", 3, 3, 8, 4, 1, True, (3,)), "exchange=words", ""),
        (DeviceCase("lstm", 3, 3, 8, 8, 1, True, (3,)), "exchange=words", "streamed"),
    ],
)
def test_where_there_are_no_words(case: DeviceCase, choice: str, regime: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"a plan of the forward pass was asked for, but .* does not fit, no choice f",
    ):
        run_on(case, Device(build.ptx(80)), regime=regime, choice=choice)

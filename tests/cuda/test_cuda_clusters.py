"""The resident regime with blocks in clusters, which share the source of a product."""

from __future__ import annotations

import pytest

import setup_build
from fusedrnn._library import CELLS
from tests.kit import build
from tests.kit.device import Device, Limits
from tests.kit.device_cases import EPS_OF_TF32, DeviceCase, Run, assert_right, run_on, some_cases
from tests.ptxvm import Fault

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

RESIDENT_CELLS = [cell for cell, spec in CELLS.items() if not spec.projects]
CHOICES = ["cluster=2", "cluster=4,arrive=clusters", "cluster=8,arrive=blocks"]


def limits(sms: int) -> Limits:
    return Limits(capability=90, sms=sms, cluster_blocks=(sms, sms, sms))


def run_clusters(case: DeviceCase, choice: str, seed: int = 1, sms: int = 16, **how: object) -> Run:
    device = Device(build.ptx_with_clusters(), seed, limits(sms))
    return run_on(case, device, regime="resident", choice=choice, **how)  # type: ignore[arg-type]


def kernels(cores: str) -> set[str]:
    return {f"clustered_{way}_{cores}" for way in ("forward", "backward")}


def loops(run: Run) -> set[str]:
    """The kernels with a time loop that ran."""
    return {name for name in run.device.launches if "ward_" in name}


def assert_same(a: Run, b: Run) -> None:
    assert all((b.results[name] == value).all() for name, value in a.results.items())


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_clusters(cell: str, dtype: str) -> None:
    """Among the sizes are some with blocks that have no units."""
    for case in some_cases(cell, dtype):
        for choice in CHOICES:
            got = run_clusters(case, choice)
            assert loops(got) == kernels(f"fma_{dtype}")
            assert_right(got, case)
            assert_same(run_clusters(case, choice, seed=2, keep=False), got)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_clusters_on_tensor_cores(cell: str, dtype: str) -> None:
    tf32 = dtype == "f32"
    for D, N, H, sizes, bias in [
        (1, 8, 16, (8, 8), True),
        (2, 19, 21, (19, 11, 3), True),
        (1, 9, 70, (9,), False),
    ]:
        case = DeviceCase(cell, N, 3, H, H, D, bias, sizes, dtype)
        for choice in CHOICES[: 2 if H == 70 else 3]:
            got = run_clusters(case, f"cores=mma,{choice}", sms=64, allow_tf32=tf32)
            assert loops(got) == kernels("mma_tf32" if tf32 else f"mma_{dtype}")
            assert_right(got, case, EPS_OF_TF32 if tf32 else None)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_the_order_of_threads_changes_no_bit(cell: str, choice: str) -> None:
    case = DeviceCase(cell, 10, 3, 18, 18, 1, True, (10, 10, 4, 3, 1, 1), "bf16")
    first = run_clusters(case, choice, 0)
    for seed in range(1, 6):
        assert_same(first, run_clusters(case, choice, seed))


def test_how_clusters_arrive_changes_no_bit() -> None:
    case = DeviceCase("gru", 5, 3, 33, 33, 2, True, (5, 4, 2))
    assert_same(run_clusters(case, CHOICES[1]), run_clusters(case, "cluster=4"))


@pytest.mark.parametrize("cores", ["fma", "mma"])
def test_several_blocks_of_sequences(cores: str) -> None:
    """Their clusters do not wait for each other. Later ones begin without sequences."""
    case = DeviceCase("lstm", 24, 3, 20, 20, 1, True, (24, 20, 9, 7, 2), "f16")
    for arrive in ("blocks", "clusters"):
        choice = f"cluster=2,cores={cores},rows=8,arrive={arrive}"
        got = run_clusters(case, choice, gates_bytes=3 * 24 * 4 * 20 * 4)
        assert got.device.launches.count(f"clustered_forward_{cores}_f16") == 2
        assert_right(got, case)


@pytest.mark.parametrize("cell", ["gru", "gru_reset_before"])
def test_sequences_that_enter_after_the_first_positions(cell: str) -> None:
    """In the reverse direction, blocks of later sequences begin with positions without any."""
    case = DeviceCase(cell, 24, 3, 20, 20, 2, True, (24, 7, 7, 2))
    for arrive in ("blocks", "clusters"):
        assert_right(run_clusters(case, f"cluster=2,rows=8,arrive={arrive}", sms=32), case)


@pytest.mark.parametrize("choice", ["cluster=2", "cluster=2,arrive=clusters"])
def test_a_limit_of_one_look_ends_in_an_error(choice: str) -> None:
    case = DeviceCase("lstm", 3, 3, 40, 40, 1, True, (3, 3))
    with pytest.raises(Fault, match=r"assert.*others that do not arrive.*in clustered_forward_fma"):
        run_clusters(case, choice, spin_limit=1)


@pytest.mark.parametrize(
    ("case", "choice", "regime", "why"),
    [
        (
            DeviceCase("lstm", 3, 3, 8, 8, 1, True, (3,), "f64"),
            *("cluster=2", "", "float64 has no kernels with clusters"),
        ),
        (
            DeviceCase("lstm_proj", 3, 3, 8, 4, 1, True, (3,)),
            *("cluster=2", "", "a projection has no kernels with clusters"),
        ),
        (
            DeviceCase("lstm", 3, 3, 8, 8, 1, True, (3,)),
            *("cluster=2", "streamed", "streamed layers have no clusters"),
        ),
        (
            DeviceCase("lstm", 3, 3, 8, 8, 1, True, (3,)),
            *("exchange=words,cluster=2", "", "words have no clusters"),
        ),
    ],
)
def test_where_there_are_no_clusters(case: DeviceCase, choice: str, regime: str, why: str) -> None:
    device = Device(build.ptx_with_clusters(), limits=limits(16))
    said = f"a plan of the forward pass was asked for, but {why}"
    with pytest.raises(ValueError, match=said):
        run_on(case, device, regime=regime, choice=choice)


def test_a_device_without_clusters_has_no_plan_with_them() -> None:
    case = DeviceCase("lstm", 3, 3, 8, 8, 1, True, (3,))
    with pytest.raises(ValueError, match="but this device has no clusters"):
        run_on(case, Device(build.ptx(80)), regime="", choice="cluster=4")

"""tools.gpu: the parts that only run on a GPU, here with stand-ins for it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedrnn import _raw_ops
from fusedrnn import _selftest_cases as cases
from fusedrnn._errors import REGIME_TAG
from fusedrnn._selftest_report import Check
from fusedrnn.selftest import Selftest
from tests.gpu import fake_cuda
from tools.gpu import bench, checks, limits, load
from tools.gpu.regimes import choice_of, others
from tools.gpu.rows import timed_rows
from tools.gpu.tasks import REGIMES, SPIN_LIMIT

CPU = torch.device("cpu")


# --- Times ---------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUND_US", 100.0)
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "ALONE", 2)


class CudaClock(bench.Clock):
    """A clock that measures with torch.cuda's events, which a test replaces by stand-ins."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.cuda = True


RATES = {"f32": 1e12, "f64": 1e12, "bf16": 1e13, "copy": 1e12, "launch": 2e-6}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_rows_are_timed_by_events_and_as_graphs(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    fake_cuda.use(monkeypatch)
    monkeypatch.setattr(bench, "Clock", CudaClock)
    (timed,) = timed_rows("60,12,96,200 f32")
    found = bench.measure(timed, mode, CPU, "H100", RATES)
    assert found["status"] == "ok"
    assert found["plan"][0] == "resident, FMA: 100 x 1 x 1"
    assert set(found["times"]) == {"ours", "torch"}
    assert set(found["times"]["ours"]) == {"call", "spread", "alone", "graph", "graph_spread"}
    assert found["chosen"] == "resident"
    both = {"forward": "resident", "backward": "resident"}
    assert found["by_pass"] == (both if mode == "training" else {"forward": "resident"})
    assert set(found["regimes"]) == {"resident", "streamed", "per_step"}
    for of in found["regimes"].values():
        assert of["step"] == of["call"] / 60
        assert of["of_floor"] == found["floor"] / of["call"]
    assert found["regimes"]["resident"]["call"] == found["times"]["ours"]["call"]
    assert found["fastest"] in found["regimes"]
    text = bench.as_text({"name": "a", "mode": mode, **found})
    assert "| graph x" in text and "streamed " in text and "per step " in text


@pytest.mark.parametrize("name", ["proj 512 f32", "150,8,256,256 f64"])
def test_only_regimes_that_can_run_a_row_are_timed(name: str) -> None:
    (timed,) = timed_rows(name)
    assert others(timed, "training", "H100", "") == ["per_step", "streamed"]
    assert others(timed, "training", "H100", "streamed") == ["per_step"]


@pytest.mark.usefixtures("short")
def test_a_regime_without_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch)
    monkeypatch.setattr(bench, "Clock", CudaClock)
    right = _raw_ops._forward_now

    def forward(*arguments: Any) -> Any:
        if os.environ.get("FUSEDRNN_CUDA_REGIME") == "per_step":
            time.sleep(0.12)
        return right(*arguments)

    monkeypatch.setattr(_raw_ops, "_forward_now", forward)
    monkeypatch.setattr(bench, "OTHERS_US", 240_000)
    (timed,) = timed_rows("60,12,96,200 f32")
    found = bench.measure(timed, "forward", CPU, "H100", RATES)
    assert "call" in found["regimes"]["streamed"]
    assert re.fullmatch(r"a call takes \d+ ms", found["regimes"]["per_step"]["left_out"])
    assert found["fastest"] != "per_step"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("refuses", [True, False])
def test_a_regime_that_raises(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    """A refusal, which the plan of a similar card did not predict, is no failure."""
    fake_cuda.use(monkeypatch)
    monkeypatch.setattr(bench, "Clock", CudaClock)
    right = _raw_ops._forward_now

    def forward(*arguments: Any) -> Any:
        if os.environ.get("FUSEDRNN_CUDA_REGIME") == "streamed":
            raise RuntimeError(f"fusedrnn: no room{REGIME_TAG if refuses else ''}")
        return right(*arguments)

    monkeypatch.setattr(_raw_ops, "_forward_now", forward)
    (timed,) = timed_rows("60,12,96,200 f32")
    if refuses:
        found = bench.measure(timed, "forward", CPU, "H100", RATES)
        assert found["regimes"]["streamed"] == {"left_out": "fusedrnn: no room"}
        assert "call" in found["regimes"]["per_step"]
    else:
        with pytest.raises(RuntimeError, match="no room"):
            bench.measure(timed, "forward", CPU, "H100", RATES)


@pytest.mark.usefixtures("short")
def test_a_regime_with_wrong_results_makes_the_row_red(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch)
    monkeypatch.setattr(bench, "Clock", CudaClock)
    right = _raw_ops._forward_now

    def forward(*arguments: Any) -> Any:
        y, *rest = right(*arguments)
        if os.environ.get("FUSEDRNN_CUDA_REGIME") == "streamed":
            y = y + 1
        return y, *rest

    monkeypatch.setattr(_raw_ops, "_forward_now", forward)
    (timed,) = timed_rows("60,12,96,200 f32")
    found = bench.measure(timed, "forward", CPU, "H100", RATES)
    assert found["status"] == "red"
    assert found["why"].startswith("streamed: y is off by ")
    assert "times" not in found


def test_a_run_in_one_regime_times_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    (timed,) = timed_rows("60,12,96,200 f32")
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", "per_step")
    choice = choice_of(timed, "training", "H100")
    assert choice.regime == "per_step"
    assert choice.words == ["per step"] * 2
    assert others(timed, "training", "H100", choice.regime) == []


@pytest.mark.usefixtures("short")
def test_a_call_that_cannot_be_captured_has_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch)
    right, captured = CudaClock.graph, []

    def graph(self: bench.Clock, call: Any) -> Any:
        captured.append(call)
        if len(captured) == 2:  # the second call is torch.nn's
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        return right(self, call)

    monkeypatch.setattr(CudaClock, "graph", graph)
    monkeypatch.setattr(bench, "Clock", CudaClock)
    (timed,) = timed_rows("60,12,96,200 f32")
    times = bench.measure(timed, "forward", CPU, "H100", RATES)["times"]
    assert times["torch"]["no_graph"] == "operation not permitted when stream is capturing"
    assert "graph" in times["ours"]
    assert "graph" not in times["torch"]


def test_the_regime_is_set_during_each_call_only() -> None:
    seen: list[str | None] = []
    call = bench.in_regime(lambda: seen.append(os.environ.get("FUSEDRNN_CUDA_REGIME")), "per_step")
    call()
    assert seen == ["per_step"]
    assert "FUSEDRNN_CUDA_REGIME" not in os.environ


# --- Checks --------------------------------------------------------------------------------------


def only(test: Selftest) -> Check:
    (found,) = test.report.checks
    return found


def test_a_cold_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch)
    test = Selftest(CPU)
    checks.do("cold_capture", test, {})
    assert only(test).result == "passed", only(test).detail


def test_a_capture_that_fails_leaves_no_stream_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch)
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_stream", chosen.append)
    with (
        pytest.raises(RuntimeError, match="not permitted"),
        cases.capturing(fake_cuda.Graph(), CPU),
    ):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert chosen == [torch.cuda.current_stream()]


def test_a_replay_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch)
    right = cases.Call.results
    calls = []

    def moving(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        found = right(self, *arguments, **named)
        return found | {"output 0": found["output 0"] + len(calls)}

    monkeypatch.setattr(cases.Call, "results", moving)
    test = Selftest(CPU)
    checks.do("cold_capture", test, {})
    assert only(test).detail == "the replay differs"


def test_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch)
    monkeypatch.setattr(load, "Shape", lambda T, N, I, H: cases.Shape(3, 2, 4, 6))
    test = Selftest(CPU)
    checks.do("two_streams", test, {"regime": "resident"})
    assert only(test).result == "passed"
    assert only(test).detail == "0 of 40 differ"


def test_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    test = Selftest(CPU)
    checks.do("allocator", test, {"name": "cudaMallocAsync"})
    assert {c.result for c in test.report.checks} == {"passed"}
    assert len(test.report.checks) == 2 * len(REGIMES)


NAMED = b"barrier.cuh:1: %s_%s_fma_f32: block: [0,0,0], thread: [0,0,0] Assertion failed\n"


@pytest.mark.parametrize("regime", ["resident", "streamed"])
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize(
    ("raises", "names", "detail"),
    [
        (True, True, "CUDA error: device-side assert triggered | barrier.cuh:1: "),
        (True, False, "nothing names "),
        (False, True, "no barrier gave up with FUSEDRNN_CUDA_SPIN_LIMIT=1"),
    ],
)
def test_the_watchdog_must_raise_and_name_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    regime: str,
    raises: bool,
    names: bool,
    detail: str,
) -> None:
    """The spin limit is set during the pass that is checked, and not during earlier ones."""
    op = f"_{which}_now"
    right, limits_seen = getattr(_raw_ops, op), []

    def launch(*arguments: Any) -> Any:
        limits_seen.append(os.environ.get(SPIN_LIMIT))
        return right(*arguments)

    def synchronize(device: Any = None) -> None:
        if not limits_seen:
            return
        if names:
            os.write(2, NAMED % (regime.encode(), which.encode()))
        if raises:
            raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(_raw_ops, op, launch)
    monkeypatch.setenv(SPIN_LIMIT, "1")
    fake_cuda.use(monkeypatch, synchronize)
    test = Selftest(CPU)
    checks.do("watchdog", test, {"which": which, "regime": regime})
    assert limits_seen == ["1"]
    assert only(test).result == ("passed" if raises and names else "failed")
    found = only(test).detail
    named = f"{regime}_{which}_" if detail.endswith(" ") else ""
    assert found.startswith(f"{detail}{named}"), found


def facts(registers: int = 198, local: int = 0, **device: str) -> str:
    believed = torch.ops.fusedrnn._plan_device("H100")
    kernel = f"registers {registers} shared 0 local {local} constant 264 max_threads 256"
    changed = "".join(
        f"{line.split()[0]} {device.get(line.split()[0], line.split()[1])}\n"
        for line in believed.splitlines()
    )
    return f"name NVIDIA H100 80GB HBM3\n{changed}kernel resident_forward_fma_f32 {kernel}\n"


def look_at_limits(
    monkeypatch: pytest.MonkeyPatch, said: str, occupancy: Callable[[str, int, int], int]
) -> list[Check]:
    fusedrnn = torch.ops.fusedrnn
    monkeypatch.setattr(fusedrnn, "_device_facts", lambda index: said)
    monkeypatch.setattr(fusedrnn, "_occupancy", occupancy)
    test = Selftest(CPU)
    checks.do("limits", test, {})
    return test.report.with_result("failed")


def as_planned(kernel: str, shared: int, index: int) -> int:
    return int(torch.ops.fusedrnn._plan_blocks_per_sm("H100", 198, shared))


def test_a_card_as_the_plan_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_at_limits(monkeypatch, facts(), as_planned) == []


def test_limits_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (wrong,) = look_at_limits(monkeypatch, facts(sms="114"), as_planned)
    assert wrong.detail == "sms: the plan has 132, the driver says 114"


def test_blocks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = look_at_limits(monkeypatch, facts(), lambda *_: 7)
    assert len(wrong) == 4
    assert wrong[0].name == "blocks of resident_forward_fma_f32 with 0 bytes"
    assert wrong[0].detail == "the plan has 1, the driver says 7"


def test_spills_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (wrong,) = look_at_limits(monkeypatch, facts(local=16), as_planned)
    assert wrong.detail.startswith("it spills: registers 198, ")


@pytest.mark.parametrize(
    ("seen", "result", "detail"),
    [
        (["void at::mm()", "add_f32(AddArgs)", "pack_rows_b16(PackArgs)"], "passed", "2 of 2"),
        (["add_f32(fusedrnn::cuda::AddArgs<float>)"], "failed", "1 of 2; not: pack_rows_b16"),
        ([], "not run", "torch's profiler saw nothing of the GPU"),
    ],
)
def test_kernels_that_never_ran_are_named(
    monkeypatch: pytest.MonkeyPatch, seen: list[str], result: str, detail: str
) -> None:
    class Profile:
        def __init__(self, activities: Any) -> None:
            pass

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def key_averages(self) -> list[Any]:
            return [type("Event", (), {"key": name}) for name in seen]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    kernels: dict[str, dict[str, int]] = {"add_f32": {}, "pack_rows_b16": {}}
    monkeypatch.setattr(limits, "driver_facts", lambda device: limits.DriverFacts({}, kernels))
    test = Selftest(CPU)
    checks.do("kernels", test, {})
    assert (only(test).result, only(test).detail) == (result, detail)

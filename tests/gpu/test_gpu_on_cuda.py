"""tools.gpu: the parts that only run on a GPU, here with stand-ins for it."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedrnn import _raw_ops
from fusedrnn import _selftest_cases as cases
from fusedrnn._selftest_report import Check
from fusedrnn.selftest import Selftest
from tests.gpu import fake_cuda
from tools.gpu import bench, checks, limits, load, one, steps
from tools.gpu.process import Outcome, Stream
from tools.gpu.rows import timed_rows
from tools.gpu.run import Clock, Run, Step
from tools.gpu.tasks import SPIN_LIMIT

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


RATES = {"f32": 1e12, "bf16": 1e13, "tf32": 1e12, "f16": 1e12, "copy": 1e12, "launch": 2e-6}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_rows_are_timed_by_events_and_as_graphs(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    fake_cuda.use(monkeypatch)
    monkeypatch.setattr(bench, "Clock", CudaClock)
    (timed,) = timed_rows("60,12,96,200 f32")
    found = bench.measure(timed, mode, CPU, "H100", RATES)
    assert found["status"] == "ok"
    assert found["plan"][0] == "resident, FMA: 100 x 1 x 1"
    assert set(found["times"]) == {"ours", "torch", "per_step"}
    assert set(found["times"]["ours"]) == {"call", "spread", "alone", "graph", "graph_spread"}
    assert "graph" not in found["times"]["per_step"]
    assert "| graph x" in bench.as_text({"name": "a", "mode": mode, **found})


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
    assert len(test.report.checks) == 4


NAMED = b"resident.cuh:1: resident_%s_fma_f32: block: [0,0,0], thread: [0,0,0] Assertion failed\n"


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize(
    ("raises", "names", "detail"),
    [
        (True, True, "CUDA error: device-side assert triggered | resident.cuh:1: resident_"),
        (True, False, "nothing names resident_"),
        (False, True, "no barrier gave up with FUSEDRNN_CUDA_SPIN_LIMIT=1"),
    ],
)
def test_the_watchdog_must_raise_and_name_the_kernel(
    monkeypatch: pytest.MonkeyPatch, which: str, raises: bool, names: bool, detail: str
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
            os.write(2, NAMED % which.encode())
        if raises:
            raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(_raw_ops, op, launch)
    monkeypatch.setenv(SPIN_LIMIT, "1")
    fake_cuda.use(monkeypatch, synchronize)
    test = Selftest(CPU)
    checks.do("watchdog", test, {"which": which})
    assert limits_seen == ["1"]
    assert only(test).result == ("passed" if raises and names else "failed")
    assert only(test).detail.startswith(detail), only(test).detail


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


# --- The order of steps and their seconds --------------------------------------------------------


class Script(Run):
    """A run that starts no process: `takes` says how many seconds each step takes.

    A key of `takes` is the beginning of a step's name.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        takes: dict[str, float],
        codes: dict[str, int] | None = None,
    ) -> None:
        super().__init__(folder, seconds, {})
        self.now = 0.0
        self.clock = Clock(seconds, lambda: self.now)
        self.takes = takes
        self.codes = codes or {}
        self.commands: dict[str, tuple[float, str, dict[str, str]]] = {}

    def has_tool(self, step: str, program: str) -> bool:
        return True

    def step(  # type: ignore[override]
        self,
        name: str,
        limit: float,
        command: Any,
        keep: float = 0.0,
        lines: int = 12,
        env: Any = None,
        **_: Any,
    ) -> Outcome | None:
        seconds = self.clock.grant(limit, keep)
        if not seconds:
            self.not_run(name, "no time")
            return None
        # A step that `takes` does not name uses up all the seconds that it was granted.
        takes = [t for start, t in self.takes.items() if name.startswith(start)]
        self.now += min([seconds, *takes])
        self.commands[name] = (seconds, " ".join(command), dict(env or {}))
        code = self.codes.get(name, 0)
        out = Stream()
        for line in ("a library's word", "{", '"gpu": {"capability": "9.0"}', "}"):
            out.add(line)
        why = f"exit {code}" if code else ""
        self.steps.append(Step(name, "failed" if code else "ok", why, 1.0, seconds, []))
        return Outcome(code, why, 1.0, out, Stream())


def everything(run: Script, tasks: str = "", rows: str = "") -> list[str]:
    steps.Everything(run, "cuda", quick=False, tasks=tasks, rows=rows).do()
    return list(run.commands)


USUAL = {
    "facts": 8,
    "import": 10,
    "first calls": 8,
    "smallest": 25,
    "all layers": 140,
    "times": 110,
    "profile": 12,
}


def test_a_usual_run(tmp_path: Path) -> None:
    run = Script(tmp_path, 400, USUAL | {"ncu": 15, "sanitizer": 15, "pytest": 20})
    names = everything(run)
    assert names[:6] == [
        *("facts", "import", "first calls", "smallest layers", "all layers"),
        "times beside torch.nn",
    ]
    assert "smallest layers, each launch waited for" not in names
    assert any(name.startswith("ncu") for name in names)
    assert run.now <= 400


def test_times_are_measured_even_if_every_step_uses_up_its_seconds(tmp_path: Path) -> None:
    run = Script(tmp_path, 400, {"facts": 60, "import": 60, "first calls": 8})
    names = everything(run)
    assert run.commands["times beside torch.nn"][0] >= 110
    assert any(name.startswith("profile") for name in names)
    assert run.now <= 400
    # The programs that watch the time are told to stop some seconds before they would be killed.
    for name, word in (("smallest layers", 4), ("all layers", 4), ("times beside torch.nn", 8)):
        seconds, command, _ = run.commands[name]
        assert f"--seconds {seconds - word:.0f}" in command


def test_a_short_run_checks_first(tmp_path: Path) -> None:
    run = Script(tmp_path, 200, {"facts": 8, "import": 10, "first calls": 8})
    names = everything(run)
    assert "smallest layers" in names
    assert run.now <= 200


def test_wrong_numbers_lead_to_a_run_that_waits_for_each_launch(tmp_path: Path) -> None:
    run = Script(tmp_path, 400, USUAL)
    right = run.step

    def step(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "all layers":
            line = '{"task": "parity", "section": "parity", "name": "x", "result": "failed"}\n'
            (tmp_path / "checks.jsonl").write_text(line)
        return right(name, *arguments, **named)

    run.step = step  # type: ignore[method-assign]
    names = everything(run)
    closer = names.index("smallest layers, each launch waited for")
    assert names[closer + 1].startswith("sanitizer memcheck bf16")
    assert names.index("all layers") < closer < names.index("times beside torch.nn")
    logged = {"CUDA_LAUNCH_BLOCKING": "1", "FUSEDRNN_LOG": "1"}
    assert run.commands[names[closer]][2].items() >= logged.items()
    # The times are measured nevertheless.
    assert run.commands["times beside torch.nn"][0] >= 60


def test_some_times_are_measured_even_if_the_closer_look_uses_up_its_seconds(
    tmp_path: Path,
) -> None:
    run = Script(tmp_path, 400, {"facts": 8, "import": 10, "first calls": 8})
    line = '{"task": "stress", "section": "stress", "name": "x", "result": "failed"}\n'
    (tmp_path / "checks.jsonl").write_text(line)
    everything(run)
    assert run.commands["times beside torch.nn"][0] >= 60
    assert run.now <= 400


def test_a_first_call_that_fails_does_not_stop_the_run(tmp_path: Path) -> None:
    names = everything(Script(tmp_path, 400, USUAL, {"first calls": 1}))
    assert "build" not in names
    assert "all layers" in names


def test_a_row_that_ends_the_process_is_skipped_by_the_next_one(tmp_path: Path) -> None:
    takes = USUAL | {"times": 20}
    first, second, third = steps.BENCHES
    run = Script(tmp_path / "a", 400, takes, {first: 4, second: -9, third: 4})
    begin = '{"kind": "begin", "name": "x", "mode": "forward"}\n'
    (tmp_path / "a" / "bench.jsonl").write_text(begin * 3)
    names = everything(run)
    assert [name for name in names if name.startswith("times")] == [first, second, third]
    assert " --skip 3 " in run.commands[second][1]
    assert run.commands[third][2] == {"FUSEDRNN_CUDA_REGIME": "per_step"}
    # The benchmark is not started again after a wrong row, a wrong argument or the end of its time.
    for code in (0, 1, 2, 3):
        run = Script(tmp_path / str(code), 400, takes, {first: code})
        assert sum(name.startswith("times") for name in everything(run)) == 1


def test_a_tool_that_does_not_support_the_gpu_is_not_tried_again(tmp_path: Path) -> None:
    run = Script(tmp_path, 900, USUAL)
    right = run.step

    def step(name: str, *arguments: Any, cannot: Any = (), **named: Any) -> Any:
        done = right(name, *arguments, **named)
        if cannot:
            assert "Device not supported" in cannot
            run.steps[-1].result, run.steps[-1].why = "not run", "exit 1"
        return done

    run.step = step  # type: ignore[method-assign]
    names = everything(run)
    assert sum(name.startswith("ncu") for name in names) == 1
    assert sum(name.startswith("sanitizer") for name in names) == 1
    said = {s.name: s.why for s in run.steps if s.result == "not run"}
    why = "compute-sanitizer does not work on this machine"
    assert said["sanitizer initcheck bf16 4,9,6,17"] == why


def test_kernels_count_once_in_a_profile() -> None:
    """The time of an op's event is that of its kernels, which have events as well."""

    def event(key: str, device: Any, annotation: bool = False) -> Any:
        return types.SimpleNamespace(key=key, device_type=device, is_user_annotation=annotation)

    host, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    kernel, op = event("resident_forward", cuda), event("aten::mm", host)
    events = [kernel, op, event("mark", cuda, True), event("cudaDeviceSynchronize", host)]
    assert one.events_of(events, "device") == [kernel]
    assert one.events_of(events, "host") == [op]


def test_a_library_that_does_not_load_is_built(tmp_path: Path) -> None:
    codes = {"import": 1, "import, as built here": 1}
    run = Script(tmp_path, 400, {"facts": 8, "import": 5, "build": 100}, codes)
    assert everything(run) == ["facts", "import", "build", "import, as built here"]
    assert run.commands["build"][2] == {"FUSEDRNN_CUDA": "1", "FUSEDRNN_CUDA_ARCH": "90"}


def test_parts_can_be_run_again(tmp_path: Path) -> None:
    run = Script(tmp_path / "a", 300, USUAL)
    run.only = ["checks"]
    assert everything(run, tasks="parity,stress") == ["facts", "import", "first calls", "checks"]
    assert "--tasks parity,stress" in run.commands["checks"][1]
    run = Script(tmp_path / "b", 300, USUAL)
    run.only = ["bench"]
    assert everything(run, rows="gru 1500") == [
        *("facts", "import", "first calls", "times beside torch.nn")
    ]
    assert "--rows gru 1500" in run.commands["times beside torch.nn"][1]

"""tools.gpu: the list of tasks, the restart of workers that fail, and the checks themselves."""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedrnn import _library
from fusedrnn import _selftest_cases as cases
from fusedrnn.selftest import Selftest
from tools.gpu import check, checks, limits, numbers, surroundings
from tools.gpu.check import Lost, Supervisor
from tools.gpu.tasks import (
    CELLS,
    GROUPS,
    NOT_RESIDENT,
    PLANTED,
    REGIMES,
    SPIN_LIMIT,
    Task,
    tasks_of,
)
from tools.plans import plan_of

CPU = torch.device("cpu")


# --- Tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cpu", "interpreter"])
def test_every_task_has_a_function_and_a_name_of_its_own(device: str) -> None:
    tasks = tasks_of([*GROUPS, *PLANTED], device, quick=False)
    assert len({task.label for task in tasks}) == len(tasks)
    assert {task.kind for task in tasks} <= set(checks.TASKS) | set(checks.SECTIONS)


def test_a_gpu_runs_all_tasks() -> None:
    tasks = tasks_of(GROUPS, "cuda", quick=False)
    assert {task.kind for task in tasks} == set(checks.TASKS) - set(PLANTED) | set(checks.SECTIONS)
    parity = [task.options for task in tasks if task.kind == "parity"]
    assert {options["cell"] for options in parity} == set(_library.CELLS)
    projected = {cell for cell, spec in _library.CELLS.items() if spec.projects}
    assert set(NOT_RESIDENT) == projected
    # Each cell in both sizes and every regime; a layer with a projection has no resident kernel.
    assert len(parity) == 2 * (len(REGIMES) * len(CELLS) - 1)
    asked = {task.kind: set[str]() for task in tasks if task.regime}
    for task in tasks:
        if task.regime:
            asked[task.kind].add(task.regime)
    of_loops = {"watchdog": {"resident", "streamed"}, "from_l2": {"streamed"}}
    of_loops["choice"] = {"resident"}
    assert all(asked[kind] == of_loops.get(kind, set(REGIMES)) for kind in asked), asked
    # The smallest layers come first and the large ones last.
    assert [task.kind for task in tasks[:3]] == ["limits", "products", "smoke"]
    large = [task for task in tasks if task.options.get("size") == "large"]
    assert large == tasks[-len(large) :]
    from_l2 = [n for n, task in enumerate(tasks, len(large)) if task.kind == "from_l2"]
    assert from_l2 == list(range(len(tasks) - len(from_l2), len(tasks)))
    assert len(large) * 2 == len(parity)
    assert "large" not in [t.options.get("size") for t in tasks_of(GROUPS, "cuda", quick=True)]


def test_tasks_that_need_their_own_process() -> None:
    own = {task.label: task for task in tasks_of(["surroundings"], "cuda", quick=True)}
    assert own["cold_capture"].fresh
    for regime in ("resident", "streamed"):
        assert own[f"watchdog backward {regime}"].env == {SPIN_LIMIT: "1"}
        assert own[f"watchdog backward {regime}"].loses_context
    assert own["allocator without caching"].env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert not tasks_of(["surroundings"], "cpu", quick=True)


def test_an_unknown_group_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    with pytest.raises(
        ValueError, match=r"tasks must be of limits, smoke, .*, large, .*, got 'smok'"
    ):
        tasks_of(["smok"], "cpu", quick=True)
    with pytest.raises(SystemExit):
        check.main(["--tasks", "smok", "--out", str(tmp_path / "checks.jsonl")])
    assert "--tasks must be of limits, smoke" in capsys.readouterr().err


# --- Supervisor ----------------------------------------------------------------------------------


class FakeWorker:
    """A worker that sends the events of a script.

    `script` holds a list for each kind of task. An item is an event, an exception to raise, or a
    function that returns an event.
    """

    script: dict[str, list[Any]]
    made: list[FakeWorker]

    def __init__(self, device: str, quick: bool, env: dict[str, str]) -> None:
        self.env = dict(env)
        self.done = 0
        self.closed = False
        self.words: list[Any] = [{"event": "ready"}]
        FakeWorker.made.append(self)

    def give(self, task: Task) -> None:
        self.words = list(FakeWorker.script[task.kind])

    def next_event(self, seconds: float) -> dict[str, Any]:
        word = self.words.pop(0)
        if isinstance(word, Exception):
            raise word
        if callable(word):
            word = word(seconds)
        assert isinstance(word, dict)
        return word

    def close(self) -> None:
        self.closed = True


def check_event(result: str, section: str = "parity") -> dict[str, Any]:
    return {
        "event": "check",
        "section": section,
        "name": "a case",
        "result": result,
        "detail": "what",
    }


END = {"event": "end", "lost": ""}
LOST = {"event": "end", "lost": "CUDA error"}


@pytest.fixture
def supervise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Supervisor, list[Any]]]:
    """A function that runs tasks with fake workers; it returns the supervisor and its lines."""

    def go(
        script: dict[str, list[Any]], tasks: list[Task], seconds: float = 100, restarts: int = 8
    ) -> tuple[Supervisor, list[Any]]:
        FakeWorker.script, FakeWorker.made = script, []
        monkeypatch.setattr(check, "Worker", FakeWorker)
        options = argparse.Namespace(
            device="cpu", quick=True, seconds=seconds, patience=30, start=90, restarts=restarts
        )
        out = io.StringIO()
        supervisor = Supervisor(options, out)
        supervisor.run(tasks)
        return supervisor, [json.loads(line) for line in out.getvalue().splitlines()]

    return go


def test_tasks_that_pass(supervise: Any) -> None:
    supervisor, lines = supervise({"a": [check_event("passed"), END]}, [Task("a"), Task("a")])
    assert supervisor.tally.status() == 0
    assert len(FakeWorker.made) == 1
    assert [line.get("ended") for line in lines] == [None, "ok", None, "ok"]
    assert lines[0]["task"] == "a"
    assert "event" not in lines[0]


def test_a_failure_is_reported_and_the_next_task_runs(supervise: Any, capsys: Any) -> None:
    script = {"a": [*[check_event("failed")] * 5, END], "b": [check_event("passed"), END]}
    supervisor, lines = supervise(script, [Task("a"), Task("b")])
    assert supervisor.tally.status() == 1
    assert supervisor.tally.wrong == ["a"]
    assert sum(line.get("result") == "failed" for line in lines) == 5
    said = capsys.readouterr().out
    assert said.count("FAILED parity: a case: what") == check.SHOWN
    assert "a: 5 failed, " in said


@pytest.mark.parametrize(
    "words",
    [[Lost("hung: 30 s without a word")], [check_event("passed"), Lost("died of SIGSEGV")], [LOST]],
    ids=["hung", "died", "context"],
)
def test_a_task_that_loses_its_worker_does_not_stop_the_others(
    supervise: Any, words: list[Any]
) -> None:
    script = {"a": words, "b": [check_event("passed"), END]}
    supervisor, lines = supervise(script, [Task("b"), Task("a"), Task("b")])
    assert supervisor.tally.wrong == ["a"]
    assert supervisor.tally.restarts == 1
    assert len(FakeWorker.made) == 2
    assert FakeWorker.made[0].closed
    ended = [line["ended"] for line in lines if "ended" in line]
    assert ended[0] == ended[2] == "ok"
    assert ended[1] != "ok"


def test_a_context_that_is_lost_as_expected_is_no_failure(supervise: Any) -> None:
    script = {"a": [check_event("passed"), LOST], "b": [check_event("passed"), END]}
    supervisor, _ = supervise(script, [Task("a", loses_context=True), Task("b")])
    assert supervisor.tally.status() == 0
    assert len(FakeWorker.made) == 2


def test_a_cell_that_lost_two_workers_in_a_regime_is_skipped_there(supervise: Any) -> None:
    def task(size: str, cell: str) -> Task:
        return Task("parity", {"cell": cell, "size": size, "regime": "resident"})

    script = {"parity": [Lost("hung")]}
    tasks = [task(size, "lstm") for size in ("1", "2", "3")] + [task("1", "gru")]
    _, lines = supervise(script, tasks)
    ended = {line["task"]: line["ended"] for line in lines}
    assert ended["parity lstm 3 resident"].startswith("left alone")
    assert ended["parity gru 1 resident"] == "lost: hung"


@pytest.mark.parametrize("loss", [Lost("hung"), LOST], ids=["hung", "context"])
def test_a_regime_that_lost_three_workers_is_skipped_and_the_other_is_not(
    supervise: Any, loss: Any
) -> None:
    def tasks(regime: str) -> list[Task]:
        return [Task("a" if regime == "resident" else "b", {"regime": regime}) for _ in range(5)]

    script = {"a": [loss], "b": [check_event("passed"), END]}
    supervisor, lines = supervise(script, [*tasks("resident"), *tasks("per_step")])
    ended = [line["ended"] for line in lines if "ended" in line]
    assert [why.split(":")[0] for why in ended[3:]] == ["left alone"] * 2 + ["ok"] * 5
    assert "the resident regime took 3 workers" in ended[3]
    assert supervisor.tally.restarts == 3


def test_workers_are_restarted_a_limited_number_of_times(supervise: Any) -> None:
    supervisor, _ = supervise({"a": [Lost("died")]}, [Task("a")] * 9, restarts=3)
    assert supervisor.tally.restarts == 4
    assert supervisor.tally.unreached == ["a"] * 5


def test_a_task_with_another_environment_or_a_fresh_start_gets_a_new_worker(supervise: Any) -> None:
    tasks = [Task("a"), Task("a", env={"X": "1"}), Task("a", env={"X": "1"}), Task("a", fresh=True)]
    supervise({"a": [check_event("passed"), END]}, tasks)
    assert [worker.env for worker in FakeWorker.made] == [{}, {"X": "1"}, {}]


def test_a_task_in_which_time_runs_out_has_not_failed(supervise: Any) -> None:
    def slow(seconds: float) -> dict[str, Any]:
        assert seconds <= 0.3
        time.sleep(seconds + 0.02)
        raise Lost("hung")

    script = {"a": [check_event("passed"), END], "b": [slow]}
    supervisor, lines = supervise(script, [Task("a"), Task("b"), Task("a")], seconds=0.3)
    assert supervisor.tally.status() == check.UNFINISHED
    assert supervisor.tally.unreached == ["b", "a"]
    assert [line["ended"] for line in lines if "ended" in line] == ["ok"] + ["not reached"] * 2


def test_a_run_without_any_check_has_failed(supervise: Any) -> None:
    supervisor, _ = supervise({"a": [check_event("not run"), END]}, [Task("a")])
    assert supervisor.tally.status() == 1


# --- Checks --------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, key: str, by: float) -> None:
    """Makes the last value of one of our results wrong, by `by`."""
    right = cases.Call.results

    def wrong(self: Any, *arguments: Any, **named: Any) -> Any:
        found = right(self, *arguments, **named)
        if not named:
            found[key] = found[key].clone()
            found[key].view(-1)[-1] += by
        return found

    monkeypatch.setattr(cases.Call, "results", wrong)


@pytest.mark.parametrize(
    ("cell", "key", "place"),
    [
        ("lstm", "output 1", "h_n [1, 3, 7]: 1 wrong, in [0, 2, 6]..[0, 2, 6], 0 of them nan"),
        ("lstm", "gradient 4", "d_weight_hh [28, 7]: 1 wrong, in [27, 6]..[27, 6], 0 of them nan"),
        ("gru", "gradient 6", "d_bias_hh [21]: 1 wrong, in [20]..[20], 0 of them nan"),
    ],
)
def test_a_wrong_number_is_located(
    monkeypatch: pytest.MonkeyPatch, cell: str, key: str, place: str
) -> None:
    spoil(monkeypatch, key, 100.0)
    test = Selftest(CPU)
    numbers.compare(test, cases.Call(cell, numbers.SMOKE[1]), cases.FLOAT32, "")
    number, where = test.report.checks
    assert number.result == where.result == "failed"
    assert place in where.detail
    assert "resident, FMA" in where.detail  # the plan


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "lstm_proj"])
def test_weights_are_streamed_at_the_least_size(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    seen: list[cases.Shape] = []
    monkeypatch.setattr(numbers, "compare", lambda test, call, *_: seen.append(call.shape))
    test = Selftest(CPU)
    checks.do("from_l2", test, {"cell": cell, "regime": "streamed"})
    assert len(seen) == 3 and test.report.checks == []
    for shape, dtype in zip(seen, ("f32", "f64", "bf16"), strict=True):
        for H, wanted in ((shape.H, True), (shape.H - 128, False)):
            P = H // 2 if cell == "lstm_proj" else H
            sizes = [shape.T, shape.N, shape.I, H, P, 1]
            passes = [
                plan_of(cell, dtype, sizes, "H100", backward, regime="streamed")
                for backward in (False, True)
            ]
            assert all(plan.streamed_bytes for plan in passes) == wanted, H
    # A card on which no size streams weights.
    monkeypatch.setattr(limits, "WITHOUT_A_GPU", "T4")
    if cell == "lstm_proj":
        checks.do("from_l2", test, {"cell": cell, "regime": "streamed"})
        assert {c.detail for c in test.report.checks} == {"no H up to 3072 streams weights on T4"}
        assert {c.result for c in test.report.checks} == {"not run"}


def test_reverse_weights_have_names() -> None:
    call = cases.Call("lstm_proj", numbers.SMOKE[2])
    assert numbers._name_of(call, "gradient 7") == "d_weight_hr"
    assert numbers._name_of(call, "gradient 8") == "d_weight_ih_reverse"


@pytest.mark.parametrize("task", ["offsets", "deterministic_mode", "stress"])
def test_checks_that_need_no_gpu_pass_on_the_cpu(task: str) -> None:
    test = Selftest(CPU)
    checks.do(task, test, {"cell": "gru", "regime": ""})
    assert test.report.checks
    assert {c.result for c in test.report.checks} == {"passed"}


def test_offsets_move_every_tensor() -> None:
    t = torch.arange(6.0).view(2, 3).requires_grad_()
    moved = surroundings._moved(t, 3)
    assert moved.storage_offset() == 3
    assert torch.equal(moved, t)
    assert moved.is_leaf and moved.requires_grad


def test_results_that_vary_fail_the_stress_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.Call.results

    def moving(self: Any, *arguments: Any, **named: Any) -> Any:
        found = right(self, *arguments, **named)
        return found | {"output 0": found["output 0"] + torch.rand(())}

    monkeypatch.setattr(cases.Call, "results", moving)
    test = Selftest(CPU)
    checks.do("stress", test, {"cell": "lstm", "regime": ""})
    assert {c.result for c in test.report.checks} == {"failed"}
    assert test.report.checks[0].detail == "3 of 3 differ"


def test_the_check_of_two_devices_does_not_run_without_gpus() -> None:
    test = Selftest(CPU)
    checks.do("two_devices", test, {})
    (found,) = test.report.checks
    assert (found.result, found.detail) == ("not run", "there are 0 GPUs here")


def test_output_that_bypasses_python_is_captured(capfd: pytest.CaptureFixture[str]) -> None:
    with surroundings.said_by_process() as said:
        os.write(2, b"block [0,0,0] gave up\n")
        os.write(1, b"and more\n")
    assert said == ["block [0,0,0] gave up", "and more"]
    assert "block [0,0,0] gave up" in capfd.readouterr().err


# --- Limits that the driver reports --------------------------------------------------------------

FACTS = """name A card
sms 132
shared_per_block 232448
kernel resident_forward_fma_f32 registers 198 shared 0 local 0 constant 264 max_threads 256
"""


def test_limits_of_the_driver_are_parsed() -> None:
    facts = limits.parse(FACTS)
    assert facts.device == {"name": "A card", "sms": "132", "shared_per_block": "232448"}
    assert facts.kernels["resident_forward_fma_f32"]["registers"] == 198


def test_limits_that_differ_from_the_plan_are_named() -> None:
    believed = {"sms": "132", "shared_per_block": "166912", "registers_per_sm": "65536"}
    # Devices of a card differ in this one.
    believed |= {"blocks_in_clusters_of_4": "128"}
    assert limits.differences(believed, limits.parse(FACTS).device) == [
        "shared_per_block: the plan has 166912, the driver says 232448",
        "registers_per_sm: the plan has 65536, the driver says nothing",
    ]

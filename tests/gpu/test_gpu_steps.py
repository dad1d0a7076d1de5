"""tools.gpu: the order of a run's steps, the seconds that each gets, and what each runs."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.scripted_run import USUAL, Script, everything
from tools.gpu import one, steps
from tools.gpu.tasks import REGIMES
from tools.plans import plan_of


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
    for regime in steps.LOOPS:
        assert said[f"sanitizer initcheck bf16 4,9,6,17 {regime}"] == why


@pytest.mark.parametrize("card", ["H100", "H200"])
def test_layers_to_profile_and_to_count_have_every_regime(card: str) -> None:
    def regimes(precision: str, shape: str, regime: str = "") -> set[str]:
        T, N, I, H = map(int, shape.split(","))
        sizes = [T, N, I, H, H, 1]
        return {
            plan_of("lstm", precision, sizes, card, backward, regime=regime).regime
            for backward in (False, True)
        }

    profiled = [regimes(precision, shape) for _, precision, shape in steps.PROFILED]
    assert set.union(*profiled) == set(REGIMES)
    counted = [regimes(*layer) for layer in steps.COUNTED]
    assert counted == [{"resident"}, {"resident"}, {"streamed"}]


def test_tools_see_the_kernels_of_the_regime_that_runs(tmp_path: Path) -> None:
    run = Script(tmp_path, 2000, USUAL | {"ncu": 15, "sanitizer": 15, "pytest": 20})
    everything(run)
    for name, (_, command, env) in run.commands.items():
        regime = env.get("FUSEDRNN_CUDA_REGIME")
        if name.startswith("sanitizer"):
            assert name.endswith(f" {regime}")
            assert f"--kernel-regex kns={regime} " in command
        if name == "ncu bf16 30,32,2048,2048 streamed":
            assert regime == "streamed"
            assert "-k regex:resident|streamed " in command
    assert "ncu bf16 30,32,2048,2048 streamed" in run.commands


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

"""fusedrnn.selftest passes on the CPU, fails for wrong kernels, and writes a report."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import setup_build
from fusedrnn import _ops, _raw_ops, selftest
from fusedrnn._cards import CARDS
from fusedrnn._errors import REGIME_TAG
from fusedrnn._library import CELLS
from fusedrnn._selftest_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LARGE,
    REGIME,
    SMALL,
    TF32,
    Call,
)
from fusedrnn._selftest_report import Check
from tests.kit import emulated_kernels
from tests.kit.bindings import ptx
from tests.kit.layers import flat
from tests.kit.torch_device import TorchDevice, using

CPU = torch.device("cpu")
# The plan's names of the dtypes.
SHORT = {FLOAT32: "f32", FLOAT64: "f64", FLOAT16: "f16", BFLOAT16: "bf16", TF32: "f32"}


def test_it_passes_on_the_cpu_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "fusedrnn-selftest-cpu.json").read_text())
    assert len(report["checks"]) > 100
    not_run = [check for check in report["checks"] if check["result"] != "passed"]
    assert [check["name"] for check in not_run] == ["tf32"]
    assert report["regimes"] == []
    assert report["torch"] == torch.__version__
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in report["timings"])
    text = (tmp_path / "fusedrnn-selftest-cpu.md").read_text()
    assert f"{len(report['checks'])} checks, 0 failed, 1 not run" in text
    assert "| parity | 140 | 0 | 1 |" in text
    assert "instruction set chosen" in text
    said = capsys.readouterr().out
    assert "0 failed" in said
    assert "not run: parity: tf32: the CPU computes float32 products in float32" in said


def test_a_wrong_kernel_fails_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = _raw_ops._forward_now

    def wrong(*args: Any) -> Any:
        y, *rest = right(*args)
        y.view(-1)[0] += 0.5
        return y, *rest

    monkeypatch.setattr(_raw_ops, "_forward_now", wrong)
    arguments = ["--device", "cpu", "--quick", "--no-benchmark", "--out", str(tmp_path)]
    assert selftest.main(arguments) == 1
    assert "eps in output 0, allowed 200" in (tmp_path / "fusedrnn-selftest-cpu.md").read_text()
    assert "FAILED parity" in capsys.readouterr().out


def test_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("kernel lost")

    monkeypatch.setattr(_raw_ops, "_backward_now", broken)
    test = selftest.Selftest(CPU)
    test.determinism()
    assert {check.result for check in test.report.checks} == {"failed"}
    assert all("RuntimeError: kernel lost" in check.detail for check in test.report.checks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--device", "cuda"]) == 2
    assert "cannot run on cuda: torch" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_a_wrong_device_is_named(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        selftest.main(["--device", device])
    assert stopped.value.code == 2
    assert f"--device must be cpu, cuda or cuda:N, got '{device}'" in capsys.readouterr().err


def test_a_regime_is_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        selftest.main(["--device", "cpu", "--regime", "resident"])
    assert "--regime is for a GPU, and --device is cpu" in capsys.readouterr().err


# --- Limits: correct kernels pass, and wrong ones do not -----------------------------------------


def parity_of(monkeypatch: pytest.MonkeyPatch, cell: str, layer: Any) -> list[Check]:
    """The checks of a cell with all shapes, and TF32 too, if a device computes as `layer` does."""
    monkeypatch.setattr(_ops, "layer", layer)
    monkeypatch.setattr(selftest, "CELLS", {cell: CELLS[cell]})
    monkeypatch.setattr(selftest.Selftest, "why_no_tf32", lambda _: "")
    test = selftest.Selftest(CPU, quick=False)
    test.parity()
    return test.report.checks


@pytest.mark.parametrize("cell", CELLS)
def test_correct_kernels_pass(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    checks = parity_of(monkeypatch, cell, emulated_kernels.layer)
    assert len(checks) == 8 * 4 + 4
    assert [(c.name, c.detail) for c in checks if c.result != "passed"] == []
    alone = sum("outputs alone" in check.detail for check in checks)
    assert alone == ((3 * 3 + 2) if cell == "rnn_relu" else 0)


@pytest.mark.parametrize("cell", CELLS)
def test_a_lost_gradient_fails(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """Every case whose gradients are compared must fail."""
    for check in parity_of(monkeypatch, cell, emulated_kernels.with_a_lost_unit):
        wanted = "passed" if "outputs alone" in check.detail else "failed"
        assert check.result == wanted, (check.name, check.detail)


@pytest.mark.parametrize("cell", CELLS)
def test_a_shifted_step_fails(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """Every case with more than one step must fail."""
    for check in parity_of(monkeypatch, cell, emulated_kernels.a_step_late):
        wanted = "passed" if str(SMALL[1]) in check.name else "failed"
        assert check.result == wanted, (check.name, check.detail)


def test_large_relu_in_float32_depends_on_the_order_of_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its gradients are not compared, since the last bits of h decide whether relu is active."""
    monkeypatch.setattr(Call, "compares_gradients", lambda *_: True)
    errors = []
    for scale in (1 - 2**-22, 1 + 2**-22):
        monkeypatch.setattr(
            emulated_kernels, "rounding", lambda _, scale=scale: lambda t: t * scale
        )
        monkeypatch.setattr(_ops, "layer", emulated_kernels.layer)
        errors.append(Call("rnn_relu", LARGE[1]).error(CPU, FLOAT32)[0])
    assert max(errors) > 1e5


@pytest.mark.skipif(setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled")
@pytest.mark.parametrize("regime", selftest.REGIMES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_cuda_kernels_pass(monkeypatch: pytest.MonkeyPatch, cell: str, regime: str) -> None:
    """The kernels pass the checks in the interpreter, with the limits that hold on a GPU."""
    with using(TorchDevice(ptx(80))) as gpu:
        monkeypatch.setattr(_raw_ops, "_forward_now", gpu["forward"])
        monkeypatch.setattr(_raw_ops, "_backward_now", gpu["backward"])
        test = selftest.Selftest(CPU, regimes=[regime])
        for precision in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16, TF32):
            test.compare(Call(cell, SMALL[2]), precision, regime)
    for check in test.report.checks:
        refused = regime == "resident" and (CELLS[cell].projects or "float64" in check.name)
        assert check.result == ("not run" if refused else "passed"), (check.name, check.detail)


@pytest.mark.parametrize("card", [card.name for card in CARDS])
def test_what_a_regime_may_not_refuse_it_runs_on_every_card(card: str) -> None:
    for cell, shape, precision, regime, backward in itertools.product(
        CELLS, SMALL, SHORT, selftest.REGIMES, (False, True)
    ):
        call = Call(cell, shape)
        P = max(1, shape.H // 2) if CELLS[cell].projects else shape.H
        *_, limit = torch.ops.fusedrnn._plan(
            cell,
            SHORT[precision],
            [shape.T, shape.N, shape.I, shape.H, P, shape.D],
            card,
            backward,
            precision.tf32,
            regime,
        )
        assert bool(limit) != selftest.may_refuse(call, precision, regime)


@pytest.mark.skipif(setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled")
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(("cell", "regime"), [("gru", "resident"), ("lstm_proj", "streamed")])
def test_use_of_tf32_is_detected(
    monkeypatch: pytest.MonkeyPatch, cell: str, regime: str, used: bool
) -> None:
    """The results of the kernels in the interpreter show whether TF32 was used."""
    monkeypatch.setattr(selftest, "CELLS", {cell: CELLS[cell]})
    if not used:
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    device = TorchDevice(ptx(80))
    with using(device) as gpu:
        monkeypatch.setattr(_raw_ops, "_forward_now", gpu["forward"])
        monkeypatch.setattr(_raw_ops, "_backward_now", gpu["backward"])
        test = selftest.Selftest(CPU, regimes=[regime, "per_step"])
        test.tf32_is_used()
    (check,) = test.report.checks
    assert check.name == f"{cell} tf32 is used {regime}"
    assert check.result == ("passed" if used else "failed"), check.detail
    for which in ("forward", "backward"):
        assert (f"{regime}_{which}_mma_tf32" in device.launches) == used


# --- Checks that need a GPU, with a replacement for it -------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, regime: str) -> None:
    """Pretends that a regime never runs."""
    right = _raw_ops._forward_now

    def forward(*args: Any) -> Any:
        if os.environ.get(REGIME) == regime:
            raise RuntimeError(f"fusedrnn: blocks cannot run together{REGIME_TAG}")
        return right(*args)

    monkeypatch.setattr(_raw_ops, "_forward_now", forward)


@pytest.mark.parametrize("regime", ["resident", "streamed"])
@pytest.mark.parametrize("section", ["parity", "determinism"])
def test_a_gpu_that_lacks_a_regime_fails_unless_asked(
    monkeypatch: pytest.MonkeyPatch, section: str, regime: str
) -> None:
    refuse(monkeypatch, regime)
    every = selftest.Selftest(CPU, regimes=selftest.REGIMES)
    getattr(every, section)()
    failed = every.report.with_result("failed")
    assert failed and all(check.name.endswith(regime) for check in failed)
    assert all("--regime per_step checks that regime" in check.detail for check in failed)
    # The resident regime has no kernels for projections and float64; the streamed regime has.
    names = " ".join(check.name for check in failed)
    assert ("lstm_proj" in names) == (regime == "streamed")
    assert section == "determinism" or ("float64" in names) == (regime == "streamed")
    one = selftest.Selftest(CPU, regimes=["per_step"])
    getattr(one, section)()
    assert not one.report.with_result("failed")


def test_every_regime_must_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _raw_ops._forward_now

    def forward(*args: Any) -> Any:
        y, *rest = right(*args)
        if os.environ.get(REGIME) == "resident":
            y[0, 0, 0] += torch.rand(())
        return y, *rest

    monkeypatch.setattr(_raw_ops, "_forward_now", forward)
    test = selftest.Selftest(CPU, regimes=selftest.REGIMES)
    test.determinism()
    for check in test.report.checks:
        assert (check.result == "failed") == check.name.endswith("resident")


class Stream:
    """A stream of a GPU. While it sleeps its work waits, and work on other streams is done."""

    current: Stream

    def __init__(self, device: torch.device | None = None) -> None:
        self.asleep = False
        self.waiting: list[Callable[[], None]] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.asleep:
            self.waiting.append(work)
        else:
            work()

    def synchronize(self) -> None:
        self.asleep = False
        while self.waiting:
            self.waiting.pop(0)()

    def query(self) -> bool:
        return not self.waiting

    def wait_stream(self, other: Stream) -> None:
        assert not other.waiting


def on_streams(monkeypatch: pytest.MonkeyPatch, astray: str) -> None:
    """Runs our ops and copies as work on streams. The op `astray` uses the default stream."""
    default = Stream()
    monkeypatch.setattr(Stream, "current", default, raising=False)

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    def sleep(_: int) -> None:
        Stream.current.asleep = True

    def copy(to: list[Any], values: list[Any]) -> None:
        Stream.current.enqueue(lambda: torch_copy([t.data for t in to], values))

    torch_copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream.current)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    for op in ("_forward_now", "_backward_now"):
        launch = launched(getattr(_raw_ops, op), op == astray, default)
        monkeypatch.setattr(_raw_ops, op, launch)


def launched(op: Any, astray: bool, default: Stream) -> Any:
    """The op as a launch: the memory of its results exists at once, and their values come later."""

    def launch(*args: Any) -> Any:
        results = op(*args)
        memory = [flat([r]) for r in results]
        for t in flat(memory):
            t.zero_()

        def work() -> None:
            for to, value in zip(flat(memory), flat(list(op(*args))), strict=True):
                to.data.copy_(value)  # autograd must not notice this change

        (default if astray else Stream.current).enqueue(work)
        return results

    return launch


@pytest.mark.parametrize("astray", ["", "_forward_now", "_backward_now"])
def test_work_on_another_stream_fails(monkeypatch: pytest.MonkeyPatch, astray: str) -> None:
    on_streams(monkeypatch, astray)
    test = selftest.Selftest(CPU)
    test.streams()
    (check,) = test.report.checks
    assert check.result == ("failed" if astray else "passed"), check.detail
    assert not astray or check.detail == "the side stream gives other numbers"


def test_a_sleep_too_short_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    on_streams(monkeypatch, "")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    test = selftest.Selftest(CPU)
    test.streams()
    (check,) = test.report.checks
    assert "before all was enqueued, which shows nothing" in check.detail

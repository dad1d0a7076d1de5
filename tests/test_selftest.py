"""fusedrnn.selftest: that it passes on the CPU, that it fails where it should, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedrnn import ops, selftest
from fusedrnn._library import CELLS
from tests.cuda.build import nvcc
from tests.torch_cuda.build import ptx
from tests.torch_cuda.device import TorchDevice, using


def test_it_passes_on_the_cpu_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "fusedrnn-selftest-cpu.json").read_text())
    assert len(report["checks"]) > 100
    assert {check["result"] for check in report["checks"]} == {"passed"}
    assert report["torch"] == torch.__version__
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in report["timings"])
    text = (tmp_path / "fusedrnn-selftest-cpu.md").read_text()
    assert f"{len(report['checks'])} checks, 0 failed" in text
    assert "| parity | 96 | 0 | 0 |" in text
    assert "instruction set chosen" in text
    assert "0 failed" in capsys.readouterr().out


def test_a_wrong_kernel_fails_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops._forward_now

    def wrong(*args: Any) -> Any:
        y, *rest = right(*args)
        y.view(-1)[0] += 0.5
        return y, *rest

    monkeypatch.setattr(ops, "_forward_now", wrong)
    arguments = ["--device", "cpu", "--quick", "--no-benchmark", "--out", str(tmp_path)]
    assert selftest.main(arguments) == 1
    assert "eps in output 0, allowed 200" in (tmp_path / "fusedrnn-selftest-cpu.md").read_text()
    assert "FAILED parity" in capsys.readouterr().out


def test_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("kernel lost")

    monkeypatch.setattr(ops, "_backward_now", broken)
    test = selftest.Selftest(torch.device("cpu"), quick=True)
    test.determinism()
    assert {check.result for check in test.checks} == {"failed"}
    assert all("RuntimeError: kernel lost" in check.detail for check in test.checks)


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


@pytest.mark.skipif(nvcc() is None, reason="no nvcc: kernels cannot be compiled")
@pytest.mark.parametrize("regime", ["resident", "per_step"])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "lstm_proj"])
def test_parity_limits_hold_for_the_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, cell: str, regime: str
) -> None:
    """In the interpreter: what a GPU is asked for is what these kernels give."""
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", regime)
    with using(TorchDevice(ptx(80))) as gpu:
        monkeypatch.setattr(ops, "_forward_now", gpu["forward"])
        monkeypatch.setattr(ops, "_backward_now", gpu["backward"])
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            call = selftest._Call(cell, selftest.SMALL[2])
            worst, where = call.error(torch.device("cpu"), dtype)
            assert worst <= selftest.EPS_ALLOWED[dtype], (dtype, worst, where)

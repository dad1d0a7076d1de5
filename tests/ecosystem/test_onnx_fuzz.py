"""Altered ONNX files: loading one raises a ValueError or returns the right layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.skipif(sys.platform != "linux", reason="it limits its memory as Linux does")
def test_altered_files() -> None:
    command = [sys.executable, "-m", "tests.ecosystem.onnx_fuzz", "--seed", "0", "--count", "1000"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    outcomes = ast.literal_eval(done.stdout.splitlines()[-1])
    # Many files were refused, many were loaded, and many weights were compared.
    assert outcomes["refused"] > 400, outcomes
    assert outcomes["loaded"] > 80, outcomes
    assert outcomes["compared"] > 80, outcomes

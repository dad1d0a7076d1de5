"""Loads the programs of examples/ as modules, and runs them as processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    """Imports examples/<name>.py. The folder examples is added to sys.path, as if it were run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def environment(**others: str) -> dict[str, str]:
    """Environment variables of a process that imports this fusedrnn and prints UTF-8."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **others}


def run(
    name: str, *arguments: str, folder: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs examples/<name>.py as a process that writes its plot to `folder`."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(folder), *arguments],
        env=environment(),
        encoding="utf-8",
        capture_output=True,
        timeout=300,
        check=check,
    )


def parse_fails(
    program: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """The error message of a program whose command line must refuse the arguments."""
    with pytest.raises(SystemExit) as caught:
        program.parse(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def help_of(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> str:
    """The text that a program prints for --help."""
    with pytest.raises(SystemExit) as caught:
        program.parse(["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out

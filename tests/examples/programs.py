"""The programs of examples/, as modules and as processes."""

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
    """The program examples/<name>.py as a module; its folder is on the path, as when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def environment(**others: str) -> dict[str, str]:
    """For a process that finds this fusedrnn and prints UTF-8."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **others}


def run(
    name: str, *arguments: str, folder: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs examples/<name>.py with its plot in `folder`."""
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
    """What a program's command line says of arguments that it must refuse."""
    with pytest.raises(SystemExit) as caught:
        program.parse(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def help_of(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program prints for --help."""
    with pytest.raises(SystemExit) as caught:
        program.parse(["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out

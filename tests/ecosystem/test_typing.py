"""Types and docstrings for users: mypy --strict checks a program on the installed package."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import fusedrnn
from tests.ecosystem import environment

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "typed_program.py"
ROOT = HERE.parents[1]


def test_the_program_runs() -> None:
    spec = importlib.util.spec_from_file_location("typed_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


def test_the_program_uses_every_public_name() -> None:
    tree = ast.parse(PROGRAM.read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {*fusedrnn.__all__, *fusedrnn.functional.__all__} <= used


def mypy(*arguments: str | Path, folder: Path) -> str:
    """The output of mypy --strict for programs, in an environment with the package fusedrnn."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    python, site = environment.make(folder / "environment", "numpy")
    (site / "fusedrnn").symlink_to(Path(fusedrnn.__file__).parent)
    options = ["--strict", "--config-file=", f"--python-executable={python}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", folder / "cache", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_mypy_strict(tmp_path: Path) -> None:
    """mypy agrees with the types that the program asserts, and finds wrong calls in another one.

    mypy also reports a `type: ignore` comment of the program that it does not need.
    """
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import torch\n"
        "from fusedrnn import FusedGRU, FusedLSTM, FusedLSTMCell, patch_torch\n"
        "x = torch.zeros(2, 2, 3)\n"
        "FusedGRU(3, 4, proj_size='2', reset_after=1)\n"
        "FusedLSTM('3', 4)\n"
        "FusedLSTM(3, 4).forward(x, x)\n"
        "FusedLSTMCell(3, 4).forward(x).shape\n"
        "patch_torch(3)\n"
    )
    said = mypy(PROGRAM, wrong, folder=tmp_path)
    errors = [line for line in said.splitlines() if ": error:" in line]
    found = [line.split(":")[:2] for line in errors]
    assert found == [["wrong.py", str(n)] for n in range(4, 9)], said


@pytest.mark.parametrize("name", sorted({*fusedrnn.__all__} - {"__version__", "functional"}))
def test_help(name: str) -> None:
    """Every public name has a docstring that explains all its parameters."""
    value = getattr(fusedrnn, name)
    text = inspect.getdoc(value) or ""
    assert text.splitlines()[0].endswith(".")
    parameters = inspect.signature(value).parameters
    for parameter in parameters:
        assert f"{parameter}:" in text, f"{name}: {parameter} is not explained"
    if inspect.isclass(value) and issubclass(value, nn.Module):
        assert "Args:\n" in text
        assert "Attributes:\n" in text
        assert inspect.getdoc(value.forward) != inspect.getdoc(nn.Module.forward)

"""Imports between files of tests, and that tests compile kernels in the way of the library."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import setup_build
from tests.kit import build

TESTS = setup_build.ROOT / "tests"
PYTHON = sorted(TESTS.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, and the names that it imports from them.

    A program in a string is for a child process, and its imports from tests count too.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for line in re.findall(r"^\s*(?:from|import) (tests\..*)", node.value, re.M):
                yield ".".join(re.findall(r"\w+", line))


def modules_of_tests(path: Path) -> list[str]:
    """The files of tests that a file imports."""
    tests = {file.stem for file in PYTHON if file.stem.startswith("test_")}
    return [name for name in imported(path) if tests & set(name.split("."))]


def test_nothing_imports_a_file_of_tests() -> None:
    found = {str(path.relative_to(TESTS)): modules_of_tests(path) for path in PYTHON}
    assert len(found) > 80
    assert {path: names for path, names in found.items() if names} == {}


FLOOR = "tests.package"


@pytest.mark.parametrize(
    "line",
    [
        f"from {FLOOR}.test_house import TESTS",
        f"from {FLOOR} import test_house",
        f"import {FLOOR}.test_house",
        "from .test_house import TESTS",
        f"run('import sys\\nfrom {FLOOR}.test_house import TESTS')",
        f"run('from {FLOOR} import test_house')",
    ],
)
def test_imports_of_a_file_of_tests_are_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "test_other.py").write_text(f"def test_it():\n    {line}\n")
    assert len(modules_of_tests(tmp_path / "test_other.py")) == 1


def test_the_kit_imports_no_folder_of_tests() -> None:
    """The kit imports nothing from the folders of tests except the PTX interpreter."""
    floors = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"kit", "ptxvm"}
    for path in (TESTS / "kit").glob("*.py"):
        for name in imported(path):
            assert name.split(".")[:1] != ["tests"] or name.split(".")[1] not in floors, path


@pytest.fixture
def nvcc_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUDA_HOME has an nvcc that writes its arguments to the returned file. PATH has no nvcc."""
    program = tmp_path / "of_the_system"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/arguments\n')
    program.chmod(0o755)
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").symlink_to(program)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("nvcc") is None
    return tmp_path / "arguments"


def test_kernels_are_compiled_with_the_compiler_and_the_flags_of_the_library(
    nvcc_in_cuda_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*setup_build.nvcc_flags(), "--a-new-flag=1"]
    monkeypatch.setattr(setup_build, "nvcc_flags", lambda: flags)
    source = build.CSRC / "cuda" / "step.cu"
    build.compile_kernel(source, tmp_path / "step.ptx", "-ptx")
    given = nvcc_in_cuda_home.read_text().splitlines()
    assert set(flags) < set(given)
    assert given[-3:] == [str(source), "-o", str(tmp_path / "step.ptx")]


def test_no_test_looks_for_nvcc_itself() -> None:
    """A test that searched PATH only might skip although the library was built with CUDA."""
    own = Path(__file__)
    searches = [path for path in PYTHON if path != own and 'which("nvcc"' in path.read_text()]
    assert searches == []

"""The worked example of docs/adding-a-cell.md: its cell in a copy of the sources, built and run."""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.documents import ROOT, blocks

PAGE = ROOT / "docs/adding-a-cell.md"
# The tests that run for the cell: both engines, the ops, and first and second derivatives.
TESTS = ["tests/kernels/test_kernels.py", "tests/cuda/test_cuda_layer.py", "tests/ops/test_ops.py"]
TESTS += ["tests/ops/test_gradients.py", "tests/cells/test_cells_list.py"]


def block(info: str, has: str) -> str:
    """The one block of code of the page that holds this text."""
    (text,) = (text for _, kind, text in blocks(PAGE) if kind == info and has in text)
    return text


def insert(path: Path, before: str, text: str) -> None:
    """Puts text before a line of a file."""
    content = path.read_text()
    assert content.count(before) == 1, f"{before!r} must stand once in {path.name}"
    path.write_text(content.replace(before, text + before))


def without_imports(text: str) -> str:
    return re.sub(r"^(from|import) .*\n+", "", text, flags=re.M)


def add_the_cell(root: Path) -> None:
    """Does what the page says, in a copy of the repository."""
    (root / "csrc/cells/lstm_coupled.h").write_text(block("cpp", "#pragma once"))
    listed = block("cpp", "#define FUSEDRNN_CELLS")
    include = '#include "lstm_coupled.h"\n'
    last, new = "  X(kLstmPeephole, LstmPeephole)", "  X(kLstmCoupled, LstmCoupled)"
    assert include in listed and f"{last}     \\\n{new}" in listed
    cells = root / "csrc/cells/cells.h"
    insert(cells, '#include "rnn.h"', include)
    cells.write_text(cells.read_text().replace(last, f"{last} \\\n{new}"))
    reference = root / "fusedrnn/_reference.py"
    insert(reference, "STEPS: dict", without_imports(block("python", "def _lstm_coupled")) + "\n\n")
    text, end = reference.read_text(), '    "lstm_peephole": _lstm_peephole,\n'
    assert text.count(end) == 1
    reference.write_text(text.replace(end, end + '    "lstm_coupled": _lstm_coupled,\n'))
    module = without_imports(block("python", "class FusedCoupledLSTM"))
    with open(root / "fusedrnn/_modules.py", "a") as file:
        file.write("\n\n" + module)


@pytest.mark.slow
def test_the_cell_of_the_page_runs_in_both_engines(tmp_path: Path) -> None:
    # It takes longer than one test may: its processes have limits of their own.
    faulthandler.cancel_dump_traceback_later()
    root = tmp_path / "fusedrnn"
    for name in ("csrc", "fusedrnn", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("setup.py", "setup_build.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    add_the_cell(root)
    variables = os.environ | {"PYTHONPATH": str(root), "FUSEDRNN_CUDA": "0"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=root,
            env=variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout

    run("setup.py", "-q", "build_ext", "--inplace")
    run("-c", block("python no-run", "FusedCoupledLSTM"))
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "lstm_coupled", *TESTS)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 50, said

"""Cells that are added to a copy of the sources, built and run in both engines.

One is the worked example of docs/adding-a-cell.md. The other is tests/cells/lstm_masked.h, which
takes a number with each row, as no cell of the library does.
"""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import setup_build
from tests.kit.documents import ROOT, blocks
from tests.kit.packaging import quick_compilers
from tests.ptxvm.build import build as build_the_interpreter

PAGE = ROOT / "docs/adding-a-cell.md"
MASKED = ROOT / "tests/cells/lstm_masked.h"
# The tests of either engine, and those of the ops with first and second derivatives.
ON_CPU, ON_CUDA = "tests/kernels/test_kernels.py", "tests/cuda/test_cuda_layer.py"
OF_OPS = ["tests/ops/test_ops.py", "tests/ops/test_gradients.py", "tests/cells/test_cells_list.py"]


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


def append(path: Path, last: str, text: str) -> None:
    """Puts text behind a line of a file."""
    content = path.read_text()
    assert content.count(last) == 1, f"{last!r} must stand once in {path.name}"
    path.write_text(content.replace(last, last + text))


def add_the_cell_of_the_page(root: Path) -> None:
    """Does what the page says, in a copy of the repository."""
    (root / "csrc/cells/lstm_coupled.h").write_text(block("cpp", "#pragma once"))
    listed = block("cpp", "#define FUSEDRNN_CELLS")
    include = '#include "lstm_coupled.h"\n'
    last, new = "  X(kLstmPeephole, LstmPeephole)", "  X(kLstmCoupled, LstmCoupled)"
    assert include in listed and f"{last}     \\\n{new}" in listed
    cells = root / "csrc/cells/cells.h"
    insert(cells, '#include "rnn.h"', include)
    append(cells, last, f" \\\n{new}")
    reference = root / "fusedrnn/_reference.py"
    insert(reference, "STEPS: dict", without_imports(block("python", "def _lstm_coupled")) + "\n\n")
    append(
        reference, '    "lstm_peephole": _lstm_peephole,\n', '    "lstm_coupled": _lstm_coupled,\n'
    )
    module = without_imports(block("python", "class FusedCoupledLSTM"))
    with open(root / "fusedrnn/_modules.py", "a") as file:
        file.write("\n\n" + module)


def add_the_masked_cell(root: Path) -> None:
    """Lists the cell of the tests, and defines it for numpy. There is no module of it."""
    shutil.copy(MASKED, root / "csrc/cells")
    cells = root / "csrc/cells/cells.h"
    insert(cells, '#include "rnn.h"', '#include "lstm_masked.h"\n')
    append(cells, "  X(kLstmCoupled, LstmCoupled)", " \\\n  X(kLstmMasked, LstmMasked)")
    numpy_reference = root / "tests/kit/numpy_reference.py"
    insert(
        numpy_reference,
        "# One step of each cell:",
        "def lstm_masked(x: Array, h: Array, c: Array, w: dict[str, Any]) -> tuple[Array, Array]:\n"
        "    new_h, new_c = lstm(x, h, c, w)\n"
        '    m = w["row_input"]\n'
        "    return m * new_h + (1 - m) * h, m * new_c + (1 - m) * c\n\n\n",
    )
    append(numpy_reference, '    "lstm_peephole": lstm,\n', '    "lstm_masked": lstm_masked,\n')


def compile_no_more_than_needed(root: Path) -> dict[str, str]:
    """Leaves out of a copy with both cells what other tests compile, and returns variables.

    The kernels on a GPU run the two cells alone, and the interpreter, which knows no cells, is this
    tree's. Without nvcc neither is compiled.
    """
    storage = root / "csrc/cuda/storage.cuh"
    cells = "FUSEDRNN_CELLS(FUSEDRNN_CASE)"
    new = "FUSEDRNN_CASE(kLstmCoupled, LstmCoupled) FUSEDRNN_CASE(kLstmMasked, LstmMasked)"
    assert storage.read_text().count(cells) == 1
    storage.write_text(storage.read_text().replace(cells, new))
    if setup_build.nvcc() is not None:
        build = root / "tests/ptxvm/build.py"
        call, path = "load(build())", f"load(Path({str(build_the_interpreter())!r}))"
        assert build.read_text().count(call) == 1
        build.write_text(build.read_text().replace(call, path))
    # The interpreter runs the kernels, so they are compiled as for a GPU.
    return {"CXX": quick_compilers(root)["CXX"]}


# What the ops say of a cell with an input of each row.
REFUSED = """
import torch, fusedrnn

x, w_ih, w_hh = torch.ones(3, 2, 5), torch.ones(16, 5), torch.ones(16, 4)
options = (None, None, 2, "lstm_masked", False, False)
try:
    torch.ops.fusedrnn.forward(x, None, None, [w_ih, w_hh], *options)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_new_cells_run_in_both_engines(tmp_path: Path) -> None:
    # It takes longer than one test may: its processes have limits of their own.
    faulthandler.cancel_dump_traceback_later()
    root = tmp_path / "fusedrnn"
    for name in ("csrc", "fusedrnn", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("setup.py", "setup_build.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    add_the_cell_of_the_page(root)
    add_the_masked_cell(root)
    variables = os.environ | compile_no_more_than_needed(root)
    variables |= {"PYTHONPATH": str(root), "FUSEDRNN_CUDA": "0"}

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

    def passed(cell: str, *tests: str) -> Counter[str]:
        """How many tests of the cell passed in each file."""
        said = run("-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "-k", cell, *tests)
        return Counter(re.findall(r"^PASSED (\S+?)::", said, re.M))

    coupled = passed("lstm_coupled", ON_CPU, ON_CUDA, *OF_OPS)
    masked = passed("lstm_masked", ON_CPU, ON_CUDA)
    assert min(coupled[ON_CPU], masked[ON_CPU]) > 25
    assert sum(coupled[file] for file in OF_OPS) > 40
    assert "must be one without an input of each row, got lstm_masked" in run("-c", REFUSED)
    if setup_build.nvcc() is None:
        pytest.skip("no nvcc: the new cells ran on the CPU and not in the CUDA engine")
    assert min(coupled[ON_CUDA], masked[ON_CUDA]) > 15

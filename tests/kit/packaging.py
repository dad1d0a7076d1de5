"""Commands and a fake compiler for the tests of the build and of the wheel."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import setup_build

ROOT = setup_build.ROOT
LIBRARY = ROOT / "fusedrnn" / "_C.so"
# A program that replaces torch's LSTM by ours. It imports fusedrnn from the unpacked wheel only.
SMOKE_TEST = """
import sys
site = sys.argv[1]
sys.path.insert(0, site)
import torch
import fusedrnn
assert fusedrnn.__file__.startswith(site), fusedrnn.__file__
torch.manual_seed(0)
theirs = torch.nn.LSTM(3, 5, bidirectional=True)
ours = fusedrnn.FusedLSTM(3, 5, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(7, 2, 3)
for layer in (theirs, ours):
    layer(x)[0].square().sum().backward()
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)
print(torch.__version__, fusedrnn.__version__)
fusedrnn.show_config()
"""


def run(*command: str | Path, **options) -> str:
    """The output of `command`. If it exits with an error, the test fails and shows the output."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def make_nvcc(folder: Path, says: str) -> None:
    """Makes a CUDA_HOME whose nvcc only prints its version."""
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / "bin" / "nvcc").chmod(0o755)


def quick_compilers(folder: Path) -> dict[str, str]:
    """Variables of a build whose result is tested for its files and its numbers, not its speed.

    g++ gets -O1 as the last option, so that it counts, and takes half the time. Kernels, which no
    test runs, are not optimised at all. `folder` gets a program that calls the C++ compiler.
    """
    program = folder / "compiler"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(setup_build.compiler())} "$@" -O1\n')
    program.chmod(0o755)
    nvcc = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xcicc=-O0 -Xptxas=-O0"
    return {"CXX": shlex.quote(str(program)), "NVCC_APPEND_FLAGS": nvcc.strip()}

"""A process that is forked after its parent used threads. torch's parallel regions hang there, as
the threads were not forked; ours start other threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# torch computes the sums and comparisons here. They have few values or one thread, since torch's
# parallel regions would hang.
PROGRAM = """
import sys
import torch
from tests.kit.children import outcome
from tests.kit.layers import BY_NAME, randn

parent, child = int(sys.argv[1]), int(sys.argv[2])
modules = [cell.make(32, 256)[0] for cell in BY_NAME.values()]
x = randn(12, 8, 32, dtype=torch.float32).requires_grad_()
weights = randn(256, dtype=torch.float32)
torch.manual_seed(0)

def call(module):
    y, _ = module(x)
    gradients = torch.autograd.grad((y * weights[: y.size(-1)]).sum(), [x, *module.parameters()])
    return [y.detach(), *gradients]

torch.set_num_threads(1)
alone = [call(module) for module in modules]

def in_child():
    if child:
        torch.set_num_threads(child)
    got = [call(module) for module in modules]
    torch.set_num_threads(1)
    for ours, wanted in zip(got, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))

def grandchild():
    in_child()
    torch.set_num_threads(2)
    said = outcome(in_child, 40)
    assert said == "ok", said

torch.set_num_threads(parent)
for module in modules:
    call(module)
print(outcome(in_child, 40))
print(outcome(grandchild, 60))
torch.set_num_threads(parent)
for module in modules:  # the parent goes on
    call(module)
print("done")
"""


def run(*arguments: str, log: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FUSEDRNN_LOG": log},
        capture_output=True,
        text=True,
        timeout=150,
    )


# The number of threads that the child sets; with 0 it keeps the inherited number.
@pytest.mark.parametrize("child", ["0", "1", "2", "5"])
def test_after_a_parent_that_used_threads(child: str) -> None:
    done = run("2", child)
    assert done.stdout == "ok\nok\ndone\n", done.stdout + done.stderr


def test_a_child_has_threads_if_its_parent_used_none() -> None:
    done = run("1", "2", log="1")
    assert done.stdout == "ok\nok\ndone\n", done.stdout + done.stderr
    assert " slices" in done.stderr or "cut at 0 4 8" in done.stderr

"""torch's threads in the engine, Python threads that call it, and forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.layers import CELLS, Cell, make_input, make_states, ragged, randn, run

ROOT = Path(__file__).resolve().parents[2]
BATCHES = ["plain", "packed", "lengths"]


def make_batch(batch: str, I: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """13 sequences of up to 20 steps, as an input and keyword arguments of a layer."""
    return make_input(batch, ragged([20, 20, 17, 15, 15, 9, 8, 5, 5, 3, 2, 1, 1], I, dtype))


def result(cell: Cell, batch: str, dtype: torch.dtype, **options: int) -> dict[str, Tensor]:
    """Outputs and gradients of a layer. All inputs and weights follow from torch's seed."""
    torch.manual_seed(0)
    ours, _ = cell.make(19, 67, num_layers=2, **options)
    ours = ours.to(dtype)
    input, kwargs = make_batch(batch, 19, dtype)
    return run(ours, input, make_states(ours, 13, dtype), **kwargs)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not wrong


# --- torch's threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_threads_change_no_bit(cell: Cell, batch: str, dtype: torch.dtype) -> None:
    """The order of sums does not depend on the threads. A second run gives the same bits too."""
    for bidirectional in (False, True):
        torch.set_num_threads(1)
        alone = result(cell, batch, dtype, bidirectional=bidirectional)
        torch.set_num_threads(2)
        for _ in range(2):
            assert_same_bits(result(cell, batch, dtype, bidirectional=bidirectional), alone)


@pytest.mark.parametrize("N", [0, 1, 2, 3])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_few_sequences(cell: Cell, N: int) -> None:
    """There are fewer sequences than threads, and weights so large that threads share each step."""
    for H in (5, 190):
        module, _ = cell.make(3, H)
        module = module.double()
        input = randn(4, N, 3)
        torch.set_num_threads(1)
        alone = run(module, input)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert_same_bits(run(module, input), alone)


# --- Python's threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_calls_from_several_threads_at_once(cell: Cell) -> None:
    """One module, forward and backward, from 6 threads, 10 calls each.

    A single sequence makes torch's threads share each step, and wait for each other there.
    """
    torch.set_num_threads(2)
    module, _ = cell.make(9, 190)
    parameters = list(module.parameters())
    inputs = [randn(3 + i, 1 + i % 7, 9, dtype=torch.float32) for i in range(12)]

    def call(i: int) -> list[Tensor]:
        x = inputs[i].clone().requires_grad_()
        y, _ = module(x)
        gradients = torch.autograd.grad((y * torch.arange(y.size(-1))).sum(), [x, *parameters])
        return [y.detach(), *gradients]

    alone = [call(i) for i in range(len(inputs))]
    ready = threading.Barrier(6)

    def work(worker: int) -> list[tuple[int, list[Tensor]]]:
        torch.set_num_threads(2)
        ready.wait(timeout=60)
        order = [(worker * 5 + k) % len(inputs) for k in range(10)]
        return [(i, call(i)) for i in order]

    with ThreadPoolExecutor(6) as pool:
        for results in pool.map(work, range(6), timeout=60):
            for i, got in results:
                for k, (g, wanted) in enumerate(zip(got, alone[i], strict=True)):
                    assert torch.equal(g, wanted), (i, k)


# --- Modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_without_gradients(cell: Cell, batch: str) -> None:
    """no_grad and inference_mode give the same bits as training, with one thread and with two."""
    module, _ = cell.make(6, 33, bidirectional=True)
    input, kwargs = make_batch(batch, 6, torch.float32)

    def outputs() -> list[Tensor]:
        y, state = module(input, **kwargs)
        states = state if isinstance(state, tuple) else (state,)
        return [y.data if batch == "packed" else y, *states]

    wanted = outputs()
    assert all(t.requires_grad for t in wanted)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for mode, inference in ((torch.no_grad, False), (torch.inference_mode, True)):
            with mode():
                got = outputs()
            for g, w in zip(got, wanted, strict=True):
                assert not g.requires_grad
                assert g.is_inference() == inference
                assert torch.equal(g, w)


# --- Forked processes ----------------------------------------------------------------------------

FORKED = """
import torch
from torch.utils.data import DataLoader, Dataset
from tests.kit.layers import CELLS, randn

torch.set_num_threads(2)
modules = [cell.make(7, 64)[0] for cell in CELLS]

def call(i):
    module = modules[i % len(modules)]
    x = randn(9, 16, 7, dtype=torch.float32, seed=i).requires_grad_()
    y, _ = module(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    return [y.detach(), *gradients]

class Calls(Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, i):
        return i, torch.get_num_threads(), call(i)

# The parent's threads have run, forward and backward, when the workers are forked.
for i in range(24):
    call(i)
loader = DataLoader(
    Calls(), num_workers=2, batch_size=None, multiprocessing_context="fork", timeout=30
)
workers = list(loader)
torch.set_num_threads(workers[0][1])
for i, _, got in workers:
    for k, (g, wanted) in enumerate(zip(got, call(i), strict=True)):
        assert torch.equal(g, wanted), (i, k)
assert len(workers) == 24
torch.set_num_threads(2)
call(0)  # the parent goes on
print("done")
"""


def test_in_forked_workers_of_a_data_loader() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FUSEDRNN_LOG": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "done\n", done.stderr
    # At least the first forward used two threads. Later calls use one beside busy processes.
    assert "sequences cut at 0 8 16" in done.stderr, "the parent ran on one thread"
    assert "sequences cut at 0 16, 1 thread\n" in done.stderr, "the workers ran on more than one"

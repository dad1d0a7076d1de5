"""Faults that must not happen: reads of memory that was never written, values that spread to other
sequences, saved tensors that change, and memory that grows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn._library import CELLS as SPECS
from tests.kit.arguments import CELLS_AND_FORMS, FORMS, make_arguments
from tests.kit.layers import (
    CELLS,
    LENGTHS,
    TORCH_CELLS,
    Cell,
    make_input,
    make_states,
    ragged,
    randn,
    run,
)

ROOT = Path(__file__).resolve().parents[2]

each_cell = pytest.mark.parametrize("cell", CELLS, ids=str)
each_form = pytest.mark.parametrize("form", FORMS)


def split_rows(input: Any, tensor: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The rows of y, or of a gradient of the input, of sequence n, and all other rows."""
    if isinstance(input, PackedSequence):
        assert input.sorted_indices is not None
        owner = torch.cat([input.sorted_indices[:size] for size in input.batch_sizes])
        return tensor[owner == n], tensor[owner != n]
    owner = torch.arange(len(LENGTHS))
    return tensor[:, owner == n], tensor[:, owner != n]


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not wrong


# --- Memory that was never written ---------------------------------------------------------------


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills every new tensor with NaN, and tensors of bytes, like our scratch, with 255."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_form
@each_cell
def test_poisoned_memory(
    cell: Cell, form: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    runs = []
    for H in (2, 13, 33, 34):
        for bidirectional in (False, True):
            module, _ = cell.make(4, H, num_layers=2, bidirectional=bidirectional)
            module = module.to(dtype)
            input, kwargs = make_input(form, ragged(LENGTHS, 4, dtype))
            hx = make_states(module, 5, dtype) if H == 13 else None
            runs.append((module, input, hx, kwargs))
    wanted = [run(module, input, hx, **kwargs) for module, input, hx, kwargs in runs]
    request.getfixturevalue("poisoned_memory")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for (module, input, hx, kwargs), expected in zip(runs, wanted, strict=True):
            got = run(module, input, hx, **kwargs)
            assert all(t.isfinite().all() for t in got.values())
            if threads == 1:
                assert_same_bits(got, expected)
            with torch.no_grad():
                y = module(input, hx, **kwargs)[0]
            assert torch.equal(y.data if form == "packed" else y, got["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_poisoned_memory_in_the_reserve(
    cell: str, form: str, dtype: torch.dtype, poisoned_memory: None
) -> None:
    """The reserve is an output of an op, so all of it must be the same in every run."""
    call = make_arguments(cell, form, dtype=dtype, requires_grad=False)
    *_, reserve = torch.ops.fusedrnn.forward(*call.op_arguments())
    assert reserve.numel() > 0 and reserve.isfinite().all()


# --- NaN and Inf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sick", range(len(LENGTHS)))
@each_form
@each_cell
def test_nan_stays_in_its_sequence(cell: Cell, form: str, sick: int) -> None:
    module, _ = cell.make(4, 19, num_layers=2, bidirectional=True)
    sequences = ragged(LENGTHS, 4, torch.float32)
    hx = make_states(module, 5, torch.float32)
    clean_input, kwargs = make_input(form, sequences)
    clean = run(module, clean_input, hx, **kwargs)
    sequences[sick][-1] = float("nan")
    input, _ = make_input(form, sequences)
    got = run(module, input, hx, **kwargs)
    for name in ("y", "d_x"):
        mine, others = split_rows(input, got[name], sick)
        assert name == "d_x" or mine.isnan().any()
        assert torch.equal(others, split_rows(input, clean[name], sick)[1])
    for name in ("h_n", "c_n", "d_h0", "d_c0"):
        if name in clean:
            others = [t for t in range(len(LENGTHS)) if t != sick]
            assert torch.equal(got[name][:, others], clean[name][:, others])


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
@each_cell
def test_padding_is_never_read(cell: Cell, fill: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module, _ = cell.make(4, 19, num_layers=2, bidirectional=True)
        module = module.to(dtype)
        sequences, hx = ragged(LENGTHS, 4, dtype), make_states(module, 5, dtype)
        clean_input, kwargs = make_input("lengths", sequences)
        clean = run(module, clean_input, hx, **kwargs)
        input, _ = make_input("lengths", sequences, fill)
        assert not input.isfinite().all()
        got = run(module, input, hx, **kwargs)
        assert_same_bits(got, clean)
        padding = torch.arange(9)[:, None] >= torch.tensor(LENGTHS)
        assert (got["y"][padding] == 0).all()
        assert (got["d_x"][padding] == 0).all()
        # Backward does not read the padding of the gradient of y either.
        y = module(clean_input.clone().requires_grad_(), hx, **kwargs)[0]
        weights = torch.randn_like(y)
        poisoned = weights.masked_fill(padding[..., None], fill)
        parameters = list(module.parameters())
        pairs = zip(
            torch.autograd.grad(y, parameters, poisoned, retain_graph=True),
            torch.autograd.grad(y, parameters, weights),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@each_cell
def test_inf_and_nan_spread_as_in_torch_nn(cell: Cell, where: str, value: float) -> None:
    if where == "c0" and not cell.has_c:
        pytest.skip("no c")
    ours, theirs = cell.make(3, 5)
    x, hx = randn(4, 2, 3, dtype=torch.float32), make_states(theirs, 2, torch.float32)
    if where in ("h0", "c0"):
        (hx if where == "h0" and not cell.has_c else hx[where == "c0"])[0, 1, 1] = value
    elif where == "x":
        x[1, 1, 0] = value
    else:
        for module in (ours, theirs):
            getattr(module, where).data.view(-1)[2] = value
    got, wanted = run(ours, x, hx), run(theirs, x, hx)
    for name in ("y", "h_n", "c_n", "d_x", "d_h0", "d_c0"):
        if name in wanted:
            torch.testing.assert_close(
                got[name], wanted[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
            )


# --- Saved tensors -------------------------------------------------------------------------------


@each_form
@each_cell
def test_two_backwards_give_the_same(cell: Cell, form: str) -> None:
    module, _ = cell.make(4, 33, num_layers=2, bidirectional=True)
    input, kwargs = make_input(form, ragged(LENGTHS, 4, torch.float32))
    y = module(input, **kwargs)[0]
    y = y.data if form == "packed" else y
    loss = (y * torch.randn_like(y)).sum()
    parameters = list(module.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    module(input, **kwargs)  # another forward in between
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_form
@each_cell
def test_ops_write_to_no_argument(cell: Cell, form: str) -> None:
    call = make_arguments(cell.name, form, dtype=torch.float32, requires_grad=False)

    def copies(arguments: Any) -> list[Tensor]:
        return [t.clone() for a in arguments for t in (a if isinstance(a, list) else [a])
                if isinstance(t, Tensor)]  # fmt: skip

    *forward, _ = call.op_arguments()
    before = copies(forward)
    y, h_n, c_n, reserve = torch.ops.fusedrnn.forward(*forward, True)
    assert all(torch.equal(a, b) for a, b in zip(copies(forward), before, strict=True))

    x, h0, c0, weights, *rest = forward
    d_c = torch.randn_like(c_n) if SPECS[cell.name].has_c else None
    backward = [torch.randn_like(y), torch.randn_like(h_n), d_c, x, h0, c0, weights, reserve, *rest]
    before = copies(backward)
    torch.ops.fusedrnn.backward(*backward, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(copies(backward), before, strict=True))


@each_form
@each_cell
def test_outputs_may_be_changed_in_place(cell: Cell, form: str) -> None:
    module, _ = cell.make(4, 9, bidirectional=True)
    input, kwargs = make_input(form, ragged(LENGTHS, 4, torch.float32))

    def gradients(in_place: bool) -> tuple[Tensor, ...]:
        y, state = module(input, **kwargs)
        h_n = state[0] if cell.has_c else state
        y = y.data if form == "packed" else y
        if in_place:
            y.mul_(3), h_n.add_(y.sum())
        else:
            y = y * 3
            h_n = h_n + y.sum()
        return torch.autograd.grad(y.square().sum() + h_n.sum(), list(module.parameters()))

    pairs = zip(gradients(True), gradients(False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("changed", ["input", "weight_hh_l0"])
@each_cell
def test_a_changed_input_is_noticed(cell: Cell, changed: str) -> None:
    """An error is raised, as in torch.nn, if a tensor that backward needs was changed."""
    ours, theirs = cell.make(4, 9)
    for module in (ours, theirs) if cell in TORCH_CELLS else (ours,):
        x = randn(3, 2, 4, dtype=torch.float32).requires_grad_()
        input = x * 1
        y = module(input)[0]
        with torch.no_grad():
            (input if changed == "input" else getattr(module, changed)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# --- Memory that grows ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def growth() -> dict[str, dict[str, int]]:
    """The results of tests/kit/growth.py, in a process whose memory no other test has used."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kit.growth"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    grown: dict[str, dict[str, int]] = json.loads(done.stdout)
    return grown


@pytest.mark.parametrize("mode", ["training", "inference"])
@each_cell
def test_no_growth_over_1000_calls(
    growth: dict[str, dict[str, int]], cell: Cell, mode: str
) -> None:
    grown = growth[f"{cell} {mode}"]
    assert grown["objects"] < 50
    # The smallest block of malloc is 32 bytes. 1000 calls that each keep one hold 32 KB.
    assert grown["allocated"] < 16_000
    # Small leaks also keep freed memory around them from being used again, which is far more.
    assert grown["resident"] < 8_000_000


LONG = """
import resource, torch
from tests.kit.layers import CELLS, TORCH_CELLS, randn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
for cell in CELLS:
    ours, theirs = cell.make(4, 8, bidirectional=True)
    x = randn(20_000, 1, 4, dtype=torch.float32)
    ours(x[:10])[0].sum().backward()
    before = peak()
    y = ours(x)[0]
    y.sum().backward()
    # Kept for backward: at most 7 H values a step and direction, 9 MB; the rest is of that order.
    grown = peak() - before
    assert grown < 60e6, f"{cell}: {grown / 1e6:.0f} MB"
    if cell in TORCH_CELLS:
        with torch.no_grad():
            torch.testing.assert_close(y, theirs(x)[0], rtol=0, atol=1e-5)
print("done")
"""


def test_20000_steps() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LONG],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "done\n", done.stderr

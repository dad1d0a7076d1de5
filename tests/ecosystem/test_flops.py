"""torch.utils.flop_counter counts as much for our ops as for torch.nn's layers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn._double_backward import second_derivative
from fusedrnn._options import Batch, Options
from tests.kit.layers import CELLS, Cell, flat, make_states, map_tensors, ragged, randn

T, N, I, H = 7, 3, 4, 6


def count(module: Any, input: Any, hx: Any = None, **kwargs: Any) -> tuple[int, int]:
    """The operations that are counted in forward and in backward."""
    forward, backward = (FlopCounterMode(display=False) for _ in range(2))
    with forward:
        outputs = flat(module(input, hx, **kwargs))
    if any(o.requires_grad for o in outputs):
        with backward:
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2, "bias": False}])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_layers(cell: Cell, options: dict[str, Any]) -> None:
    # The dtype is float64, because torch.nn's float32 LSTM is a single operation on the CPU, for
    # which torch counts nothing.
    ours, theirs = cell.make(I, H, dtype=torch.float64, **options)
    seen = set()
    for trained in (True, False):
        for layer in (ours, theirs):
            layer.requires_grad_(trained)
        for of_x, of_states in ((False, False), (True, False), (False, True), (True, True)):
            x = randn(T, N, I).requires_grad_(of_x)
            hx = make_states(ours, N, torch.float64)
            hx = map_tensors(lambda t: t.requires_grad_(of_states), hx)  # noqa: B023
            expected = count(theirs, x, hx)
            assert count(ours, x, hx) == expected, (trained, of_x, of_states)
            seen.add(expected)
    assert len(seen) == 8 if not options else len(seen) > 3
    with torch.no_grad():
        assert count(ours, x) == (expected[0], 0)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_beginnings_and_states_of_steps_count_nothing(cell: Cell) -> None:
    ours, _ = cell.make(I, H, dtype=torch.float64, bidirectional=True)
    x = randn(T, N, I).requires_grad_()
    starts = torch.rand(T, N) < 0.3
    assert count(ours, x, starts=starts, return_states=True) == count(ours, x)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_padding_is_not_counted(cell: Cell) -> None:
    ours, theirs = cell.make(I, H, dtype=torch.float64, bidirectional=True)
    rows = ragged([T, 2, 1], I)
    for row in rows:
        row.requires_grad_()
    parts = [count(theirs, row.unsqueeze(1)) for row in rows]
    expected = tuple(map(sum, zip(*parts, strict=True)))
    packed = pack_sequence([row.detach() for row in rows])
    packed.data.requires_grad_()
    assert count(ours, packed) == expected
    x = torch.zeros(T + 2, 4, I, dtype=torch.float64, requires_grad=True)
    assert count(ours, x, lengths=[2, 0, T, 1]) == expected


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name: str) -> None:
    ours, theirs = getattr(fusedrnn, f"Fused{name}")(I, H), getattr(nn, name)(I, H)
    for x in (torch.randn(N, I), torch.randn(N, I, requires_grad=True)):
        assert count(ours, x) == count(theirs, x)
        h = torch.randn(N, H, requires_grad=True)
        hx = (h, torch.randn(N, H)) if name == "LSTMCell" else h
        assert count(ours, x, hx) == count(theirs, x, hx)


def test_operations_are_attributed_to_their_module() -> None:
    model = nn.Sequential(nn.Linear(I, I), nn.ModuleDict({"rnn": fusedrnn.FusedGRU(I, H)})["rnn"])
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(T, N, I))
    counts = counter.get_flop_counts()["Sequential.1"]
    assert counts == {torch.ops.fusedrnn.forward: 2 * (I + H) * 3 * H * T * N}


def test_fake_and_meta_tensors() -> None:
    """The values of lengths are unknown in fake tensors, so all steps are counted."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        weights = list(fusedrnn.FusedGRU(I, H).parameters())
        x, lengths = torch.randn(T, N, I), torch.tensor([T, 2, 1])
        fusedrnn._ops.layer(x, None, None, weights, Batch(None, lengths, N), Options("gru"))
    assert counter.get_total_flops() == 2 * (I + H) * 3 * H * T * N
    with FlopCounterMode(display=False) as counter:
        fusedrnn.FusedGRU(I, H, device="meta")(torch.randn(T, N, I, device="meta"))
    assert counter.get_total_flops() == 2 * (I + H) * 3 * H * T * N


def test_double_backward() -> None:
    """The op of the second derivative counts as much as the products that it consists of."""
    layer = fusedrnn.FusedGRU(I, H, dtype=torch.float64)
    leaves: list[Tensor] = [randn(T, N, I), randn(1, N, H)]
    inputs = [*(t.requires_grad_() for t in leaves), *layer.parameters()]
    y, _ = layer(*leaves)
    weight = torch.ones_like(y).requires_grad_()
    gradients = torch.autograd.grad(y, inputs, weight, create_graph=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(gradients, [torch.ones_like(g) for g in gradients])
    forward = 2 * (I + H) * 3 * H * T * N
    assert counter.get_total_flops() == 9 * forward
    second = torch.ops.fusedrnn.double_backward
    assert counter.get_flop_counts()["Global"][second] == 9 * forward
    batch = Batch(None, None, N)
    primals = [leaves[0], leaves[1], None, *layer.parameters()]
    with FlopCounterMode(display=False) as counter:
        second_derivative([weight, None, None], primals, primals, batch, Options("gru"), False)
    assert counter.get_total_flops() == 9 * forward


@pytest.mark.parametrize("first", ["fusedrnn", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first: str) -> None:
    """fusedrnn does not import the counter: that takes a few tenths of a second with CUDA."""
    program = f"""
import sys, torch
finders = len(sys.meta_path)
import {first}
if {first!r} == "fusedrnn":
    assert "torch.utils.flop_counter" not in sys.modules
import fusedrnn, torch.utils.flop_counter as counter
assert len(sys.meta_path) == finders
assert counter.__spec__.origin == counter.__file__
with counter.FlopCounterMode(display=False) as mode:
    fusedrnn.FusedRNN(2, 3)(torch.randn(4, 1, 2))
print(mode.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == 2 * (2 + 3) * 3 * 4

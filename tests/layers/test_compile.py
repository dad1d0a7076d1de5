"""torch.compile (fullgraph) and torch.export compute the same as eager mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn
from tests.kit.layers import CELLS, Cell, flat, ragged, randn


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module: Any, backend: str = "aot_eager", **kwargs: Any) -> Any:
    return torch.compile(module, fullgraph=True, backend=backend, **kwargs)


def gradients(outputs: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    losses = [(t * torch.linspace(1, 2, t.numel()).view_as(t)).sum() for t in flat(outputs)]
    return torch.autograd.grad(losses, leaves)


def assert_close(actual: Any, expected: Any) -> None:
    for a, b in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_compiled_layers_forward_and_backward(cell: Cell) -> None:
    module, _ = cell.make(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = randn(4, 2, 3).requires_grad_()
    leaves = [x, *module.parameters()]
    actual, expected = compiled(module)(x), module(x)
    assert_close(actual, expected)
    assert_close(gradients(actual, leaves), gradients(expected, leaves))


def test_inductor() -> None:
    lstm = fusedrnn.FusedLSTM(3, 5, batch_first=True, dtype=torch.float64)
    head = torch.nn.Linear(5, 2, dtype=torch.float64)
    x = randn(2, 4, 3).requires_grad_()
    leaves = [x, *lstm.parameters(), *head.parameters()]

    def model(x: Tensor) -> Tensor:
        y, (h_n, _) = lstm(x)
        result: Tensor = head(torch.relu(y)).sum(dim=1) + head(h_n[0])
        return result

    actual, expected = compiled(model, "inductor")(x), model(x)
    assert_close(actual, expected)
    assert_close(gradients(actual, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("as_list", [False, True])
def test_lengths(cell: Cell, as_list: bool) -> None:
    module, _ = cell.make(3, 5, bidirectional=True, dtype=torch.float64)
    x = randn(4, 3, 3).requires_grad_()
    lengths: Any = [2, 4, 0] if as_list else torch.tensor([2, 4, 0])
    actual, expected = compiled(module)(x, lengths=lengths), module(x, lengths=lengths)
    assert_close(actual, expected)
    leaves = [x, *module.parameters()]
    assert_close(gradients(actual, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("form", ["range", "int32", "uint8", "numpy", "numpy int32"])
def test_forms_of_lengths(form: str) -> None:
    gru = fusedrnn.FusedGRU(3, 5, dtype=torch.float64)
    x = randn(4, 3, 3)
    lengths: Any = {
        "range": range(4, 1, -1),
        "int32": torch.tensor([4, 3, 2], dtype=torch.int32),
        "uint8": torch.tensor([4, 3, 2], dtype=torch.uint8),
        "numpy": np.array([4, 3, 2]),
        "numpy int32": np.array([4, 3, 2], dtype=np.int32),
    }[form]
    assert_close(compiled(gru)(x, lengths=lengths), gru(x, lengths=[4, 3, 2]))


def test_fractions_cannot_be_told_in_a_graph() -> None:
    gru = fusedrnn.FusedGRU(3, 5)
    for lengths in (torch.tensor([4.0, 3, 2]), torch.tensor([True, True, False]), [4.0, 3, 2]):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="lengths must"):
            compiled(gru)(torch.randn(4, 3, 3), lengths=lengths)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("packed", [False, True])
def test_lengths_of_a_buffer_that_is_filled_again(backend: str, packed: bool) -> None:
    """Forward copies the lengths. A compiler must not remove the copy or move it to backward."""
    gru = fusedrnn.FusedGRU(3, 5, dtype=torch.float64)
    run = compiled(gru, backend)
    buffer = np.array([3, 2, 1])
    sizes = torch.from_numpy(buffer)
    rows, x = randn(6, 3), randn(4, 3, 3)

    def gradient(fill: bool) -> Tensor:
        if packed:
            y: Tensor = run(PackedSequence(rows, sizes))[0].data
        else:
            y = run(x, lengths=sizes)[0]
        if fill:
            buffer[:] = [4, 1, 1]
        return torch.autograd.grad(y.sin().sum(), gru.weight_hh_l0)[0]

    expected = gradient(False)
    assert torch.equal(gradient(True), expected)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("sort", [False, True])
def test_packed_sequence_in_and_out(sort: bool, states: bool) -> None:
    module = fusedrnn.FusedLSTM(3, 5, num_layers=2, dtype=torch.float64)
    x = pack_sequence(ragged([5, 3, 2] if sort else [3, 5, 2], 3), enforce_sorted=sort)
    hx = (randn(2, 3, 5), randn(2, 3, 5)) if states else None
    actual, expected = compiled(module)(x, hx), module(x, hx)
    assert type(actual[0]) is PackedSequence
    assert_close(actual, expected)
    for a, b in zip(actual[0][1:], expected[0][1:], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_same_tensor_as_h0_and_c0() -> None:
    module = fusedrnn.FusedLSTM(3, 5, dtype=torch.float64)
    x, z = randn(4, 2, 3), randn(1, 2, 5).requires_grad_()
    actual, expected = compiled(module)(x, (z, z)), module(x, (z, z))
    assert_close(actual, expected)
    assert_close(gradients(actual, [z]), gradients(expected, [z]))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_compiled_cells(kind: str) -> None:
    make = {
        "lstm": fusedrnn.FusedLSTMCell,
        "gru": fusedrnn.FusedGRUCell,
        "rnn": fusedrnn.FusedRNNCell,
    }[kind]
    cell = make(3, 5, dtype=torch.float64)
    x = randn(2, 3).requires_grad_()
    assert_close(compiled(cell)(x), cell(x))
    assert_close(gradients(compiled(cell)(x), [x]), gradients(cell(x), [x]))


def test_one_graph_serves_every_length_and_batch() -> None:
    module = fusedrnn.FusedGRU(2, 8, num_layers=2, dtype=torch.float64)
    counter = CompileCounter()
    run = compiled(module, counter, dynamic=True)
    for T, N in ((6, 3), (7, 3), (9, 4), (12, 5)):
        x = randn(T, N, 2)
        assert_close(run(x), module(x))
    assert counter.frame_count == 1


def test_dropout_and_training_mode() -> None:
    module = fusedrnn.FusedLSTM(3, 5, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = randn(4, 2, 3)
    run = compiled(module)
    assert not torch.equal(run(x)[0], run(x)[0])
    module.eval()
    assert_close(run(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_export_with_dynamic_time_and_batch(cell: Cell, strict: bool) -> None:
    module, _ = cell.make(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    T, N = torch.export.Dim("T", min=1, max=100), torch.export.Dim("N", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(
            module, (randn(6, 3, 3),), dynamic_shapes=({0: T, 1: N},), strict=strict
        )
    for shape in ((6, 3, 3), (11, 2, 3), (1, 1, 3)):
        x = randn(*shape)
        assert_close(program.module()(x), module(x))


def test_export_with_lengths() -> None:
    module = fusedrnn.FusedLSTM(3, 5, batch_first=True, dtype=torch.float64)
    T, N = torch.export.Dim("T", min=2, max=100), torch.export.Dim("N", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            module,
            (randn(3, 6, 3),),
            kwargs={"lengths": torch.tensor([6, 2, 0])},
            dynamic_shapes={"input": {0: N, 1: T}, "lengths": {0: N}},
        )
    x, lengths = randn(2, 9, 3), torch.tensor([4, 9])
    assert_close(program.module()(x, lengths=lengths), module(x, lengths=lengths))


def test_lengths_out_of_range_are_found_when_the_graph_runs() -> None:
    module = fusedrnn.FusedLSTM(3, 5)
    run = compiled(module)
    x = torch.randn(4, 2, 3)
    run(x, lengths=torch.tensor([4, 1]))
    with pytest.raises(RuntimeError, match=r"lengths must be in \[0, T\] = \[0, 4\], got 5"):
        run(x, lengths=torch.tensor([5, 1]))

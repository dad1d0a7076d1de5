"""The options `starts` and `c_in_y` of the ops: results, derivatives, shapes and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedrnn import _ops, _reference
from fusedrnn._library import CELLS
from tests.kit.arguments import CELLS_AND_FORMS, LayerArguments, make_arguments
from tests.kit.layers import error

FORWARD = torch.ops.fusedrnn.forward.default
BACKWARD = torch.ops.fusedrnn.backward.default
DOUBLE_BACKWARD = torch.ops.fusedrnn.double_backward.default

each_call = pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
SIZES = [(1, 4, 3, 5), (7, 5, 3, 6), (30, 9, 5, 17)]


def opcheck(op: object, arguments: tuple[object, ...]) -> None:
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def derivatives(call: LayerArguments, outputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(outputs, call.leaves, weights, materialize_grads=True)
    return list(found)


@pytest.mark.parametrize("sizes", SIZES)
@each_call
def test_against_the_reference(
    device: torch.device, cell: str, form: str, sizes: tuple[int, int, int, int]
) -> None:
    T, N, I, H = sizes
    for D, starts, c_in_y in ((1, 0.2, True), (2, 0.2, False), (2, 0.6, True), (2, 1.0, False)):
        call = make_arguments(
            cell, form, T, N, I, H, D, starts=starts, c_in_y=c_in_y, device=device
        )
        ours, theirs = call.run(_ops.layer), call.run(_reference.layer)
        weights = [torch.randn_like(t) for t in theirs]
        d_ours, d_theirs = derivatives(call, ours, weights), derivatives(call, theirs, weights)
        for a, b in zip([*ours, *d_ours], [*theirs, *d_theirs], strict=True):
            assert a.shape == b.shape
            assert error(a, b) < 1e-12


@each_call
def test_gradcheck(device: torch.device, cell: str, form: str) -> None:
    how: dict[str, Any] = {"starts": 0.3, "c_in_y": True, "device": device}
    call = make_arguments(cell, form, T=4, N=2, I=2, H=2, **how)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.with_leaves(leaves).run(_ops.layer))

    torch.autograd.gradcheck(run, call.leaves)
    torch.autograd.gradgradcheck(run, call.leaves, fast_mode=True)


@pytest.mark.parametrize("form", ["plain", "packed", "lengths"])
@pytest.mark.parametrize("cell", ["lstm_proj", "gru", "rnn_tanh"])
def test_opcheck(cell: str, form: str) -> None:
    call = make_arguments(cell, form, T=4, starts=0.3, c_in_y=True, dtype=torch.float32)
    opcheck(FORWARD, call.op_arguments())
    with torch.no_grad():
        y, h_n, c_n, reserve = FORWARD(*call.op_arguments())
    grads: list[Any] = [torch.randn_like(t).requires_grad_() for t in (y, h_n, c_n)]
    if c_n.numel() == 0:
        grads[2] = None
    x, h0, c0, weights, batch_sizes, lengths, *options, _, starts, c_in_y = call.op_arguments()
    sequences = (batch_sizes, lengths)
    needs = (True, True, True)
    opcheck(
        BACKWARD,
        (*grads, x, h0, c0, weights, reserve, *sequences, *options, *needs, starts, c_in_y),
    )
    primals = [None if t is None else t.detach() for t in (x, h0, c0, *weights)]
    seconds = [None if t is None else torch.randn_like(t) for t in primals]
    grads = [None if g is None else g.detach() for g in grads]
    opcheck(DOUBLE_BACKWARD, (grads, primals, seconds, *sequences, *options[1:], starts, c_in_y))


def test_the_reserve_does_not_depend_on_the_beginnings() -> None:
    """A compiler knows its size before the values are there."""
    for cell, form in CELLS_AND_FORMS:
        sizes = set()
        for starts in (0.0, 0.5, 1.0):
            call = make_arguments(cell, form, starts=starts, requires_grad=False)
            sizes.add(FORWARD(*call.op_arguments())[3].shape)
        assert len(sizes) == 1


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.zeros(5, 3), r"starts must be bool, got float32"),
        (torch.zeros(3, 5, dtype=torch.bool), r"starts must be \[T, N\] = \[5, 3\], got \[3, 5\]"),
        (torch.zeros(15, dtype=torch.bool), r"starts must be \[T, N\] = \[5, 3\], got \[15\]"),
    ],
)
def test_errors(starts: Tensor, message: str) -> None:
    call = make_arguments("gru", requires_grad=False)
    with pytest.raises(RuntimeError, match=message):
        FORWARD(*call.op_arguments(), starts)


def test_packed_rows_have_one_number_each() -> None:
    call = make_arguments("gru", "packed", requires_grad=False)
    with pytest.raises(
        RuntimeError, match=rf"starts must be \[S\] = \[{len(call.x)}\], got \[5, 3\]"
    ):
        FORWARD(*call.op_arguments(), torch.zeros(5, 3, dtype=torch.bool))


@pytest.mark.parametrize("cell", [name for name, spec in CELLS.items() if not spec.has_c])
def test_c_in_y_without_c(cell: str) -> None:
    call = make_arguments(cell, requires_grad=False)
    with pytest.raises(RuntimeError, match=f"c_in_y must be False: {cell} has no cell state"):
        FORWARD(*call.op_arguments(), None, True)


def test_starts_whose_memory_was_freed() -> None:
    call = make_arguments("gru", starts=0.5, requires_grad=False)
    assert call.batch.starts is not None
    call.batch.starts.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="starts must have a storage of 15 bytes"):
        FORWARD(*call.op_arguments())

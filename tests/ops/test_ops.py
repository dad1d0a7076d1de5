"""The registration of the ops with torch: schemas, fake implementations, autograd."""

from __future__ import annotations

import pytest
import torch

from fusedrnn import _ops
from fusedrnn._options import batch_of
from tests.kit.arguments import CELLS_AND_FORMS, FORMS, make_arguments

FORWARD = torch.ops.fusedrnn.forward.default
BACKWARD = torch.ops.fusedrnn.backward.default
DOUBLE_BACKWARD = torch.ops.fusedrnn.double_backward.default


def opcheck(op: object, arguments: tuple[object, ...]) -> None:
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    assert len(results) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["plain", "packed", "lengths"])
def test_opcheck_forward_dtypes(form: str, dtype: torch.dtype) -> None:
    opcheck(FORWARD, make_arguments("lstm", form, dtype=dtype).op_arguments())


@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
def test_opcheck_every_op(cell: str, form: str) -> None:
    call = make_arguments(cell, form, T=4, N=3, I=2, H=5, dtype=torch.float32)
    opcheck(FORWARD, call.op_arguments())
    with torch.no_grad():
        y, h_n, c_n, reserve = FORWARD(*call.op_arguments())
    grads = [torch.randn_like(t).requires_grad_() for t in (y, h_n, c_n)]
    if c_n.numel() == 0:
        grads[2] = None  # type: ignore[call-overload]
    x, h0, c0, weights, batch_sizes, lengths, *options, _ = call.op_arguments()
    opcheck(
        BACKWARD,
        (
            *(*grads, x, h0, c0, weights, reserve, batch_sizes, lengths),
            *(*options, True, True, True),
        ),
    )
    primals = [None if t is None else t.detach() for t in (x, h0, c0, *weights)]
    grads = [None if g is None else g.detach() for g in grads]  # type: ignore[misc]
    seconds = [None if t is None else torch.randn_like(t) for t in primals]
    opcheck(
        DOUBLE_BACKWARD, (grads, primals, seconds, batch_sizes, lengths, options[1], options[2])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["plain", "lengths"])
def test_opcheck_with_a_float32_c(form: str, dtype: torch.dtype) -> None:
    """With x in 16 bits c0 may be float32. Then c_n and the gradient of c0 are float32 too."""
    call = make_arguments("lstm", form, T=4, N=3, I=2, H=6, dtype=dtype)
    assert call.c0 is not None
    call.c0 = call.c0.detach().float().requires_grad_()
    opcheck(FORWARD, call.op_arguments())
    y, h_n, c_n, reserve = FORWARD(*call.op_arguments())
    assert (y.dtype, h_n.dtype, c_n.dtype) == (dtype, dtype, torch.float32)
    grads = [torch.randn_like(t).detach().requires_grad_() for t in (y, h_n, c_n)]
    x, h0, c0, weights, batch_sizes, lengths, *options, _ = call.op_arguments()
    arguments = (*grads, x, h0, c0, weights, reserve.detach(), batch_sizes, lengths, *options)
    opcheck(BACKWARD, (*arguments, True, True, True))
    _, d_h0, d_c0, d_weights = BACKWARD(*arguments, True, True, True)
    assert (d_h0.dtype, d_c0.dtype) == (dtype, torch.float32)
    assert {d.dtype for d in d_weights} == {torch.float32}  # the dtype of their sums


def test_opcheck_without_states_bias_or_keep() -> None:
    call = make_arguments("gru", bias=False, states=False, requires_grad=False)
    opcheck(FORWARD, call.op_arguments(keep=False))


def test_raw_op_in_grad_mode_is_differentiated() -> None:
    call = make_arguments("lstm", "lengths")
    raw = FORWARD(*call.op_arguments())[:3]
    expected = call.run(_ops.layer)
    for a, b in zip(raw, expected, strict=True):
        assert torch.equal(a, b)
    d_raw = torch.autograd.grad([t.sum() for t in raw], call.leaves)
    d_expected = torch.autograd.grad([t.sum() for t in expected], call.leaves)
    for a, b in zip(d_raw, d_expected, strict=True):
        assert torch.equal(a, b)


def test_raw_op_without_keep_refuses_backward() -> None:
    call = make_arguments("lstm")
    y = FORWARD(*call.op_arguments(keep=False))[0]
    with pytest.raises(RuntimeError, match="keep=True"):
        y.sum().backward()


def test_forward_is_the_same_with_and_without_keep() -> None:
    for cell, form in CELLS_AND_FORMS:
        call = make_arguments(cell, form, requires_grad=False)
        kept, plain = FORWARD(*call.op_arguments()), FORWARD(*call.op_arguments(keep=False))
        assert all(torch.equal(a, b) for a, b in zip(kept[:3], plain[:3], strict=True))
        assert plain[3].numel() == 0 and kept[3].numel() > 0


def test_batch_is_read_from_the_arguments_if_it_is_not_given() -> None:
    """The batch size is read from x, or from batch_sizes."""
    for form in FORMS:
        call = make_arguments("gru", form, N=4)
        assert batch_of(call.x, call.batch.batch_sizes, call.batch.lengths) == call.batch


@pytest.mark.parametrize("form", ["packed", "lengths"])
def test_sequences_changed_before_backward(form: str) -> None:
    """torch or numpy changes them in place. Backward has its own batch_sizes and lengths."""
    call = make_arguments("gru", form)
    sizes = call.batch.batch_sizes if form == "packed" else call.batch.lengths
    expected = torch.autograd.grad(FORWARD(*call.op_arguments())[0].sum(), call.leaves)
    for change in (lambda: sizes.fill_(1), lambda: sizes.numpy().fill(1)):
        before = sizes.clone()
        y = FORWARD(*call.op_arguments())[0]
        change()
        actual = torch.autograd.grad(y.sum(), call.leaves)
        sizes.copy_(before)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("form", ["packed", "lengths"])
def test_sequences_changed_before_the_second_derivative(form: str) -> None:
    call = make_arguments("gru", form)
    sizes = call.batch.batch_sizes if form == "packed" else call.batch.lengths
    y, _, _, reserve = FORWARD(*call.op_arguments())
    x, h0, c0, weights, *sequences, batch, cell, bidirectional, _ = call.op_arguments()
    derivatives = []
    for changed in (False, True):
        grad_y = torch.ones_like(y).requires_grad_()
        d_x = BACKWARD(
            *(grad_y, None, None, x, h0, c0, weights, reserve.detach(), *sequences),
            *(batch, cell, bidirectional, True, True, True),
        )[0]
        if changed:
            sizes.fill_(1)
        derivatives.append(torch.autograd.grad(d_x.sin().sum(), [x, grad_y, *weights]))
    assert all(torch.equal(a, b) for a, b in zip(*derivatives, strict=True))


def test_opcheck_of_the_copy() -> None:
    opcheck(torch.ops.fusedrnn._own.default, (torch.tensor([3, 1]),))

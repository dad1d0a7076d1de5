"""torch.ops.fusedrnn.forward and backward, called directly with wrong arguments. An error names
the argument, and no kernel runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedrnn._library import CELLS
from tests.kit.arguments import FORMS, make_arguments, other_memory

Arguments = dict[str, Any]
# A wrong argument: its name, the change of its value, and a pattern of the error's message.
Row = tuple[str, Callable[[Any], Any], str]

ERRORS = (RuntimeError, NotImplementedError)
HUGE = 1 << 62


def forward_arguments(cell: str, form: str) -> Arguments:
    """T=5, N=3, I=4, H=6, D=2, P=3 with projection; packed: 7 rows, batch_sizes 3 1 1 1 1."""
    call = make_arguments(cell, form, requires_grad=False)
    names = ("x", "h0", "c0", "weights", "batch_sizes", "lengths", "batch", "cell", "bidirectional")
    return {**dict(zip(names, call.op_arguments(), strict=False)), "keep": True}


def backward_arguments(cell: str, form: str) -> Arguments:
    arguments = forward_arguments(cell, form)
    y, h_n, c_n, reserve = torch.ops.fusedrnn.forward(**arguments)
    del arguments["keep"]
    grad_c = torch.randn_like(c_n) if CELLS[cell].has_c else None
    grads = {"grad_y": torch.randn_like(y), "grad_h": torch.randn_like(h_n), "grad_c": grad_c}
    wanted = {"need_x": True, "need_state": True, "need_weights": True}
    return grads | arguments | {"reserve": reserve} | wanted


def at(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Changes one of the weights."""
    return lambda weights: [change(w) if i == index else w for i, w in enumerate(weights)]


def const(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def sizes(*values: int) -> Callable[[Any], Tensor]:
    return const(torch.tensor(values))


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


# Wrong arguments of both ops, by the cell and the form of the batch of the call.
SHARED: dict[tuple[str, str], list[Row]] = {
    ("lstm", "plain"): [
        ("cell", const("lsmt"), "cell must be one of lstm, lstm_proj, gru, .*, got 'lsmt'"),
        ("cell", const(""), "cell must be one of .*, got ''"),
        ("cell", const("gru"), r"weight_hh must be \[G\*H, P\] = \[24, 8\], got \[24, 6\]"),
        ("x", lambda x: x[0, 0, 0], r"x must be \[T, N, I\], got \[\]"),
        ("x", lambda x: x[0], r"x must be \[T, N, I\], got \[3, 4\]"),
        ("x", lambda x: x[None], r"x must be \[T, N, I\], got \[1, 5, 3, 4\]"),
        ("x", lambda x: x[..., :3], r"weight_ih must be \[G\*H, I\] = \[24, 3\], got \[24, 4\]"),
        ("x", lambda x: x[..., :0], "x must have I > 0 features"),
        ("x", Tensor.float, "weight_ih must be float32, got float64"),
        ("x", Tensor.long, "x must be float64, float32, bfloat16 or float16"),
        ("x", lambda x: x + 0j, "x must be float64, float32, bfloat16 or float16"),
        ("x", Tensor.to_sparse, "Could not run 'fusedrnn::"),
        ("x", meta, "must be on"),
        ("batch", const(-1), "batch must be N >= 0, got -1"),
        ("batch", const(4), r"batch must be x.size\(1\) = 3, got 4"),
        ("batch", const(HUGE), rf"batch must be x.size\(1\) = 3, got {HUGE}"),
        ("weights", const([]), "weights of lstm must be 2 or 4 per direction, got 0 for 2 dir"),
        ("weights", lambda w: w[:3], "weights of lstm must be 2 or 4 per direction, got 3"),
        ("weights", lambda w: [*w, w[0]], "weights of lstm must be 2 or 4 per direction, got 9"),
        ("bidirectional", const(False), "weights of lstm must be .* got 8 for 1 direction"),
        ("weights", at(0, lambda w: w[:, 0]), r"weight_ih must be \[4H, I\], got \[24\]"),
        ("weights", at(0, lambda w: w[:0]), r"weight_ih must be \[4H, I\], got \[0, 4\]"),
        ("weights", at(0, lambda w: w[:-1]), r"weight_ih must be \[4H, I\], got \[23, 4\]"),
        ("weights", at(4, lambda w: w[:, 1:]), r"weight_ih must be .* = \[24, 4\], got \[24, 3\]"),
        ("weights", at(1, lambda w: w[:-4]), r"weight_hh must be .* = \[24, 6\], got \[20, 6\]"),
        ("weights", at(5, lambda w: w.T), r"weight_hh must be .* = \[24, 6\], got \[6, 24\]"),
        ("weights", at(2, lambda b: b[:-1]), r"bias_ih must be \[G\*H\] = \[24\], got \[23\]"),
        ("weights", at(7, lambda b: b[None]), r"bias_hh must be .* = \[24\], got \[1, 24\]"),
        ("weights", at(5, Tensor.float), "weight_hh must be float64, got float32"),
        ("weights", at(2, Tensor.bfloat16), "bias_ih must be float64, got bfloat16"),
        ("weights", at(1, Tensor.to_sparse), "Could not run 'fusedrnn::"),
        ("weights", at(1, meta), "weight.* must be on"),
        ("weights", at(6, meta), "weight.* must be on"),
    ],
    ("rnn_tanh", "plain"): [
        ("weights", at(1, lambda w: w[:1, :1].expand(1 << 31, 1 << 31)), "weight_hh must be"),
        ("weights", at(0, lambda w: w[:1, :1].expand(1 << 60, 4)), "weight_ih|weight_hh must be"),
    ],
    ("lstm_proj", "plain"): [
        ("weights", lambda w: w[:5], "weights of lstm_proj must be 3 or 5 per direction"),
        ("weights", at(1, lambda w: w.repeat(1, 2)), r"weight_hh must be .* = \[24, 3\]"),
        ("weights", at(9, lambda w: w[:2]), r"weight_hr must be \[P, H\] = \[3, 6\], got \[2, 6\]"),
        ("weights", at(4, lambda w: w[:0]), r"weight_hr must be \[P, H\], got \[0, 6\]"),
        ("weights", at(4, lambda w: w[0]), r"weight_hr must be \[P, H\], got \[6\]"),
        ("weights", at(4, meta), "weight.* must be on"),
    ],
    ("gru", "packed"): [
        ("x", lambda x: x[None], r"x must be \[S, I\] where batch_sizes is given, got \[1, 7, 4\]"),
        ("batch", const(2), r"batch must be batch_sizes\[0\] = 3, got 2"),
        ("batch", const(HUGE), rf"batch must be batch_sizes\[0\] = 3, got {HUGE}"),
        ("lengths", sizes(1, 2, 3), "batch_sizes and lengths cannot be given together"),
        ("batch_sizes", lambda t: t[:0], "batch_sizes must have at least one step"),
        ("batch_sizes", lambda t: t[None], "batch_sizes must have 1 dimension, got 2"),
        ("batch_sizes", Tensor.int, "batch_sizes must be int64"),
        ("batch_sizes", Tensor.double, "batch_sizes must be int64, got float64"),
        ("batch_sizes", sizes(3, 1, 2, 1), "batch_sizes must be .*non-increasing, got 2 at step 2"),
        ("batch_sizes", sizes(3, 4), "batch_sizes must be .*non-increasing, got 4 at step 1"),
        ("batch_sizes", sizes(3, 0, 4), "batch_sizes must be positive .*got 0 at step 1"),
        ("batch_sizes", sizes(3, -1, 5), "batch_sizes must be positive .*got -1 at step 1"),
        ("batch_sizes", sizes(3, 3), r"batch_sizes must sum to x.size\(0\) = 7, got 6"),
        ("batch_sizes", sizes(3, 3, 3), r"batch_sizes must sum to x.size\(0\) = 7"),
        ("batch_sizes", sizes(*[HUGE] * 4), "batch_sizes must sum to"),
        ("batch_sizes", meta, "batch_sizes must be on"),
    ],
    ("lstm", "lengths"): [
        ("lengths", sizes(2, -1, 5), r"lengths must be in \[0, T\] = \[0, 5\], got -1 at 1"),
        ("lengths", sizes(2, 1, 6), r"lengths must be in \[0, T\] = \[0, 5\], got 6 at 2"),
        ("lengths", sizes(HUGE, 1, 2), f"lengths must be in .*got {HUGE} at 0"),
        ("lengths", sizes(1, 2), r"lengths must be \[N\] = \[3\], got \[2\]"),
        ("lengths", sizes(1, 2, 3, 4), r"lengths must be \[N\] = \[3\], got \[4\]"),
        ("lengths", lambda t: t[0], "lengths must have 1 dimension, got 0"),
        ("lengths", Tensor.int, "lengths must be int64"),
        ("lengths", meta, "lengths must be on"),
        ("batch_sizes", sizes(3, 3), "batch_sizes and lengths cannot be given together"),
    ],
}

FORWARD: dict[tuple[str, str], list[Row]] = {
    ("lstm", "plain"): [
        ("h0", lambda h: h[:, :2], r"h0 must be \[D, N, P\] = \[2, 3, 6\], got \[2, 2, 6\]"),
        ("h0", lambda h: h[0], r"h0 must be .*, got \[3, 6\]"),
        ("h0", Tensor.float, "h0 must be float64, got float32"),
        ("h0", meta, "h0 must be on"),
        ("c0", Tensor.half, "c0 must be float64, got float16"),
        ("c0", meta, "c0 must be on"),
    ],
    ("lstm_proj", "lengths"): [
        ("h0", lambda h: h.repeat(1, 1, 2), r"h0 must be .* = \[2, 3, 3\], got \[2, 3, 6\]"),
        ("c0", lambda c: c[..., :3], r"c0 must be \[D, N, H\] = \[2, 3, 6\], got \[2, 3, 3\]"),
    ],
    ("gru", "packed"): [
        ("h0", lambda h: h[:1], r"h0 must be .*, got \[1, 3, 6\]"),
        ("c0", const(torch.zeros(2, 3, 6)), "c0 must be absent: gru has no cell state"),
    ],
}

BACKWARD: dict[tuple[str, str], list[Row]] = {
    ("lstm", "plain"): [
        ("reserve", lambda r: r[:-1], r"reserve must be .* = \[1080\], got \[1079\]"),
        ("reserve", lambda r: r[None], r"reserve must be .* = \[1080\], got \[1, 1080\]"),
        ("reserve", Tensor.float, "reserve must be float64, got float32"),
        ("reserve", meta, "reserve must be on"),
        ("grad_y", lambda g: g[1:], r"grad_y must be .* = \[5, 3, 12\], got \[4, 3, 12\]"),
        ("grad_y", Tensor.float, "grad_y must be float64, got float32"),
        ("grad_y", meta, "grad_y must be on"),
        ("grad_h", lambda g: g[:, 1:], r"grad_h must be .* = \[2, 3, 6\], got \[2, 2, 6\]"),
        ("grad_h", meta, "grad_h must be on"),
        ("grad_c", lambda g: g[0], r"grad_c must be .* = \[2, 3, 6\], got \[3, 6\]"),
    ],
    ("lstm_proj", "lengths"): [
        ("reserve", lambda r: r[:0], r"reserve must be .*, got \[0\]"),
        (
            "grad_y",
            lambda g: g.repeat(1, 1, 2),
            r"grad_y must be .* = \[5, 3, 6\], got \[5, 3, 12\]",
        ),
        ("grad_c", lambda g: g[..., :3], r"grad_c must be \[D, N, H\] = \[2, 3, 6\]"),
    ],
    ("gru", "packed"): [
        ("reserve", lambda r: r.repeat(2), "reserve must be"),
        ("grad_y", lambda g: g[:6], r"grad_y must be .* = \[7, 12\], got \[6, 12\]"),
        ("grad_c", const(torch.zeros(2, 3, 6)), "grad_c must be absent: gru has no cell state"),
    ],
}


def rows(*tables: dict[tuple[str, str], list[Row]]) -> list[Any]:
    return [
        pytest.param(cell, form, row, id=f"{cell}-{form}-{i}-{row[0]}")
        for table in tables
        for (cell, form), group in table.items()
        for i, row in enumerate(group)
    ]


def check(op: Any, arguments: Arguments, row: Row) -> None:
    name, change, message = row
    op(**arguments)  # the unchanged arguments are right
    with pytest.raises(ERRORS, match=message):
        op(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize(("cell", "form", "row"), rows(SHARED, FORWARD))
def test_forward(cell: str, form: str, row: Row) -> None:
    check(torch.ops.fusedrnn.forward, forward_arguments(cell, form), row)


@pytest.mark.parametrize(("cell", "form", "row"), rows(SHARED, BACKWARD))
def test_backward(cell: str, form: str, row: Row) -> None:
    check(torch.ops.fusedrnn.backward, backward_arguments(cell, form), row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reserve_in_other_memory(dtype: torch.dtype) -> None:
    """Backward reads the values of the reserve from any memory."""
    call = make_arguments("lstm", dtype=dtype, requires_grad=False)
    x, h0, c0, weights, batch_sizes, lengths, *options, _ = call.op_arguments()
    y, _, _, reserve = torch.ops.fusedrnn.forward(*call.op_arguments())

    def backward(reserve: Tensor) -> Any:
        return torch.ops.fusedrnn.backward(
            *(y, None, None, x, h0, c0, weights, reserve, batch_sizes, lengths, *options),
            *(True, True, True),
        )

    *wanted, d_weights = backward(reserve)
    for other in other_memory(reserve):
        *got, d_w = backward(other)
        pairs = zip([*got, *d_w], [*wanted, *d_weights], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# --- Sizes that are larger than any memory -------------------------------------------------------


def test_steps_without_sequences() -> None:
    arguments = forward_arguments("lstm", "plain") | {"batch": 0, "h0": None, "c0": None}
    for T in (0, 1, 1 << 40, 1 << 58):
        x = torch.zeros(T, 0, 4, dtype=torch.float64)
        y, h_n, c_n, _ = torch.ops.fusedrnn.forward(**arguments | {"x": x})
        assert y.shape == (T, 0, 12)
        assert h_n.shape == c_n.shape == (2, 0, 6)


@pytest.mark.parametrize("shape", [(1 << 40, 3, 4), (1 << 20, 1 << 20, 4), (1 << 57, 3, 4)])
def test_an_x_that_memory_cannot_hold(shape: tuple[int, ...]) -> None:
    arguments = forward_arguments("lstm", "plain") | {"h0": None, "c0": None, "batch": shape[1]}
    arguments["x"] = torch.zeros(1, 1, 1, dtype=torch.float64).expand(shape)
    with pytest.raises((RuntimeError, MemoryError)):
        torch.ops.fusedrnn.forward(**arguments)


# --- Random changes ------------------------------------------------------------------------------


def distort(value: Any, rng: random.Random) -> Any:
    """Another value for an argument, of the same type or of a similar one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, -1, value + 1, value - 1, HUGE, -HUGE])
    if isinstance(value, str):
        return rng.choice([*CELLS, "", "LSTM"])
    if isinstance(value, list):
        changed = list(value)
        i = rng.randrange(len(value))
        kind = rng.randrange(4)
        if kind == 0:
            del changed[i]
        elif kind == 1:
            changed.insert(i, changed[0])
        else:
            changed[i] = distort(value[i], rng)
        return changed
    if value is None:
        return torch.zeros(rng.choice([(2, 3, 6), (5,), (3,), ()]), dtype=torch.float64)
    if value.dtype == torch.int64 and rng.random() < 0.6:
        return value + torch.tensor([rng.choice([0, 1, -1, 2, HUGE]) for _ in value])
    dim = rng.randrange(value.dim()) if value.dim() else 0
    size = value.shape[dim] if value.dim() else 0
    changes: list[Callable[[], Tensor]] = [
        lambda: value.narrow(dim, 0, max(0, size - 1)),
        lambda: value.narrow(dim, 0, 0),
        lambda: torch.cat([value, value.narrow(dim, 0, 1)], dim),
        lambda: value.transpose(0, -1),
        lambda: value.transpose(0, -1).contiguous().transpose(0, -1),
        lambda: value.unsqueeze(dim),
        lambda: value.select(dim, 0),
        lambda: value.flatten(),
        lambda: value.narrow(dim, 0, 1).expand_as(value),
        lambda: value.flip(dim),
        lambda: value.to(rng.choice([torch.float32, torch.float16, torch.int64, torch.bool])),
    ]
    return rng.choice(changes)() if value.dim() and size else value.double()


@pytest.mark.parametrize("cell", CELLS)
def test_random_changes(cell: str) -> None:
    """Up to three arguments change at random. There is a result of the right shape or an error."""
    rng = random.Random(cell)
    outcomes = {"result": 0, "error": 0}
    messages: list[str] = []
    ops = [torch.ops.fusedrnn.forward, torch.ops.fusedrnn.backward]
    originals = [
        (op, make(cell, form))
        for form in FORMS
        for op, make in zip(ops, (forward_arguments, backward_arguments), strict=True)
    ]
    for _ in range(1500):
        op, arguments = rng.choice(originals)
        changed = dict(arguments)
        for name in rng.sample(sorted(arguments), rng.choice([1, 1, 2, 3])):
            changed[name] = distort(changed[name], rng)
        try:
            first = op(**changed)[0]
        except ERRORS as error:
            messages.append(str(error))
            outcomes["error"] += 1
            continue
        outcomes["result"] += 1
        if op is torch.ops.fusedrnn.forward:
            assert first.shape[:-1] == changed["x"].shape[:-1]
        elif changed["need_x"]:
            assert first.shape == changed["x"].shape
    assert min(outcomes.values()) > 100, outcomes
    # The errors come from the checks and not from a later call.
    assert all("fusedrnn" in message for message in messages)

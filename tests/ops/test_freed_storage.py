"""An error says that a tensor's storage was freed or cut, as FSDP does with weights.

The cases run in forked children, since a failure may be a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import _ops
from fusedrnn._library import CELLS as SPECS
from tests.kit.arguments import FORMS, make_arguments
from tests.kit.children import outcome
from tests.kit.layers import BY_NAME, CELL_MODULES, CELLS, Cell, flat, make_states, randn


def ending(body: Callable[..., object], *arguments: Any) -> str:
    """How a call ends: "ok", or the type and message of its exception. Runs in this process."""
    try:
        body(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


each_cell = pytest.mark.parametrize("cell", CELLS, ids=str)
each_form = pytest.mark.parametrize("form", FORMS)

# How many bytes are left of a storage. An element of the tensors here takes more than 2.
LEFT = (0, 2)


def refused(said: str, name: str = "") -> bool:
    """Whether a call ended with our error, which says how many bytes are missing and why."""
    words = ("RuntimeError: fusedrnn: ", " must have a storage of ", " its memory was freed")
    # torch raises this error itself when it splits the states of a stack of layers.
    split = said.startswith("RuntimeError: setStorage: ") and not name
    return split or (all(word in said for word in words) and name in said)


class Prepared:
    """A call of a module, with names for the tensors that it reads."""

    def __init__(self, cell: Cell, form: str, dtype: torch.dtype, strided: bool = False) -> None:
        torch.manual_seed(0)
        self.module = cell.make(4, 6, num_layers=2, bidirectional=True)[0].to(dtype)
        if strided:  # weights are views of one storage at odd offsets, as with a flat parameter
            parameters = dict(self.module.named_parameters())
            whole = torch.cat(
                [torch.zeros(1, dtype=dtype)] + [p.view(-1) for p in parameters.values()]
            )
            begin = 1
            for p in parameters.values():
                p.data = whole[begin : begin + p.numel()].view_as(p)
                begin += p.numel()
        x = randn(3, 4, 5, dtype=dtype).permute(2, 0, 1) if strided else randn(5, 3, 4, dtype=dtype)
        self.x = x.requires_grad_()
        self.hx = make_states(self.module, 3, dtype)
        self.options: dict[str, Any] = {}
        self.input: Any = self.x
        self.named = {"x": self.x}
        if form == "lengths":
            self.named["lengths"] = self.options["lengths"] = torch.tensor([2, 5, 3])
        if form == "packed":
            self.input = nn.utils.rnn.pack_padded_sequence(
                self.x, torch.tensor([2, 5, 3]), enforce_sorted=False
            )
            self.named = {"x": self.input.data, "batch_sizes": self.input.batch_sizes}
        self.named |= dict(zip(("h_0", "c_0"), flat(self.hx), strict=False))
        self.named |= dict(self.module.named_parameters())

    def call(self) -> Tensor:
        return flat(self.module(self.input, self.hx, **self.options))[0]

    def cut(self, name: str, left: int) -> None:
        self.named[name].untyped_storage().resize_(left)


def forward(cell: Cell, form: str, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    context: Any = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
    }.get(kind, nullcontext)
    with context():
        first = Prepared(cell, form, dtype, kind == "strided")
        first.call()
        for name in first.named:
            for left in LEFT:
                call = Prepared(cell, form, dtype, kind == "strided")
                call.cut(name, left)
                said = ending(call.call)
                assert refused(said), (name, left, said)


@each_form
@each_cell
def test_forward(cell: Cell, form: str) -> None:
    assert outcome(lambda: forward(cell, form, "float32")) == "ok"


@pytest.mark.parametrize("kind", ["no_grad", "autocast", "bfloat16", "strided"])
@each_form
def test_forward_of_another_kind(form: str, kind: str) -> None:
    assert outcome(lambda: forward(BY_NAME["lstm_proj"], form, kind)) == "ok"


def backward(cell: Cell, form: str, higher: bool) -> None:
    # batch_sizes are left out: we copy them, but torch's backward of packing reads them itself.
    for name in Prepared(cell, form, torch.float64).named.keys() - {"batch_sizes"}:
        for left in LEFT:
            call = Prepared(cell, form, torch.float64)
            wanted = [call.x, *call.module.parameters()]
            loss = call.call().square().sum()
            if higher:
                first = torch.autograd.grad(loss, wanted, create_graph=True)
                loss = torch.stack([g.square().sum() for g in first]).sum()
            call.cut(name, left)
            said = ending(torch.autograd.grad, loss, wanted)
            # Forward keeps the states in the reserve. Only a second derivative reads them again,
            # and then copies of them if x was packed and not sorted. Lengths are always copied.
            needless = name in ("h_0", "c_0") and (not higher or form == "packed")
            needless = needless or name == "lengths"
            assert refused(said) or (needless and said == "ok"), (name, left, said)


@pytest.mark.parametrize("higher", [False, True])
@each_form
@pytest.mark.parametrize("cell", ["lstm_proj", "gru"])
def test_backward(cell: str, form: str, higher: bool) -> None:
    """Frees an input of forward before backward, or between backward and the second derivative."""
    assert outcome(lambda: backward(BY_NAME[cell], form, higher)) == "ok"


@pytest.mark.parametrize("kind", ["FusedLSTM", "FusedGRUCell"])
def test_before_a_backward_that_is_derived(kind: str) -> None:
    def backward(left: int) -> None:
        module = getattr(fusedrnn, kind)(4, 6)
        for name, weight in module.named_parameters():
            y = flat(module(randn(3, 4).float()))[0]
            weight.untyped_storage().resize_(left)
            said = ending(torch.autograd.grad, y.sum(), weight, None, None, True)
            assert refused(said), (name, left, said)
            weight.untyped_storage().resize_(4 * weight.numel())

    for left in LEFT:
        assert outcome(lambda left=left: backward(left)) == "ok"  # type: ignore[misc]


@each_form
@each_cell
def test_reserve_of_forward(cell: Cell, form: str) -> None:
    def backward() -> None:
        call = make_arguments(cell.name, form)
        y: Any = call.run(_ops.layer)[0]
        y.grad_fn.saved_tensors[3].untyped_storage().resize_(0)
        y.sum().backward()

    assert refused(outcome(backward), "reserve must")


def test_gradients_that_come_in() -> None:
    def backward(which: int) -> None:
        call = make_arguments("lstm")
        outputs = call.run(_ops.layer)
        grads = [torch.ones_like(t) for t in outputs]
        grads[which].untyped_storage().resize_(8)
        torch.autograd.grad(outputs, call.leaves, grads)

    for which, name in enumerate(["grad_y", "grad_h", "grad_c"]):
        assert refused(outcome(lambda which=which: backward(which)), name)  # type: ignore[misc]


def step(of: str, mode: str) -> None:
    context: Any = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
    }.get(mode, nullcontext)

    def make() -> tuple[nn.Module, Any, dict[str, Tensor]]:
        cell = CELL_MODULES[of](4, 6)
        x = torch.randn(3, 4, requires_grad=True)
        h, c = torch.randn(3, 6), torch.randn(3, 6)
        named = {"x": x, "h": h} | ({"c": c} if SPECS[of].has_c else {})
        return cell, (h, c) if SPECS[of].has_c else h, named | dict(cell.named_parameters())

    for name in make()[2]:
        for left in LEFT:
            cell, hx, named = make()
            wanted = [named["x"], *cell.parameters()]
            freed = named[name].untyped_storage()
            if mode not in ("backward", "higher"):
                freed.resize_(left)
                with context():
                    said = ending(cell, named["x"], hx)
                assert refused(said), (name, left, said)
                continue
            loss = flat(cell(named["x"], hx))[0].square().sum()
            if mode == "higher":
                first = torch.autograd.grad(loss, wanted, create_graph=True)
                loss = torch.stack([g.square().sum() for g in first]).sum()
            freed.resize_(left)
            said = ending(torch.autograd.grad, loss, wanted)
            needless = mode == "backward" and name in ("h", "c")
            assert refused(said) or (needless and said == "ok"), (name, left, said)


@pytest.mark.parametrize("mode", ["forward", "no_grad", "autocast", "backward", "higher"])
@pytest.mark.parametrize("of", CELL_MODULES)
def test_cells(of: str, mode: str) -> None:
    assert outcome(lambda: step(of, mode)) == "ok"


def test_a_compiled_layer() -> None:
    layer = fusedrnn.FusedLSTM(4, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3, 4)

    def free(name: str) -> Callable[[], None]:
        def body() -> None:
            (x if name == "x" else getattr(layer, name)).untyped_storage().resize_(0)
            compiled(x)

        return body

    compiled(x)
    assert outcome(lambda: compiled(x)) == "ok"
    for name in ("x", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
        assert refused(outcome(free(name)), name.removesuffix("_l0"))


def test_tensors_without_elements_need_no_storage() -> None:
    layer = fusedrnn.FusedLSTM(4, 6)
    x = torch.randn(5, 0, 4)
    hx = (torch.randn(1, 0, 6), torch.randn(1, 0, 6))
    for t in (x, *hx):
        t.untyped_storage().resize_(0)
    y, _ = layer(x, hx)
    assert y.shape == (5, 0, 6)


def test_the_message_names_what_was_freed_and_its_bytes() -> None:
    layer = fusedrnn.FusedGRU(4, 6)
    layer.weight_hh_l0.untyped_storage().resize_(8)
    with pytest.raises(
        RuntimeError,
        match=r"weight_hh must have a storage of 432 bytes for \[18, 6\] in float32, got one of 8",
    ):
        layer(torch.randn(5, 3, 4))

"""torch.fx keeps layers and cell modules as single nodes.

That holds for symbolic_trace, for tracers of the user, and for FX quantization.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, get_default_qconfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from tests.kit.layers import CELLS, Cell, assert_close, flat, make_states, ragged, randn, run

CELL_CLASSES = [fusedrnn.FusedLSTMCell, fusedrnn.FusedGRUCell, fusedrnn.FusedRNNCell]


class Model(nn.Module):
    """A model that calls a layer with all its arguments, between other operations."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, dtype=torch.float64)
        self.part = nn.Sequential(layer)

    def forward(self, x: Tensor, hx: Any, lengths: Tensor) -> Any:
        y, states = self.part[0](self.embed(x), hx, lengths=lengths)
        y, states = self.part[0](self.embed(x) + y.mean(), states)
        return 2 * y, states


def calls(traced: fx.GraphModule) -> list[str]:
    """The modules that a graph calls, in order."""
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_layers(cell: Cell) -> None:
    layer, _ = cell.make(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    model = Model(layer)
    traced = fx.symbolic_trace(model)
    assert calls(traced) == ["embed", "part.0", "embed", "part.0"]
    assert traced.get_submodule("part.0") is layer
    for T, N in ((5, 2), (7, 3)):  # the traced model takes any sizes
        x, lengths = randn(T, N, 3), torch.tensor([T, *range(1, N)])
        hx = make_states(layer, N, torch.float64)
        for a, b in zip(flat(traced(x, hx, lengths)), flat(model(x, hx, lengths)), strict=True):
            assert torch.equal(a, b)
    once = fx.symbolic_trace(nn.Sequential(layer))
    x = randn(4, 2, 3)
    for name, value in run(
        once.get_submodule("0"), x, hx=make_states(layer, 2, torch.float64)
    ).items():
        assert value.isfinite().all(), name
    copy.deepcopy(once)(x)[0].sum().backward()


class Steps(nn.Module):
    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        state = self.cell(x)
        state = self.cell(torch.ones(2, 3), state)  # here only the state is a proxy
        return self.cell(x, hx=state)


@pytest.mark.parametrize("cls", CELL_CLASSES)
def test_cells(cls: Any) -> None:
    model = Steps(cls(3, 4))
    traced = fx.symbolic_trace(model)
    assert calls(traced) == ["cell"] * 3
    assert len(traced.graph.nodes) <= 6  # the trace added no nodes, such as reads of shapes
    x = torch.randn(2, 3)
    for a, b in zip(flat(traced(x)), flat(model(x)), strict=True):
        assert torch.equal(a, b)


def test_packed_sequences() -> None:
    model = nn.Sequential(fusedrnn.FusedGRU(3, 4))
    traced = fx.symbolic_trace(model)
    packed = pack_sequence(ragged([4, 2], 3, torch.float32))
    for a, b in zip(flat(traced(packed)), flat(model(packed)), strict=True):
        assert torch.equal(a, b)


def test_tracers_of_the_user() -> None:
    class Deep(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return False

    class Whole(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, (nn.RNNBase, nn.Linear))

    model = Model(fusedrnn.FusedLSTM(3, 4, dtype=torch.float64))
    for tracer, expected in ((Deep(), ["part.0"] * 2), (Whole(), ["embed", "part.0"] * 2)):
        traced = fx.GraphModule(model, tracer.trace(model))
        assert calls(traced) == expected
        x, lengths = randn(5, 2, 3), torch.tensor([5, 2])
        assert torch.equal(traced(x, None, lengths)[0], model(x, None, lengths)[0])
        # fx.Interpreter calls the layer with values, and fx.Transformer with proxies.
        assert torch.equal(
            fx.Interpreter(traced).run(x, None, lengths)[0], model(x, None, lengths)[0]
        )
        assert calls(fx.Transformer(traced).transform()) == expected


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(3, 3), rnn, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        y, _ = self.rnn(self.embed(x))
        return self.head(y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dynamic", [True, False])
def test_quantization_of_the_linear_layers_around(dynamic: bool) -> None:
    qconfig = default_dynamic_qconfig if dynamic else get_default_qconfig("x86")
    x = torch.randn(5, 2, 3)
    # One mapping is for the linear layers, the other one for all modules.
    for mapping in (
        QConfigMapping().set_object_type(nn.Linear, qconfig),
        QConfigMapping().set_global(qconfig),
    ):
        model = Tagger(fusedrnn.FusedGRU(3, 4)).eval()
        prepared = prepare_fx(copy.deepcopy(model), mapping, (x,))
        prepared(x)
        quantized = convert_fx(prepared)
        assert type(quantized.rnn) is fusedrnn.FusedGRU
        assert "quantized" in type(quantized.head).__module__
        torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0.1)


def test_weights_that_hooks_of_torch_compute() -> None:
    layer = fusedrnn.FusedLSTM(3, 4)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, "weight_hh_l0")
    prune.l1_unstructured(layer, "weight_ih_l0", 3)
    traced = fx.symbolic_trace(Tagger(layer))
    assert calls(traced) == ["embed", "rnn", "head"]
    with torch.no_grad():
        layer.weight_hh_l0_g.mul_(2)
    x = torch.randn(5, 2, 3)
    assert torch.equal(traced(x), Tagger.forward(traced, x))  # type: ignore[arg-type]


class Doubled(fusedrnn.FusedGRU):
    def forward(self, input: Any, hx: Any = None, lengths: Any = None) -> Any:
        y, _ = super().forward(input, hx, lengths)
        return 2 * y


def hooked() -> nn.Module:
    layer = fusedrnn.FusedGRU(3, 4)
    layer.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    return layer


def set_forward() -> nn.Module:
    layer = fusedrnn.FusedGRU(3, 4)
    layer.forward = lambda x: fusedrnn.FusedGRU.forward(layer, 2 * x)  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Doubled(3, 4), "Doubled must be a leaf .* has a forward of its own"),
        (set_forward, "FusedGRU must be a leaf .* has a forward of its own"),
        (hooked, "FusedGRU must be a leaf .* has hooks"),
    ],
)
def test_forwards_and_hooks_that_would_run_twice(make: Any, message: str) -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.RNNBase) or super().is_leaf_module(m, name)

    model = nn.Sequential(make())
    with pytest.raises(RuntimeError, match=message + r".*\. Trace with a torch\.fx\.Tracer whose"):
        fx.symbolic_trace(model)
    traced = fx.GraphModule(model, Leaves().trace(model))  # the message advises this
    x = torch.randn(5, 2, 3)
    for a, b in zip(flat(traced(x)), flat(model(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [*CELL_CLASSES, fusedrnn.FusedGRU, Doubled])
def test_a_layer_alone(make: Any) -> None:
    layer = make(3, 4)
    with pytest.raises(RuntimeError, match=f"{make.__name__} must be a leaf .* holds it"):
        fx.symbolic_trace(layer)
    if make is not Doubled:
        fx.symbolic_trace(nn.Sequential(layer))  # the message advises this


def test_a_layer_that_the_model_does_not_hold() -> None:
    layer = fusedrnn.FusedGRU(3, 4)
    with pytest.raises(NameError, match="not installed as a submodule"):  # as for torch.nn's layers
        fx.symbolic_trace(lambda x: layer(x))
    graph = fx.Graph()
    x = fx.Proxy(graph.placeholder("x"))
    with pytest.raises(
        AttributeError, match="input must be a Tensor or a PackedSequence, got Proxy"
    ):
        layer(x)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_traces_down_to_the_ops(mode: str) -> None:
    layer, cell = fusedrnn.FusedGRU(3, 4, dtype=torch.float64), fusedrnn.FusedGRUCell(3, 4).double()
    x = randn(5, 2, 3)

    def function(x: Tensor) -> Tensor:
        result: Tensor = layer(x)[0] + cell(x[0])
        return result

    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.fusedrnn.forward.default) == 2
    assert_close(graph(x), function(x))

"""convert, revert and to_torch: what changes, what stays, and what is refused or reported."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn
from fusedrnn._conversion import convert, revert, to_torch

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: fusedrnn.FusedLSTM,
    nn.GRU: fusedrnn.FusedGRU,
    nn.RNN: fusedrnn.FusedRNN,
    nn.LSTMCell: fusedrnn.FusedLSTMCell,
    nn.GRUCell: fusedrnn.FusedGRUCell,
    nn.RNNCell: fusedrnn.FusedRNNCell,
}

# I = 3, H = 5 everywhere.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(3, 5),
    "lstm-deep": lambda: nn.LSTM(3, 5, 2, batch_first=True, dropout=0.5, bidirectional=True),
    "lstm-projected": lambda: nn.LSTM(3, 5, 2, proj_size=2),
    "lstm-no-bias": lambda: nn.LSTM(3, 5, bias=False),
    "gru": lambda: nn.GRU(3, 5, 2, bidirectional=True),
    "rnn-tanh": lambda: nn.RNN(3, 5),
    "rnn-relu": lambda: nn.RNN(3, 5, 2, nonlinearity="relu"),
    "lstm-cell": lambda: nn.LSTMCell(3, 5),
    "gru-cell": lambda: nn.GRUCell(3, 5, bias=False),
    "rnn-cell-relu": lambda: nn.RNNCell(3, 5, nonlinearity="relu"),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    """A torch.nn layer of every kind."""
    return LAYERS[request.param]()


class Tagger(nn.Module):
    """A model with a recurrent layer in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)
        self.stack = nn.Sequential(nn.GRU(3, 5, batch_first=True))
        self.levels = nn.ModuleList([nn.LSTM(5, 5, batch_first=True), nn.Identity()])
        self.by_name = nn.ModuleDict({"deep": nn.ModuleDict({"rnn": nn.RNN(5, 4)})})
        self.cell = nn.LSTMCell(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.stack(self.embedding(ids))
        x, _ = self.levels[0](self.levels[1](x))
        _, h_n = self.by_name["deep"]["rnn"](x.transpose(0, 1))  # type: ignore[index, operator]
        h, _ = self.cell(h_n[-1])
        return self.head(h)


RECURRENT = ["stack.0", "levels.0", "by_name.deep.rnn", "cell"]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a result."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, tuple):
        return [t for v in value for t in tensors(v)]
    return [value]


def sequence_for(module: nn.Module) -> Tensor:
    """An input that any of LAYERS takes."""
    parameter = next(module.parameters())
    shape = (4, 3) if isinstance(module, nn.RNNCellBase) else (6, 4, 3)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def run(module: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of x and of all parameters, with dropout from one seed."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    module.zero_grad()
    results = tensors(module(x))
    torch.stack([y.square().sum() for y in results]).sum().backward()
    return results, [x.grad, *(p.grad.clone() for p in module.parameters())]  # type: ignore[union-attr, list-item]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def assert_flat_weights(module: nn.Module) -> None:
    """The list of weights that torch.nn's layers run on is the registered parameters."""
    if isinstance(module, nn.RNNBase):
        assert len(module._flat_weights) == len(module._flat_weights_names)
        for name, weight, reference in zip(
            module._flat_weights_names, module._flat_weights, module._flat_weight_refs, strict=True
        ):
            assert weight is getattr(module, name)
            assert reference is not None
            assert reference() is weight


def left_alone(change: Callable[[nn.Module], nn.Module], module: nn.Module) -> str:
    """Runs a conversion that must report something; returns the report."""
    with pytest.warns(UserWarning, match=r"^fusedrnn\.\w+ left ") as caught:
        assert change(module) is not None
    assert len(caught) == 1
    # The report points at the caller of the conversion.
    assert caught[0].filename == __file__
    return str(caught[0].message)


# What changes


def test_root_of_every_kind(layer: nn.Module) -> None:
    layer.double()
    plain = type(layer)
    x = sequence_for(layer)
    expected = run(layer, x)
    parameters = dict(layer.named_parameters())
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    text = layer.extra_repr()
    attributes = set(vars(layer)) - {"_flat_weights", "_flat_weight_refs"}

    assert convert(layer) is layer
    assert type(layer) is PAIRS[plain]
    assert_same(run(layer, x), expected)
    assert [*layer.named_parameters()] == [*parameters.items()]
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert_same(dict(layer.state_dict()), state)
    assert layer.extra_repr() == text
    assert attributes <= set(vars(layer))
    assert_flat_weights(layer)

    assert revert(layer) is layer
    assert type(layer) is plain
    lists = {"_flat_weights", "_flat_weight_refs"} if isinstance(layer, nn.RNNBase) else set()
    assert vars(layer).keys() == attributes | lists
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert_flat_weights(layer)
    found = run(layer, x)
    assert all(map(torch.equal, found[0] + found[1], expected[0] + expected[1]))


def test_converted_equals_constructed(layer: nn.Module) -> None:
    """A converted layer has the attributes of one that was made fused."""
    converted = convert(copy.deepcopy(layer))
    keywords = {
        k: v
        for k, v in vars(layer).items()
        if k in ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "nonlinearity")
    }
    if getattr(layer, "proj_size", 0):
        keywords["proj_size"] = layer.proj_size
    made = PAIRS[type(layer)](3, 5, **keywords)
    made.load_state_dict(layer.state_dict(), strict=True)
    assert repr(made) == repr(converted)
    assert {*vars(made)} - {"reset_after"} == {*vars(converted)}
    assert getattr(made, "reset_after", None) == getattr(converted, "reset_after", None)
    x = sequence_for(layer)
    found, expected = run(converted, x), run(made, x)
    assert all(map(torch.equal, found[0] + found[1], expected[0] + expected[1]))


def test_nested() -> None:
    model = Tagger().double()
    ids = torch.randint(11, (4, 7))
    expected = model(ids)
    before = {name: type(m) for name, m in model.named_modules()}
    objects = dict(model.named_modules())

    assert convert(model) is model
    after = {name: type(m) for name, m in model.named_modules()}
    assert {name for name in before if before[name] is not after[name]} == set(RECURRENT)
    assert all(after[name] is PAIRS[before[name]] for name in RECURRENT)
    assert dict(model.named_modules()) == objects
    assert_same(model(ids), expected)

    revert(model)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert torch.equal(model(ids), expected)


def test_packed_sequences() -> None:
    module = nn.LSTM(3, 5, 2, bidirectional=True).double()
    x = pack_sequence([torch.randn(n, 3).double() for n in (2, 5, 1, 4)], enforce_sorted=False)
    expected = tensors(module(x))
    assert_same(tensors(convert(module)(x)), expected)


def test_shared_layers_stay_shared() -> None:
    lstm = nn.LSTM(3, 3)
    model = nn.ModuleDict({"a": lstm, "b": nn.Sequential(lstm, nn.Identity()), "c": nn.LSTM(3, 3)})
    outside = [lstm]
    convert(model)
    assert model["a"] is model["b"][0] is outside[0]  # type: ignore[index]
    assert type(outside[0]) is fusedrnn.FusedLSTM
    assert model["c"] is not model["a"]
    revert(model)
    assert model["a"] is model["b"][0] is lstm  # type: ignore[index]
    assert type(lstm) is nn.LSTM


def test_shared_parameters_stay_shared() -> None:
    a, b = nn.GRU(3, 5), nn.GRU(3, 5)
    b.weight_hh_l0 = a.weight_hh_l0
    model = convert(nn.ModuleList([a, b]))
    assert a.weight_hh_l0 is b.weight_hh_l0
    assert len(list(model.parameters())) == 7
    assert_flat_weights(b)


def test_idempotent(layer: nn.Module) -> None:
    plain = type(layer)
    convert(convert(layer))
    assert type(layer) is PAIRS[plain]
    revert(revert(layer))
    assert type(layer) is plain
    assert_flat_weights(layer)


def test_nothing_to_do() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    assert convert(model) is model
    assert revert(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU]


@pytest.mark.parametrize("change", [convert, revert, to_torch])
@pytest.mark.parametrize("wrong", [None, nn.LSTM, [nn.LSTM(3, 5)], {}])
def test_not_a_module(change: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"module must be a torch\.nn\.Module, got (None|type|li|di)"
    ):
        change(wrong)


# What stays


@pytest.mark.parametrize("make_optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_optimizer_goes_on(make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    kept, changed = Tagger().double(), Tagger().double()
    changed.load_state_dict(kept.state_dict())
    parameters = list(changed.parameters())
    options = {"lr": 0.05} | ({"momentum": 0.9} if make_optimizer is torch.optim.SGD else {})
    optimizers = [make_optimizer(m.parameters(), **options) for m in (kept, changed)]
    for step in range(6):
        if step == 2:
            convert(changed)
        if step == 4:
            revert(changed)
        assert all(a is b for a, b in zip(changed.parameters(), parameters, strict=True))
        ids = torch.randint(11, (4, 7))
        for model, optimizer in zip((kept, changed), optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).logsumexp(1).sum().backward()
            optimizer.step()
    before = Tagger().double().state_dict()
    for (name, a), b in zip(kept.named_parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        assert not torch.equal(a, before[name])


def test_hooks_of_every_kind(layer: nn.Module) -> None:
    layer.double()
    seen: list[tuple[str, nn.Module]] = []

    def hook(kind: str) -> Callable[..., None]:
        return lambda module, *_: seen.append((kind, module))

    parameter = next(layer.parameters())
    handles = [
        layer.register_forward_pre_hook(hook("pre")),
        layer.register_forward_pre_hook(hook("pre-kwargs"), with_kwargs=True),
        layer.register_forward_hook(hook("post")),
        layer.register_forward_hook(hook("post-kwargs"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(hook("backward-pre")),
        layer.register_full_backward_hook(hook("backward")),
        layer.register_state_dict_pre_hook(hook("state-pre")),
        layer._register_state_dict_hook(hook("state")),
        layer.register_load_state_dict_pre_hook(hook("load-pre")),
        layer.register_load_state_dict_post_hook(hook("load")),
        parameter.register_hook(lambda _: seen.append(("gradient", layer))),
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append(("grad-set", layer))),
    ]

    def use() -> list[str]:
        seen.clear()
        run(layer, sequence_for(layer))
        layer.load_state_dict(layer.state_dict())
        assert all(module is layer for _, module in seen)
        return sorted(kind for kind, _ in seen)

    expected = use()
    assert len(set(expected)) == len(handles)
    convert(layer)
    assert use() == expected
    revert(layer)
    assert use() == expected
    convert(layer)
    for handle in handles:
        handle.remove()
    assert use() == []


def test_hook_that_changes_the_result() -> None:
    module = nn.GRU(3, 5)
    module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    module.register_forward_hook(lambda _, args, result: result[0] + 1)
    x = torch.randn(4, 2, 3)
    expected = module(x)
    torch.testing.assert_close(convert(module)(x), expected)


def test_mode_flags_buffers_and_attributes() -> None:
    module = nn.LSTM(3, 5, 2, dropout=0.9).eval()
    module.register_buffer("scale", torch.ones(2))
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    module.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    module.weight_hh_l1.requires_grad_(False)
    module.note = "mine"  # type: ignore[assignment]
    scale = module.scale
    x = torch.randn(4, 2, 3)
    expected = module(x)
    for change in (convert, revert):
        change(module)
        assert not module.training
        assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["weight_hh_l1"]
        assert module.scale is scale
        assert "scale" in module.state_dict()
        assert "scratch" not in module.state_dict()
        assert module.note == "mine"
        torch.testing.assert_close(module(x), expected)
    assert convert(nn.LSTM(3, 5)).training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, layer: nn.Module) -> None:
    layer.to(dtype)
    convert(layer)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert tensors(layer(sequence_for(layer)))[0].dtype == dtype
    # It moves to another dtype as it would have before, and so it does reverted.
    convert(layer.to(torch.float64))
    x = sequence_for(layer)
    expected = run(layer, x)
    assert_same(run(revert(layer), x), expected)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Tagger()
        convert(model)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert model(torch.zeros(4, 7, dtype=torch.int64)).shape == (4, 2)
    model.to_empty(device="cpu")
    source = Tagger()
    model.load_state_dict(source.state_dict(), strict=True)
    ids = torch.randint(11, (4, 7))
    torch.testing.assert_close(model(ids), source(ids))


@pytest.mark.parametrize("fused", [False, True], ids=["to fused", "to torch.nn"])
def test_state_dict_both_ways(fused: bool) -> None:
    source, target = Tagger(), Tagger()
    convert(target if fused else source)
    target.load_state_dict(source.state_dict(), strict=True)
    ids = torch.randint(11, (4, 7))
    torch.testing.assert_close(target(ids), source(ids))


def _torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _torch_save],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_of_a_converted_layer(
    copied: Callable[[nn.Module], nn.Module], layer: nn.Module
) -> None:
    plain = type(layer)
    convert(layer)
    x = sequence_for(layer)
    expected = run(layer, x)
    duplicate = copied(layer)
    assert type(duplicate) is PAIRS[plain]
    found = run(duplicate, x)
    assert all(map(torch.equal, found[0] + found[1], expected[0] + expected[1]))
    assert type(revert(duplicate)) is plain
    assert_flat_weights(duplicate)
    assert type(layer) is PAIRS[plain]


def test_weights_set_while_fused_are_used_after_revert() -> None:
    module = convert(nn.LSTM(3, 5))
    old = module.weight_ih_l0
    module.weight_ih_l0 = nn.Parameter(torch.randn(20, 3))
    x = torch.randn(4, 2, 3)
    expected = module(x)
    revert(module)
    assert_flat_weights(module)
    torch.testing.assert_close(module(x), expected)
    assert all(w is not old for w in module._flat_weights)


def test_data_parallel_wrapper() -> None:
    model = nn.DataParallel(Tagger())
    ids = torch.randint(11, (4, 7))
    expected = model(ids)
    assert convert(model) is model
    assert type(model.module.cell) is fusedrnn.FusedLSTMCell
    torch.testing.assert_close(model(ids), expected)


def test_weights_computed_by_hooks() -> None:
    """Pruning and the hook form of weight_norm leave the class alone, so they are converted."""
    module = nn.LSTM(3, 5).double()
    prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_ih_l0")
    x = sequence_for(module)
    expected = run(module, x)
    for change in (convert, revert, convert):
        change(module)
        assert_same(run(module, x), expected)
    with torch.no_grad():
        module.weight_ih_l0_g.mul_(2)
    doubled = run(module, x)
    assert not torch.allclose(doubled[0][0], expected[0][0])
    assert_same(run(revert(module), x), doubled)


@pytest.mark.parametrize("change", [convert, revert])
def test_compiled_before(change: Callable[[nn.Module], nn.Module]) -> None:
    """Discouraged, as a captured graph keeps what it captured; the numbers are right."""
    module = nn.GRU(3, 5)
    x = torch.randn(4, 2, 3)
    expected = module(x)
    if change is revert:
        convert(module)
    module.compile(backend="eager")
    torch.testing.assert_close(module(x), expected)
    change(module)
    torch.testing.assert_close(module(x), expected)


# What is left alone and reported


class MyLSTM(nn.LSTM):
    """A subclass."""


class MyFusedGRU(fusedrnn.FusedGRU):
    """A subclass of ours."""


class MyBase(nn.RNNBase):
    """A layer of someone else's."""

    def __init__(self) -> None:
        super().__init__("LSTM", 3, 5)


def test_subclasses_are_reported_by_name() -> None:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.LSTM(3, 5), MyLSTM(3, 5)),
            "base": MyBase(),
            "ours": MyFusedGRU(3, 5),
        }
    )
    report = left_alone(convert, model)
    assert report.startswith("fusedrnn.convert left 2 recurrent layers as they are:\n")
    assert report.splitlines()[1:] == [
        f"  encoder.1 (MyLSTM): {__name__}.MyLSTM is a subclass of torch.nn.LSTM",
        f"  base (MyBase): {__name__}.MyBase is a subclass of torch.nn.RNNBase",
    ]
    types = [type(m) for m in model.modules()]
    assert types[2:] == [fusedrnn.FusedLSTM, MyLSTM, MyBase, MyFusedGRU]

    report = left_alone(revert, model)
    assert report.splitlines() == [
        "fusedrnn.revert left 1 recurrent layer as it is:",
        f"  ours (MyFusedGRU): {__name__}.MyFusedGRU is a subclass of fusedrnn.FusedGRU",
    ]
    assert type(model["encoder"][0]) is nn.LSTM  # type: ignore[index]


def test_root_is_named() -> None:
    report = left_alone(convert, MyLSTM(3, 5))
    assert "\n  the module itself (MyLSTM): " in report


def test_left_alone_in_several_places_is_reported_once() -> None:
    shared = MyLSTM(3, 3)
    report = left_alone(convert, nn.Sequential(shared, shared))
    assert report.count("MyLSTM)") == 1


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRUCell, fusedrnn.FusedGRU])
def test_parametrized(make: Callable[[int, int], nn.Module]) -> None:
    change = revert if make is fusedrnn.FusedGRU else convert
    plain = make(3, 5)
    x = sequence_for(plain)
    name = next(n for n, _ in plain.named_parameters() if n.startswith("weight_hh"))
    parametrizations.weight_norm(plain, name)
    expected = tensors(plain(x))
    model = nn.Sequential(plain)
    report = left_alone(change, model)
    assert f"\n  0 (Parametrized{make.__name__}): parametrized" in report
    assert all(map(torch.equal, tensors(plain(x)), expected))
    # And when it is no longer parametrized, it changes like any other.
    nn.utils.parametrize.remove_parametrizations(plain, name)
    change(model)
    assert type(plain) is (nn.GRU if change is revert else PAIRS[make])  # type: ignore[index]
    torch.testing.assert_close(tensors(plain(x)), expected)


def test_own_forward() -> None:
    for make, change in ((nn.LSTM, convert), (fusedrnn.FusedLSTM, revert)):
        module = make(3, 5)
        module.forward = lambda *_: "mine"  # type: ignore[method-assign]
        report = left_alone(change, module)
        assert "its forward is not its class's" in report
        assert type(module) is make
        assert module(None) == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript() -> None:
    x = torch.randn(4, 2, 3)
    for capture in (torch.jit.script, lambda m: torch.jit.trace(m, (x,))):
        model = nn.Sequential(capture(nn.Sequential(nn.LSTM(3, 5))), nn.Identity())
        expected = tensors(model(x))
        report = left_alone(convert, model)
        assert report.splitlines()[1].startswith("  0.0 (")
        assert "compiled by TorchScript" in report
        torch.testing.assert_close(tensors(model(x)), expected)


def test_no_kernels_for_the_dtype() -> None:
    report = left_alone(convert, nn.Sequential(nn.LSTM(3, 5), nn.GRU(3, 5, dtype=torch.complex64)))
    assert report.splitlines()[1:] == [
        "  1 (GRU): there are no kernels for torch.complex64 on cpu",
    ]


def _quantize(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(
        module, {nn.LSTM, nn.GRU, nn.LSTMCell}, dtype=torch.qint8
    )


# torch.ao itself is deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantization() -> None:
    model = Tagger()
    ids = torch.randint(11, (4, 7))
    expected = _quantize(model)(ids)
    types = [type(m) for m in _quantize(model).modules()]
    quantized = _quantize(to_torch(convert(model)))
    assert torch.equal(quantized(ids), expected)
    assert type(model.cell) is fusedrnn.FusedLSTMCell
    quantized = _quantize(revert(model))
    assert torch.equal(quantized(ids), expected)
    assert [type(m) for m in quantized.modules()] == types

    # nn.RNN was not quantized: it changes, the others are reported.
    report = left_alone(convert, quantized)
    assert "fusedrnn.convert left 3 recurrent layers" in report
    for name, kind in (("stack.0", "GRU"), ("levels.0", "LSTM"), ("cell", "LSTMCell")):
        assert f"\n  {name} ({kind}): quantized" in report
    assert type(quantized.by_name["deep"]["rnn"]) is fusedrnn.FusedRNN  # type: ignore[index]
    torch.testing.assert_close(quantized(ids), expected)


# What cannot go back


@pytest.mark.parametrize("change", [revert, to_torch])
def test_reset_before_has_no_way_back(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.ModuleDict(
        {
            "fine": fusedrnn.FusedLSTM(3, 5),
            "deep": nn.Sequential(fusedrnn.FusedGRU(3, 5, reset_after=False)),
            "cell": fusedrnn.FusedGRUCell(3, 5, reset_after=False),
            "after": fusedrnn.FusedGRU(3, 5),
        }
    )
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="reset_after must be True") as caught:
        change(model)
    assert "deep.0 (FusedGRU), cell (FusedGRUCell)" in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    assert [type(m) for m in model.modules()] == types
    with pytest.raises(ValueError, match="False in the module itself"):
        change(model["cell"])
    # Converting leaves it as it is: it is fused already.
    convert(model)
    assert model["cell"].reset_after is False


# to_torch


def test_to_torch_shares_parameters(layer: nn.Module) -> None:
    plain = type(layer)
    layer.double()
    layer.register_buffer("extra", torch.ones(1))
    calls: list[nn.Module] = []
    layer.register_forward_hook(lambda module, *_: calls.append(module))
    convert(layer.eval())
    duplicate = to_torch(layer)
    assert type(layer) is PAIRS[plain]
    assert type(duplicate) is plain
    assert_flat_weights(duplicate)
    assert not duplicate.training
    for ours, theirs in (
        (layer.named_parameters(), duplicate.named_parameters()),
        (layer.named_buffers(), duplicate.named_buffers()),
    ):
        for (name, a), (other, b) in zip(ours, theirs, strict=True):
            assert name == other
            assert a is b
    x = sequence_for(layer)
    assert_same(run(duplicate, x), run(layer, x))
    assert calls == [duplicate, layer]
    with torch.no_grad():
        next(layer.parameters()).mul_(2)
    assert_same(run(duplicate, x), run(layer, x))
    # What is set on one is not set on the other.
    duplicate.train()
    assert not layer.training


def test_to_torch_of_a_model() -> None:
    model = convert(Tagger().double())
    model.tied = model.cell
    types = [type(m) for m in model.modules()]
    duplicate = to_torch(model)
    assert [type(m) for m in model.modules()] == types
    assert duplicate.tied is duplicate.cell
    assert type(duplicate.cell) is nn.LSTMCell
    assert not {id(m) for m in model.modules()} & {id(m) for m in duplicate.modules()}
    assert list(map(id, model.parameters())) == list(map(id, duplicate.parameters()))
    ids = torch.randint(11, (4, 7))
    assert_same(duplicate(ids), model(ids))


def test_to_torch_with_computed_weights() -> None:
    """Weights that a hook computes are no leaves, and cannot be copied."""
    module = convert(nn.LSTM(3, 5))
    prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
    x = sequence_for(module)
    expected = run(module, x)
    duplicate = to_torch(module)
    assert type(duplicate) is nn.LSTM
    torch.testing.assert_close(run(duplicate, x), expected)


def test_to_torch_reports() -> None:
    report = left_alone(to_torch, nn.Sequential(MyFusedGRU(3, 5), fusedrnn.FusedLSTM(3, 5)))
    assert report.startswith("fusedrnn.to_torch left 1 recurrent layer as it is:\n  0 (MyFusedGRU)")

"""convert, revert and to_torch: what changes and what stays."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn._conversion import convert, revert, to_torch
from tests.kit.conversion import (
    LAYERS,
    PAIRS,
    RECURRENT,
    Tagger,
    assert_flat_weights,
    assert_same,
    run,
    sequence_for,
    tensors,
)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    """A torch.nn layer of every kind."""
    return LAYERS[request.param]()


# --- What changes --------------------------------------------------------------------------------


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
    """A converted layer has the same attributes as a fused layer that was built directly."""
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
    assert {*vars(made)} - {"reset_after", "peephole"} == {*vars(converted)}
    for option in ("reset_after", "peephole"):
        assert getattr(made, option, None) == getattr(converted, option, None)
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


# --- What stays ----------------------------------------------------------------------------------


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
    # A converted layer can be moved to another dtype, and still be reverted.
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
    """Layers with pruning or the hook form of weight_norm are converted: they keep their class."""
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
    """The results stay right if a layer is compiled first and converted or reverted then.

    This order is discouraged, because the captured graph still runs the old layer.
    """
    module = nn.GRU(3, 5)
    x = torch.randn(4, 2, 3)
    expected = module(x)
    if change is revert:
        convert(module)
    module.compile(backend="eager")
    torch.testing.assert_close(module(x), expected)
    change(module)
    torch.testing.assert_close(module(x), expected)


# --- to_torch ------------------------------------------------------------------------------------


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
    # An attribute that is set on one is not set on the other.
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
    """Weights that a hook computes are no leaf tensors, which deepcopy refuses."""
    module = convert(nn.LSTM(3, 5))
    prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
    x = sequence_for(module)
    expected = run(module, x)
    duplicate = to_torch(module)
    assert type(duplicate) is nn.LSTM
    torch.testing.assert_close(run(duplicate, x), expected)

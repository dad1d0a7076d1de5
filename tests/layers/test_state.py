"""Uses of parameters: state_dict, copies, pruning, parametrizations, sharing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

import fusedrnn
from tests.kit.layers import (
    BY_NAME,
    CELLS,
    TORCH_CELLS,
    Cell,
    assert_close,
    assert_same,
    device_of,
    flat,
    randn,
    run,
)

f64 = torch.float64
GRID = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "bidirectional": True},
    {"num_layers": 3, "batch_first": True, "dropout": 0.25},
]


def types(cell: Cell) -> tuple[Any, Any, dict[str, Any]]:
    return cell.ours, cell.theirs, dict(cell.options) | ({"proj_size": 2} if cell.projects else {})


@pytest.mark.parametrize("options", GRID, ids=str)
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_same_parameters_from_the_same_seed(cell: Cell, options: dict[str, Any]) -> None:
    ours_type, theirs_type, fixed = types(cell)
    torch.manual_seed(11)
    ours = ours_type(3, 5, **fixed, **options)
    torch.manual_seed(11)
    theirs = theirs_type(3, 5, **fixed, **options)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(12)
    ours.reset_parameters()
    torch.manual_seed(12)
    theirs.reset_parameters()
    for a, b in zip(ours.all_weights, theirs.all_weights, strict=True):
        for v, w in zip(a, b, strict=True):
            assert torch.equal(v, w)
    assert ours._all_weights == theirs._all_weights
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert all(v is w for v, w in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert len(ours._flat_weight_refs) == len(theirs._flat_weight_refs)
    assert repr(ours) == repr(theirs).replace(theirs_type.__name__, ours_type.__name__)
    for name in theirs.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert isinstance(ours, nn.RNNBase)
    assert not isinstance(ours, (nn.LSTM, nn.GRU, nn.RNN))
    ours.flatten_parameters()


@pytest.mark.parametrize("options", GRID, ids=str)
@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_state_dict_both_ways(device: torch.device, cell: Cell, options: dict[str, Any]) -> None:
    ours_type, theirs_type, fixed = types(cell)
    ours = ours_type(3, 5, device=device, **fixed, **options)
    theirs = theirs_type(3, 5, **fixed, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(4, 4, 3)
    ours.eval(), theirs.eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x.to(device))[0].cpu(), theirs(x)[0])
    torch.manual_seed(5)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(x.to(device))[0].cpu(), theirs(x)[0])
    ours.load_state_dict({k: v.clone() for k, v in ours.state_dict().items()}, assign=True)
    torch.testing.assert_close(ours(x.to(device))[0].cpu(), theirs(x)[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({}, strict=True)


def test_signatures_equal_those_of_torch_nn() -> None:
    """Each argument equals the overload that torch.nn documents. Ours only adds keywords."""
    common = ["input_size", "hidden_size", "num_layers"]
    rest = ["bias", "batch_first", "dropout", "bidirectional"]
    expected = {
        fusedrnn.FusedLSTM: [*common, *rest, "proj_size", "device", "dtype"],
        fusedrnn.FusedGRU: [*common, *rest, "device", "dtype"],
        fusedrnn.FusedRNN: [*common, "nonlinearity", *rest, "device", "dtype"],
        fusedrnn.FusedLSTMCell: ["input_size", "hidden_size", "bias", "device", "dtype"],
        fusedrnn.FusedGRUCell: ["input_size", "hidden_size", "bias", "device", "dtype"],
        fusedrnn.FusedRNNCell: [
            *("input_size", "hidden_size", "bias", "nonlinearity", "device", "dtype")
        ],
    }
    for kind, names in expected.items():
        parameters = inspect.signature(kind).parameters.values()
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == names
        theirs = inspect.signature(getattr(nn, kind.__name__.removeprefix("Fused"))).parameters
        for p in positional:
            if p.name in theirs:
                assert p.default == theirs[p.name].default
    m = fusedrnn.FusedRNN(3, 5, 2, "relu", False, True, 0.5, True, "cpu", f64)
    n = nn.RNN(3, 5, 2, "relu", False, True, 0.5, True, device="cpu", dtype=f64)
    assert repr(m).removeprefix("Fused") == repr(n)
    assert m.nonlinearity == n.nonlinearity
    assert m.mode == n.mode


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_copies(device: torch.device, cell: Cell) -> None:
    ours, _ = cell.make(3, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x = randn(4, 2, 3, device=device)
    expected = run(ours, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        actual = run(other, x)
        assert all(torch.equal(actual[k], expected[k]) for k in expected)
        assert all(v is w for v, w in zip(other._flat_weights, other.parameters(), strict=True))
    # A deep copy shares nothing with the original.
    with torch.no_grad():
        copies[0].weight_hh_l0.zero_()
    assert torch.equal(run(ours, x)["y"], expected["y"])
    assert not torch.equal(run(copies[0], x)["y"], expected["y"])


@pytest.mark.parametrize("cell", TORCH_CELLS, ids=str)
def test_copies_of_a_converted_layer(cell: Cell) -> None:
    _, theirs = cell.make(3, 5, num_layers=2, bidirectional=True, dtype=f64)
    ours = fusedrnn.convert(theirs)
    x = randn(4, 2, 3)
    expected = run(ours, x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is cell.ours
        actual = run(other, x)
        assert all(torch.equal(actual[k], expected[k]) for k in expected)
    assert not {"_flat_weights", "_flat_weight_refs"} & set(vars(ours))


def test_old_checkpoints() -> None:
    """Reads pickles that are older than proj_size or the lists of names, as torch.nn.LSTM does."""
    ours = fusedrnn.FusedLSTM(3, 5, 2, bidirectional=True)
    state = ours.__getstate__()
    del state["proj_size"]
    state["_all_weights"] = [list(ours.parameters())]
    state["all_weights"] = state.pop("_all_weights")
    old = fusedrnn.FusedLSTM.__new__(fusedrnn.FusedLSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    assert old._all_weights == ours._all_weights
    x = torch.randn(4, 2, 3)
    assert torch.equal(old(x)[0], ours(x)[0])


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_conversion_of_dtype(device: torch.device, cell: Cell, swap: bool) -> None:
    ours, theirs = cell.make(3, 5, device=device, num_layers=2)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        ours.double(), theirs.double()
        x = randn(4, 2, 3)
        assert_same(run(ours, x), run(theirs, x))
        ours.to(torch.bfloat16)
        assert ours(x.to(device, torch.bfloat16))[0].dtype == torch.bfloat16
        ours.load_state_dict(theirs.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert {w.dtype for w in ours._flat_weights} == {torch.bfloat16}


def test_swapped_tensors(device: torch.device) -> None:
    ours, _ = BY_NAME["gru"].make(3, 5, device=device, dtype=f64)
    other = fusedrnn.FusedGRU(3, 5, dtype=f64, device=device)
    x = randn(4, 2, 3, device=device)
    with torch.no_grad():
        expected = other(x)[0]
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(a, b)
    assert torch.equal(ours(x)[0], expected)


def changed(device: torch.device, cell: Cell, change: Any) -> None:
    """Changes both modules in the same way, and compares outputs and all gradients."""
    ours, theirs = cell.make(3, 6, device=device, num_layers=2, bidirectional=True, dtype=f64)
    for module in (ours, theirs):
        torch.manual_seed(4)
        change(module)
    x = randn(4, 2, 3)
    for _ in range(2):  # some changes have an effect at every call
        assert_same(run(ours, x), run(theirs, x))
    ours.eval(), theirs.eval()
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_weight_norm(device: torch.device, cell: Cell) -> None:
    changed(device, cell, lambda m: parametrizations.weight_norm(m, "weight_hh_l0"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_spectral_norm(device: torch.device, cell: Cell) -> None:
    """In eval mode results equal torch.nn's. In training a call takes one step of the iteration.

    torch.nn.LSTM reads its weights several times in a call, and takes a step each time.
    """
    ours, theirs = cell.make(3, 6, device=device, num_layers=2, bidirectional=True, dtype=f64)
    for module in (ours, theirs):
        parametrizations.spectral_norm(module, "weight_hh_l1_reverse")
    plain = copy.deepcopy(ours)
    x = randn(4, 2, 3)
    run(ours, x)
    plain.weight_hh_l1_reverse  # noqa: B018 (reading it takes the step)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    ours.eval(), theirs.eval()
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("cell", [BY_NAME["lstm"], BY_NAME["gru"]], ids=str)
def test_old_weight_norm(device: torch.device, cell: Cell) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        changed(device, cell, lambda m: nn.utils.weight_norm(m, "weight_ih_l1"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_parametrization_and_its_removal(device: torch.device, cell: Cell) -> None:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    def change(module: nn.Module) -> None:
        nn.utils.parametrize.register_parametrization(module, "weight_ih_l0", Half())
        nn.utils.parametrize.register_parametrization(module, "bias_hh_l1", Half())
        nn.utils.parametrize.remove_parametrizations(module, "bias_hh_l1")

    changed(device, cell, change)
    ours, _ = cell.make(3, 6, device=device, dtype=f64)
    change_one = nn.utils.parametrize.register_parametrization
    change_one(ours, "weight_ih_l0", Half())
    again = copy.deepcopy(ours)
    x = randn(4, 2, 3, device=device)
    assert torch.equal(again(x)[0], ours(x)[0])


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_pruning(device: torch.device, cell: Cell) -> None:
    changed(device, cell, lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.4))
    changed(device, cell, lambda m: prune.random_structured(m, "weight_ih_l1", 0.5, dim=0))

    def permanent(module: nn.Module) -> None:
        prune.l1_unstructured(module, "weight_hh_l0", 0.4)
        prune.remove(module, "weight_hh_l0")

    changed(device, cell, permanent)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_new_parameters_and_plain_tensors(device: torch.device, cell: Cell) -> None:
    def new_parameter(module: Any) -> None:
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)

    changed(device, cell, new_parameter)
    ours, theirs = cell.make(3, 6, device=device, dtype=f64)
    x = randn(4, 2, 3)
    scale = torch.tensor(0.5, dtype=f64, requires_grad=True)
    gradients = []
    for module in (ours, theirs):
        where = device_of(module)
        raw = module.weight_ih_l0
        del module.weight_ih_l0
        module.weight_ih_l0 = raw * scale.to(where)  # a computed weight, as weight drop does
        gradients.append(torch.autograd.grad(module(x.to(where))[0].sin().sum(), (raw, scale)))
    for got, wanted in zip(*gradients, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_writes_to_data_are_seen(cell: Cell) -> None:
    """No values are kept between calls that a write unseen by autograd could make stale."""
    ours, theirs = cell.make(3, 6, dtype=f64)
    x = randn(4, 2, 3)
    for module in (ours, theirs):
        module(x)
        module.weight_hh_l0.data.mul_(2)
        module.bias_ih_l0.detach().numpy()[:] += 1
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_shared_weights(device: torch.device, cell: Cell) -> None:
    def share(module: Any) -> None:
        module.weight_hh_l1 = module.weight_hh_l0
        module.bias_ih_l0_reverse = module.bias_ih_l0

    changed(device, cell, share)
    first, theirs_first = cell.make(3, 6, device=device, dtype=f64)
    second, theirs_second = cell.make(3, 6, device=device, dtype=f64)
    x = randn(4, 2, 3)
    gradients = []
    for a, b in ((first, second), (theirs_first, theirs_second)):
        b.weight_hh_l0 = a.weight_hh_l0
        where = device_of(a)
        loss = a(x.to(where))[0].sin().sum() + b(x.to(where))[0].cos().sum()
        gradients.append(torch.autograd.grad(loss, a.weight_hh_l0)[0])
    theirs_second.load_state_dict(second.state_dict())
    assert gradients[0].isfinite().all()
    reference = torch.autograd.grad(
        theirs_first(x)[0].sin().sum() + theirs_second(x)[0].cos().sum(),
        [theirs_first.weight_hh_l0],
    )[0]
    assert_close(gradients[0], reference)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_functional_call(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(3, 6, device=device, num_layers=2, dtype=f64)
    x = randn(4, 2, 3)
    before = ours(x.to(device))[0]
    results = []
    for module in (ours, theirs):
        new = {k: (v.detach() * 0.7).requires_grad_() for k, v in module.named_parameters()}
        y = functional_call(module, new, (x.to(device_of(module)),))[0]
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(new.values()))])
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted)
    assert torch.equal(ours(x.to(device))[0], before)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_replica_for_data_parallel(device: torch.device, cell: Cell) -> None:
    ours, _ = cell.make(3, 6, device=device, dtype=f64)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p.detach() * 1.0)  # as torch.nn.parallel.replicate does
    x = randn(4, 2, 3, device=device)
    assert torch.equal(replica(x)[0], ours(x)[0].detach())


def test_an_optimizer_trains_it(device: torch.device) -> None:
    """The losses of 20 steps of Adam equal those of torch.nn."""
    kind = {"num_layers": 2, "bidirectional": True, "dtype": f64}
    ours, theirs = BY_NAME["lstm"].make(3, 8, device=device, **kind)
    x, target = randn(6, 5, 3), randn(6, 5, 16)
    losses = []
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        values = []
        for _ in range(20):
            optimizer.zero_grad()
            where = device_of(module)
            loss = (module(x.to(where))[0] - target.to(where)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            values.append(loss.item())
        losses.append(values)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][-1] < losses[0][0]


def test_hooks_run(device: torch.device) -> None:
    ours = fusedrnn.FusedGRU(3, 5, device=device)
    calls = []
    ours.register_forward_pre_hook(lambda m, args: calls.append("before"))
    ours.register_forward_hook(lambda m, args, out: calls.append(flat(out)[0].shape))
    ours(torch.randn(4, 2, 3, device=device))
    assert calls == ["before", (4, 2, 5)]


def test_reset_after_is_kept() -> None:
    ours = fusedrnn.FusedGRU(3, 5, reset_after=False)
    assert repr(ours) == "FusedGRU(3, 5, reset_after=False)"
    assert not copy.deepcopy(ours).reset_after
    assert repr(fusedrnn.FusedGRU(3, 5)) == "FusedGRU(3, 5)"
    x = torch.randn(4, 2, 3)
    other = fusedrnn.FusedGRU(3, 5)
    other.load_state_dict(ours.state_dict())
    assert not torch.allclose(ours(x)[0], other(x)[0], atol=1e-4)
    assert torch.equal(ours(x)[0], pickle.loads(pickle.dumps(ours))(x)[0])

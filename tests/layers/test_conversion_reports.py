"""convert, revert and to_torch: the layers that they leave as they are and report, or refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fusedrnn
from fusedrnn._conversion import convert, revert, to_torch
from tests.kit.conversion import (
    PAIRS,
    Tagger,
    sequence_for,
    tensors,
)


def left_alone(change: Callable[[nn.Module], nn.Module], module: nn.Module) -> str:
    """Runs a conversion that must warn of layers that it left alone; returns the warning."""
    with pytest.warns(UserWarning, match=r"^fusedrnn\.\w+ left ") as caught:
        assert change(module) is not None
    assert len(caught) == 1
    # The warning names the line that called the conversion.
    assert caught[0].filename == __file__
    return str(caught[0].message)


class MyLSTM(nn.LSTM):
    """A subclass of torch.nn.LSTM."""


class MyFusedGRU(fusedrnn.FusedGRU):
    """A subclass of FusedGRU."""


class MyBase(nn.RNNBase):
    """A user's layer, derived from torch.nn.RNNBase."""

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
    # Once it is no longer parametrized, it is converted like any other layer.
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


# torch.ao is deprecated, and warns of it.
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

    # nn.RNN was not quantized, so it is converted. The other layers are reported.
    report = left_alone(convert, quantized)
    assert "fusedrnn.convert left 3 recurrent layers" in report
    for name, kind in (("stack.0", "GRU"), ("levels.0", "LSTM"), ("cell", "LSTMCell")):
        assert f"\n  {name} ({kind}): quantized" in report
    assert type(quantized.by_name["deep"]["rnn"]) is fusedrnn.FusedRNN  # type: ignore[index]
    torch.testing.assert_close(quantized(ids), expected)


# --- Layers that torch.nn cannot represent -------------------------------------------------------


@pytest.mark.parametrize("change", [revert, to_torch])
def test_reset_before_cannot_be_reverted(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.ModuleDict(
        {
            "fine": fusedrnn.FusedLSTM(3, 5),
            "deep": nn.Sequential(fusedrnn.FusedGRU(3, 5, reset_after=False)),
            "cell": fusedrnn.FusedGRUCell(3, 5, reset_after=False),
            "after": fusedrnn.FusedGRU(3, 5),
        }
    )
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="cannot compute") as caught:
        change(model)
    named = "deep.0 (FusedGRU with reset_after=False), cell (FusedGRUCell with reset_after=False)"
    assert named in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    assert [type(m) for m in model.modules()] == types
    with pytest.raises(ValueError, match=r"the module itself \(FusedGRUCell with"):
        change(model["cell"])
    # convert() leaves it as it is, because it is a fused layer already.
    convert(model)
    assert model["cell"].reset_after is False


def test_to_torch_reports() -> None:
    report = left_alone(to_torch, nn.Sequential(MyFusedGRU(3, 5), fusedrnn.FusedLSTM(3, 5)))
    assert report.startswith("fusedrnn.to_torch left 1 recurrent layer as it is:\n  0 (MyFusedGRU)")

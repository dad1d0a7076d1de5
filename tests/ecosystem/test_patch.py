"""patch_torch: the names that its block replaces and restores, and the limits in its docstring."""

from __future__ import annotations

import asyncio
import copy
import importlib
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import patch_torch

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
MODULES = (nn, nn.modules, nn.modules.rnn)
PLAIN = {name: getattr(nn, name) for name in NAMES}
FUSED = {name: getattr(fusedrnn, f"Fused{name}") for name in NAMES}


def found() -> list[Any]:
    """The classes that all the names refer to now."""
    return [getattr(module, name) for module in MODULES for name in NAMES]


PLAIN_EVERYWHERE = [*PLAIN.values()] * len(MODULES)
FUSED_EVERYWHERE = [*FUSED.values()] * len(MODULES)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    assert found() == PLAIN_EVERYWHERE
    yield
    assert found() == PLAIN_EVERYWHERE


class Model(nn.Module):
    """A model of torch.nn, which does not mention fusedrnn."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(x)
        h: torch.Tensor = self.cell(y[:, -1])
        return h


def model(seed: int = 3) -> Model:
    torch.manual_seed(seed)
    return Model().double()


def test_a_block() -> None:
    with patch_torch() as nothing:
        assert nothing is None
        assert found() == FUSED_EVERYWHERE
        fused = model()
    plain = model()
    assert type(fused.lstm) is fusedrnn.FusedLSTM
    assert type(fused.cell) is fusedrnn.FusedGRUCell
    assert type(plain.lstm) is nn.LSTM
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_its_layer(name: str) -> None:
    with patch_torch():
        layer = getattr(nn, name)(3, 4)
        assert isinstance(layer, getattr(nn, name))
        assert not isinstance(PLAIN[name](3, 4), getattr(nn, name))
        assert torch.nn.modules.rnn.__dict__[name] is type(layer)
    assert type(layer) is FUSED[name]
    assert not isinstance(layer, getattr(nn, name))
    assert isinstance(layer, nn.RNNCellBase if name.endswith("Cell") else nn.RNNBase)


def test_an_exception_ends_the_block() -> None:
    with pytest.raises(ZeroDivisionError), patch_torch(), patch_torch():
        raise ZeroDivisionError
    assert found() == PLAIN_EVERYWHERE


def test_nested_blocks() -> None:
    block = patch_torch()
    with block:
        with patch_torch(), block:
            assert found() == FUSED_EVERYWHERE
        assert found() == FUSED_EVERYWHERE
    assert found() == PLAIN_EVERYWHERE


def test_a_class_of_another_patch_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("LSTM", (nn.LSTM,), {})
    monkeypatch.setattr(nn, "LSTM", other)
    with patch_torch():
        assert nn.LSTM is fusedrnn.FusedLSTM
    assert nn.LSTM is other
    monkeypatch.undo()


def test_decorator() -> None:
    @patch_torch()
    def program(size: int, fail: bool = False) -> Any:
        """Builds."""
        assert found() == FUSED_EVERYWHERE
        if fail:
            raise KeyError
        return program(size - 1) if size > 3 else nn.GRU(size, 4)

    assert found() == PLAIN_EVERYWHERE
    assert type(program(5)) is fusedrnn.FusedGRU
    assert found() == PLAIN_EVERYWHERE
    with pytest.raises(KeyError):
        program(3, fail=True)
    assert program.__name__ == "program"
    assert program.__doc__ == "Builds."


def test_decorator_refuses_generators_coroutines_and_classes() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None:
        await asyncio.sleep(0)

    async def both() -> Any:
        yield 1

    for kind, function in {
        "generator": generator,
        "coroutine": coroutine,
        "asynchronous generator": both,
        "class": Model,
    }.items():
        with pytest.raises(TypeError, match=f"got the {kind} .*{function.__qualname__}"):
            patch_torch()(function)
    with pytest.raises(TypeError, match="takes no arguments"):
        patch_torch(generator)  # type: ignore[call-arg]


def test_names_stay_replaced_until_the_last_block_of_all_threads_ends() -> None:
    """Blocks of two threads overlap; the block that begins first also ends first."""
    first_is_open, second_is_open, first_ended = (threading.Event() for _ in range(3))
    seen: list[Any] = []

    def first() -> None:
        with patch_torch():
            first_is_open.set()
            assert second_is_open.wait(30)
        seen.append(found() == FUSED_EVERYWHERE)
        first_ended.set()

    def second() -> None:
        assert first_is_open.wait(30)
        with patch_torch():
            second_is_open.set()
            assert first_ended.wait(30)
            seen.append(type(nn.LSTM(3, 4)) is fusedrnn.FusedLSTM)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [True, True]


def test_names_that_a_module_imported_are_not_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    """`from torch.nn import LSTM` binds the class once.

    A module that is imported before a block keeps torch.nn's class; one that is imported in a block
    keeps the fused class after it.
    """
    for name in ("early", "late"):
        (tmp_path / f"taken_{name}.py").write_text(
            "from torch.nn import LSTM\nTABLE = {'lstm': LSTM}\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    early = importlib.import_module("taken_early")
    with patch_torch():
        late = importlib.import_module("taken_late")
        assert type(early.LSTM(3, 4)) is PLAIN["LSTM"]
        assert fusedrnn.convert(early.TABLE["lstm"](3, 4)).__class__ is fusedrnn.FusedLSTM
    assert late.TABLE["lstm"] is fusedrnn.FusedLSTM
    del sys.modules["taken_early"], sys.modules["taken_late"]


def test_classes_derived_in_a_block() -> None:
    with patch_torch():

        class Last(nn.LSTM):
            """Overrides forward, and uses the base class and its weights, as users' classes do."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.forget = nn.Parameter(torch.ones(1))
                for name, p in self.named_parameters():
                    if name.startswith("bias"):
                        nn.init.zeros_(p)

            def forward(self, input: Any, hx: Any = None) -> Any:
                y, _ = super().forward(input, hx)
                assert len(self._flat_weights) == 4
                return y[-1] * self.forget

        layer = Last(3, 4)
    assert isinstance(layer, fusedrnn.FusedLSTM)
    assert layer(torch.randn(5, 2, 3)).shape == (2, 4)
    with pytest.warns(UserWarning, match=r"Last is a subclass of fusedrnn\.FusedLSTM"):
        assert fusedrnn.revert(layer) is layer


class Own(nn.LSTM):
    pass


def test_classes_derived_before_a_block_still_derive_from_torch_nn() -> None:
    with patch_torch():
        layer = Own(3, 4)
    assert isinstance(layer, nn.LSTM)
    assert layer(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_pickles(name: str) -> None:
    plain = PLAIN[name](3, 4).double()
    stored = pickle.dumps(plain)
    x = torch.randn(2, 3, dtype=torch.float64)

    def y(layer: Any) -> torch.Tensor:
        result = layer(x)
        return result if isinstance(result, torch.Tensor) else result[0]

    with patch_torch():
        fused = pickle.loads(stored)
        again = pickle.dumps(fused)
        assert type(copy.deepcopy(plain)) is PLAIN[name]
        with pytest.raises(pickle.PicklingError, match=f"not the same object as .*{name}"):
            pickle.dumps(plain)
    assert type(fused) is FUSED[name]
    assert type(pickle.loads(again)) is FUSED[name]
    assert type(pickle.loads(stored)) is PLAIN[name]
    torch.testing.assert_close(y(fused), y(plain), rtol=1e-12, atol=1e-12)


def test_conversion_in_a_block() -> None:
    plain = nn.GRU(3, 4)
    with patch_torch():
        assert type(fusedrnn.convert(plain)) is fusedrnn.FusedGRU
        assert type(fusedrnn.revert(plain)) is PLAIN["GRU"]


# Dynamo raises this warning itself when it continues after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile() -> None:
    """Dynamo looks the names up when it compiles, so in a block it takes ours for torch.nn's."""
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    try:
        with patch_torch():
            fused = model()
            expected = fused(x)
            compiled = torch.compile(fused, backend="eager", fullgraph=True)
            with pytest.raises(Exception, match=r"config\.allow_rnn=True"):
                compiled(x)
            torch._dynamo.reset()
            with torch._dynamo.config.patch(allow_rnn=True):
                assert torch.equal(compiled(x), expected)
            torch._dynamo.reset()
            assert torch.equal(torch.compile(fused, backend="eager")(x), expected)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(fused, backend="eager", fullgraph=True)(x), expected)
    finally:
        torch._dynamo.reset()


def test_export_in_a_block() -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    with patch_torch():
        fused = model()
        exported = torch.export.export(fused, (x,)).module()
    torch.testing.assert_close(exported(x), fused(x))


@pytest.mark.filterwarnings("ignore:torch.(ao.quantization|quantize_per_tensor).* deprecated")
def test_quantization() -> None:
    """quantize_dynamic looks the names up as well.

    In a block it therefore quantizes no layer. After the block it quantizes torch.nn's layers and
    those that to_torch returns.
    """
    quantize = torch.ao.quantization.quantize_dynamic
    plain = nn.Sequential(nn.LSTM(3, 4))
    with patch_torch():
        fused = nn.Sequential(nn.LSTM(3, 4))
        assert type(quantize(fused)[0]) is fusedrnn.FusedLSTM
        assert type(quantize(plain)[0]) is PLAIN["LSTM"]
    for model in (plain, fusedrnn.to_torch(fused)):
        assert type(quantize(model)[0]) is torch.ao.nn.quantized.dynamic.LSTM


def test_a_whole_script(tmp_path: Path) -> None:
    """The command of docs/third-party.md runs a script, with its imports, in a block."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom torch.nn import LSTM\nprint(__name__, sys.argv[1:], LSTM(3, 4))\n"
    )
    page = (Path(fusedrnn.__file__).parents[1] / "docs/third-party.md").read_text()
    (program,) = re.findall(r'^    python -c "(.*?)" script\.py', page, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent("    " + program), script, "--its", "options"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(fusedrnn.__file__).parents[1],
    )
    assert done.stdout == "__main__ ['--its', 'options'] FusedLSTM(3, 4)\n"

"""Libraries that build torch.nn.LSTM themselves train the same in a block of patch_torch()."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from tests.examples import programs


@pytest.mark.parametrize(("program", "package"), [("ppo", "sb3_contrib"), ("deepar", "gluonts")])
def test_same_losses_in_the_block(program: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: see docs/third-party.md")
    done = programs.run("third_party", "--short", program, folder=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Each kind ran its own layers, and the losses of both were compared.
    assert re.search(rf"^{program}: torch\.nn +LSTM\(", done.stdout, re.MULTILINE)
    assert re.search(rf"^{program}: fusedrnn +FusedLSTM\(", done.stdout, re.MULTILINE)
    assert re.search(r"^  ok +first [35] losses differ by at most", done.stdout, re.MULTILINE)
    assert (tmp_path / "third_party.png").stat().st_size > 1000


def test_unknown_program(tmp_path: Path) -> None:
    done = programs.run("third_party", "dqn", folder=tmp_path, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'dqn' (choose from ppo, deepar)" in done.stderr


def test_the_docs_show_what_the_code_prints() -> None:
    text = (programs.ROOT / "docs" / "third-party.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(code, names)
    (said,) = re.findall(r"^print\(layer\)  # (.*)$", code, re.MULTILINE)
    assert repr(names["layer"]) == said


def holder(name: str, kind: str) -> type[nn.Module]:
    """A class that has the name of TorchRL's module and treats its layer in the same way."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(nn, kind)(3, 4, batch_first=True)

        def forward(self, x: Tensor, ends: Tensor) -> Any:
            if isinstance(self.layer, getattr(nn, kind)):
                packed = nn.utils.rnn.pack_padded_sequence(
                    x, ends, batch_first=True, enforce_sorted=False
                )
                y, _ = self.layer(packed)
                return nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]
            return self.layer(x, mask=torch.arange(x.shape[1]) < ends.unsqueeze(1))[0]

    Holder.__name__, Holder.__module__ = name, "torchrl.modules.tensordict_module.rnn"
    return Holder


@pytest.mark.parametrize(("name", "kind"), [("LSTMModule", "LSTM"), ("GRUModule", "GRU")])
def test_modules_that_check_the_class_of_their_layer(name: str, kind: str) -> None:
    x, ends = torch.randn(2, 5, 3), torch.tensor([5, 2])
    cls = holder(name, kind)
    subclass = type("Policy", (cls,), {})
    model = nn.ModuleDict({"policy": subclass(), "head": getattr(nn, kind)(4, 2)})
    expected = model["policy"](x, ends)
    message = (
        rf"left 1 recurrent layer as it is:\n  policy\.layer \({kind}\): torchrl\.modules\."
        rf"tensordict_module\.rnn\.{name} asks whether .* with fusedrnn\.patch_torch\(\):$"
    )
    with pytest.warns(UserWarning, match=message):
        fusedrnn.convert(model)
    assert type(model["head"]) is getattr(fusedrnn, f"Fused{kind}")
    assert torch.equal(model["policy"](x, ends), expected)

    with fusedrnn.patch_torch():  # the message advises this
        fusedrnn.convert(model)
        assert type(model["policy"].layer) is getattr(fusedrnn, f"Fused{kind}")
        torch.testing.assert_close(model["policy"](x, ends), expected)
        assert subclass()(x, ends).shape == expected.shape
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        model["policy"](x, ends)

"""Libraries that build torch.nn.LSTM themselves, in patch_torch()'s block: the same training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_the_docs_say_what_a_block_prints() -> None:
    text = (programs.ROOT / "docs" / "third-party.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(code, names)
    (said,) = re.findall(r"^print\(layer\)  # (.*)$", code, re.MULTILINE)
    assert repr(names["layer"]) == said

"""examples/scratch.py: run as a program, and one notebook cell after another as an editor does."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.examples import programs

PAGE = programs.EXAMPLES / "scratch.py"
GOLDEN = json.loads((programs.ROOT / "tests" / "golden.json").read_text())


def cells() -> list[str]:
    """The code of the program, one string for each notebook cell."""
    parts = re.split(r"^# %%", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [part for part in parts if not part.startswith(" [markdown]")]


def test_short_run(tmp_path: Path) -> None:
    done = programs.run("scratch", "--short", folder=tmp_path / "new")
    out = done.stdout
    assert "FAILED" not in out
    # The numbers of two published examples, step by step.
    step, two = GOLDEN["lstm_one_step"]["expected_4_digits"], GOLDEN["rnn_bptt_two_steps"]
    for name, line in [("f", "  f = "), ("i", "  i = "), ("c_tilde", "  c̃ = "), ("o", "  o = ")]:
        assert re.search(rf"^{line}.* = {step[name]:.4f}$", out, re.M), name
    assert re.search(rf"^  c' = .* = {step['c']:.4f}$", out, re.M)
    assert re.search(rf"^  h' = .* = {step['h']:.4f}$", out, re.M)
    for name, line in [("theta_xh", "d_w"), ("theta_hh", "d_u"), ("b_h", "d_b")]:
        assert re.search(rf"^  {line} = .* = {two['grad'][name]:.4f}$", out, re.M), name
    assert f"L = {two['loss']:.4f} before the step, 1.4049 after it" in out
    # The comparisons with each library.
    for title in ("torch.nn", "fusedrnn"):
        assert len(re.findall(rf"ok .*{title}'s (?:LSTM|LSTMCell|RNN):", out)) == 14
    assert out.count("losses differ by at most") == 5
    assert re.search(r"GRU, bias 3 +\d+\.\d% +\d+\.\d s +\d+\.\d% +\d+\.\d s", out)
    picture = tmp_path / "new" / "scratch.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stderr.count("100%") >= 10


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("delta_1 = d_h_1 * (1 - h_1**2)", "delta_1 = d_h_1 * (1 - h_1)", "d_theta_xh"),
        ("d_h = delta[t] @ U.T", "d_h = delta[t] @ U", "d_W and through fusedrnn's RNN"),
        ("c = torch.sigmoid(f) * c +", "c = torch.sigmoid(f + 1e-9) * c +", "fusedrnn's LSTM"),
    ],
)
def test_a_mistake_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, found: str
) -> None:
    code = PAGE.read_text(encoding="utf-8")
    assert code.count(old) == 1
    programs.load("common")
    arguments = ["scratch.py", "--short", "--rnn", "fused", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        exec(compile(code.replace(old, new), "scratch.py", "exec"), {"__name__": "__main__"})
    assert str(caught.value).startswith("FAILED: ")
    assert found in str(caught.value)


def test_cell_by_cell_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook sys.argv is the kernel's command line, and there is no __file__."""
    common = programs.load("common")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    space = {"__name__": "__main__", "__doc__": None}
    first, *rest = cells()
    exec(compile(first, "cell", "exec"), space)
    assert space["options"].rnn == "both"
    space["options"] = common.parser(None).parse_args(
        ["--short", "--rnn", "fused", "--out", str(tmp_path)]
    )
    space["kinds"] = ["fused"]
    for code in rest:
        exec(compile(code, "cell", "exec", dont_inherit=True), space)
    assert space["failures"] == []
    assert (tmp_path / "scratch.png").exists()


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    programs.load("common")
    monkeypatch.setattr(sys, "argv", ["scratch.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        exec(compile(PAGE.read_text(encoding="utf-8"), "scratch.py", "exec"), {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "a page to read with a pencil in hand" in text
    assert "--seed" in text

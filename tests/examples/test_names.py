"""examples/names.py, the demo: its data, its answers, its models, and short runs."""

from __future__ import annotations

import builtins
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import programs

common = programs.load("common")
names = programs.load("names")


@pytest.fixture(scope="module")
def data() -> Any:
    return names.load(0)


def test_data(data: Any) -> None:
    locales = [locale for group in names.LOCALES.values() for locale in group]
    assert len(set(locales)) == len(locales) >= 15
    train, test = (dict(part) for part in (data.train, data.test))
    # Each name occurs once, in one of the parts, and so in one language.
    assert len(train) == len(data.train)
    assert len(test) == len(data.test)
    assert not train.keys() & test.keys()
    assert len(data.train) > 10_000
    assert len(data.test) > 3_000
    for part in (train, test):
        assert set(part.values()) == set(range(len(names.LANGUAGES)))
    sizes = Counter((train | test).values())
    assert max(sizes.values()) == names.MOST_PER_LANGUAGE
    assert data.found - data.ambiguous >= len(train) + len(test)
    for name in [*train, *test]:
        assert name == names.normalise(name) != ""
        assert names.is_latin(name)
    # A name of one language, and a name of several, which is left out.
    assert (train | test)["lehtonen"] == names.LANGUAGES.index("Finnish")
    assert "anna" not in train.keys() | test.keys()


def test_split_depends_on_the_seed_alone() -> None:
    assert names.load(3) == names.load(3)
    assert names.load(3).test != names.load(4).test


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("  Ó  Briain ", "ó briain"),
        ("İBRAHİM", "ibrahim"),
        ("Cafe\u0301", "caf\u00e9"),
        ("O'Neill", "o'neill"),
        ("", ""),
    ],
)
def test_normalise(raw: str, normal: str) -> None:
    assert names.normalise(raw) == normal


def test_encode(data: Any) -> None:
    ids, lengths = data.encode(["abc", "é", "ж日a"])
    assert lengths.tolist() == [3, 1, 3]
    assert ids.shape == (3, 3)
    assert ids[1, 1:].tolist() == [names.PADDING] * 2
    assert ids[2, :2].tolist() == [names.UNKNOWN] * 2
    assert ids[2, 2] == ids[0, 0] == data.characters["a"]
    assert sorted(data.characters.values()) == [*range(2, len(data.characters) + 2)]
    assert data.characters.keys() == {c for name, _ in data.train for c in name}


def test_baseline_is_the_share_of_one_language(data: Any) -> None:
    shares = {count / len(data.test) for count in Counter(i for _, i in data.test).values()}
    assert data.baseline() in shares
    assert data.baseline() < 0.1


@pytest.mark.parametrize("by", ["layers", "cells"])
def test_padding_does_not_change_an_answer(by: str, data: Any) -> None:
    model = names.NameClassifier("torch", "lstm", by, len(data.characters) + 2, 8, 1).eval()
    alone = model(*data.encode(["Li"]))
    beside = model(*data.encode(["Sigurbjörnsdóttir", "Li"]))
    torch.testing.assert_close(beside[1:], alone)


@pytest.mark.parametrize("kind", ["torch", "fused"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("L", [1, 2])
def test_cells_in_a_loop_are_a_layer(kind: str, cell: str, L: int, data: Any) -> None:
    ids, lengths = data.encode(["Li", "Sigurbjörnsdóttir", "O'Brien"])
    by_layers, by_cells = (
        names.NameClassifier(kind, cell, by, len(data.characters) + 2, 8, L).double().eval()
        for by in ("layers", "cells")
    )
    by_cells.load_state_dict(
        {
            re.sub(r"read\.layer\.(\w+)_l(\d)", r"read.cells.\2.\1", key): value
            for key, value in by_layers.state_dict().items()
        }
    )
    torch.testing.assert_close(by_cells(ids, lengths), by_layers(ids, lengths))


def test_a_seed_gives_cells_and_a_layer_the_same_weights() -> None:
    weights = []
    for by in ("layers", "cells"):
        torch.manual_seed(3)
        weights.append(list(names.NameClassifier("torch", "gru", by, 30, 8, 1).parameters()))
    assert all(map(torch.equal, *weights))


def test_predict_gives_the_likeliest_first(data: Any) -> None:
    model = names.NameClassifier("torch", "gru", "layers", len(data.characters) + 2, 8, 1).eval()
    asked = ["  LI ", "Sigurbjörnsdóttir"]
    with torch.no_grad():
        chances = model(*data.encode(["li", "sigurbjörnsdóttir"])).softmax(1)
    for guesses, row in zip(names.predict(model, data, asked), chances, strict=True):
        assert len(guesses) == 3
        for (language, chance), other in zip(guesses, row.sort(descending=True)[0], strict=False):
            assert chance == pytest.approx(row[names.LANGUAGES.index(language)].item())
            assert chance == pytest.approx(other.item())


@pytest.mark.parametrize("end", ["", "   ", None])
def test_ask(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str | None,
    data: Any,
) -> None:
    model = names.NameClassifier("fused", "rnn", "layers", len(data.characters) + 2, 8, 1)
    lines = iter(["Ana Clara", "Zoë", end, "not asked for"])

    def typed(prompt: str) -> str:
        assert "a name" in prompt
        line = next(lines)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", typed)
    names.ask(model, data)
    assert re.findall(r"^  (\S.*?) {2,}\S+ \d+%, ", capsys.readouterr().out, re.M) == [
        "Ana Clara",
        "Zoë",
    ]


@pytest.mark.parametrize(
    ("second", "accuracy", "agree"),
    [
        ([2.0, 1.5], 0.7, True),
        ([2.0, 1.5 + 0.9e-4], 0.709, True),
        ([2.0, 1.5 + 1.1e-4], 0.7, False),
        ([float("nan"), 1.5], 0.7, False),
        ([2.0, float("nan")], 0.7, False),
        ([2.0, 1.5], 0.711, False),
        ([2.0, 1.5], 0.689, False),
    ],
)
def test_when_runs_agree(second: list[float], accuracy: float, agree: bool) -> None:
    runs = [
        common.Run("torch", "a", None, losses=[2.0, 1.5], accuracies=[0.1, 0.7]),
        common.Run("fused", "b", None, losses=second, accuracies=[0.1, accuracy]),
    ]
    assert names.compare(*runs) is agree
    # Only the losses of the first 50 steps are compared, because rounding errors grow in training.
    for run in runs:
        run.losses = [1.0] * 50 + run.losses
    assert names.compare(*runs) is (abs(accuracy - 0.7) <= 0.01)


def test_short_run(tmp_path: Path) -> None:
    asked = ["Guðmundsdóttir", "O'Brien", "日本"]
    done = programs.run("names", "--short", *asked, folder=tmp_path / "new")
    out = done.stdout
    accuracies = [float(a) for a in re.findall(r"LSTM +(\d+\.\d)%, trained in \d+\.\d s", out)]
    assert len(accuracies) == 2, out
    # A program that always gives the same answer reaches 7 %.
    assert min(accuracies) > 40
    assert abs(accuracies[0] - accuracies[1]) <= 1
    assert re.search(r"most frequent language always: \d\.\d%", out)
    assert re.search(r"ok +first 50 losses differ by at most \d\.\de-\d\d ", out)
    assert re.search(r"ok +held-out accuracies differ by 0\.\d\d points", out)
    assert "FAILED" not in out
    picture = tmp_path / "new" / "names.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    answers = dict(re.findall(r"^  (\S+) +(.*%.*)$", out.split("likeliest languages\n")[1], re.M))
    assert answers.keys() == set(asked)
    assert answers["Guðmundsdóttir"].startswith("Icelandic ")
    assert all(len(re.findall(r"[A-Z][a-z]+ \d+%", text)) == 3 for text in answers.values())
    # There is a progress bar for each of the two.
    assert done.stderr.count("100%") >= 2


def test_short_run_by_cells(tmp_path: Path) -> None:
    short = ["--short", "--epochs", "1", "--hidden", "16", "--cell", "gru", "--by", "cells"]
    out = programs.run("names", *short, "Anna", folder=tmp_path).stdout
    for title in ("torch.nn.GRUCell", "fusedrnn.FusedGRUCell"):
        assert re.search(rf"{title} +\d+\.\d%, trained in", out)
    assert "FAILED" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--hidden", "-3"], "must be at least 1"),
        (["--rnn", "jax"], "invalid choice"),
        (["--cell", "gated"], "invalid choice"),
        (["--by", "hand"], "invalid choice"),
        (["Anna", "  "], "a name needs at least one character"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in programs.parse_fails(names, arguments, capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = programs.help_of(names, capsys)
    options = "rnn epochs hidden layers short out seed cell by ask"
    assert all(f"--{option}" in text for option in options.split())

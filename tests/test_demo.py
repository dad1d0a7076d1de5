"""The demo: its data, its answers, and a short run of it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "examples" / "names.py"


@pytest.fixture(scope="module")
def names() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("names", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["names"] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


def start(*arguments: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the program."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--out", str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        capture_output=True,
        timeout=300,
        check=check,
    )


def test_data(names: ModuleType) -> None:
    data = names.load(0)
    locales = [locale for group in names.LOCALES.values() for locale in group]
    assert len(set(locales)) == len(locales) >= 15
    train, test = (dict(part) for part in (data.train, data.test))
    # No name twice, none in both parts: none in two languages either.
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
    # Known owners, and known to be several languages'.
    assert (train | test)["lehtonen"] == names.LANGUAGES.index("Finnish")
    assert "anna" not in train.keys() | test.keys()


def test_split_depends_on_the_seed_alone(names: ModuleType) -> None:
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
def test_normalise(names: ModuleType, raw: str, normal: str) -> None:
    assert names.normalise(raw) == normal


def test_encode(names: ModuleType) -> None:
    data = names.load(0)
    ids, lengths = data.encode(["abc", "é", "ж日a"])
    assert lengths.tolist() == [3, 1, 3]
    assert ids.shape == (3, 3)
    assert ids[1, 1:].tolist() == [names.PADDING] * 2
    assert ids[2, :2].tolist() == [names.UNKNOWN] * 2
    assert ids[2, 2] == ids[0, 0] == data.characters["a"]
    assert sorted(data.characters.values()) == [*range(2, len(data.characters) + 2)]
    assert data.characters.keys() == {c for name, _ in data.train for c in name}


def test_baseline_is_the_share_of_one_language(names: ModuleType) -> None:
    data = names.load(0)
    shares = {count / len(data.test) for count in Counter(i for _, i in data.test).values()}
    assert data.baseline() in shares
    assert data.baseline() < 0.1


def test_padding_does_not_change_an_answer(names: ModuleType) -> None:
    data = names.load(0)
    model = names.NameClassifier(torch.nn.LSTM, len(data.characters) + 2, 8, 1).eval()
    alone = model(*data.encode(["Li"]))
    beside = model(*data.encode(["Sigurbjörnsdóttir", "Li"]))
    torch.testing.assert_close(beside[1:], alone)


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
def test_what_agreement_is(
    names: ModuleType, second: list[float], accuracy: float, agree: bool
) -> None:
    runs = [
        names.Run("a", None, losses=[2.0, 1.5], accuracies=[0.1, 0.7]),
        names.Run("b", None, losses=second, accuracies=[0.1, accuracy]),
    ]
    assert names.compare(*runs) is agree
    # Only the first 50 steps count: rounding grows in a training.
    for run in runs:
        run.losses = [1.0] * 50 + run.losses
    assert names.compare(*runs) is (abs(accuracy - 0.7) <= 0.01)


def test_short_run(tmp_path: Path) -> None:
    done = start("--short", "Guðmundsdóttir", "O'Brien", "日本", folder=tmp_path / "new")
    out = done.stdout
    accuracies = [float(a) for a in re.findall(r"LSTM +(\d+\.\d)%, trained in \d+\.\d s", out)]
    assert len(accuracies) == 2, out
    # 7 % by always giving the same answer.
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
    assert answers.keys() == {"Guðmundsdóttir", "O'Brien", "日本"}
    assert answers["Guðmundsdóttir"].startswith("Icelandic ")
    assert all(len(re.findall(r"[A-Z][a-z]+ \d+%", text)) == 3 for text in answers.values())
    # A progress bar for each of the two.
    assert done.stderr.count("100%") >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--hidden", "-3"], "must be at least 1"),
        (["--rnn", "jax"], "invalid choice"),
        (["Anna", "  "], "a name needs at least one character"),
    ],
)
def test_bad_arguments(
    names: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        names.parse(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help(names: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        names.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--rnn", "--epochs", "--hidden", "--layers", "--short", "--out", "--seed"):
        assert option in text

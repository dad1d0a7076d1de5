"""examples/news.py: its two data sets, its four models, the effect of padding, and short runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import programs

common = programs.load("common")
news = programs.load("news")


@pytest.fixture(scope="module")
def vowels() -> Any:
    return news.vowels()


def write(folder: Path, train: str, test: str = '"1","a","b"\n') -> Path:
    """A folder in the form of AG News, with these two files."""
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text(train, encoding="utf-8")
    (folder / "test.csv").write_text(test, encoding="utf-8")
    return folder


def test_vowels_are_the_published_split(vowels: Any) -> None:
    for part, samples, longest in ((vowels.train, 270, 26), (vowels.test, 370, 29)):
        lengths = [len(s) for s in part.sequences]
        assert len(lengths) == len(part.labels) == samples
        assert (min(lengths), max(lengths)) == (7, longest)
        assert {s.shape[1] for s in part.sequences} == {12}
        assert part.labels.unique().tolist() == list(range(9)) == list(range(vowels.classes))
    assert vowels.train.labels.bincount().tolist() == [30] * 9
    # The README of the data set gives these numbers for its test part.
    assert vowels.test.labels.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]


def test_vowels_are_scaled_by_the_training_part_alone(vowels: Any) -> None:
    frames = torch.cat(vowels.train.sequences)
    torch.testing.assert_close(frames.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.std(0), torch.ones(12), atol=1e-5, rtol=0)
    assert torch.cat(vowels.test.sequences).mean(0).abs().max() > 1e-2


def test_a_batch_is_padded_with_zeros(vowels: Any) -> None:
    x, lengths = vowels.train.batch(torch.tensor([3, 0, 200]))
    assert x.shape == (max(lengths), 3, 12)
    for n, i in enumerate((3, 0, 200)):
        assert torch.equal(x[: lengths[n], n], vowels.train.sequences[i])
        assert not x[lengths[n] :, n].any()


def test_news_is_read(tmp_path: Path) -> None:
    train = (
        '"3","Oil, \'up\'","Oil rises; ""again"" it isn\'t\n over"\n'
        '"1","Über Oil","up again"\n'
        '"4","",""\n'
    )
    data = news.news(write(tmp_path, train, '"3","OIL unheard","of up"\n'), None, 0)
    # The training part has three words twice or more: oil, up and again. Two more ids are reserved.
    assert data.words == 5
    assert data.classes == 4
    assert data.train.labels.tolist() == [2, 0, 3]
    assert data.test.labels.tolist() == [2]
    assert [s.tolist() for s in data.train.sequences] == [
        [2, 3, 2, 1, 4, 1, 1, 1],
        [1, 2, 3, 4],
        [news.UNKNOWN],
    ]
    assert [s.tolist() for s in data.test.sequences] == [[2, 1, 1, 3]]


def test_a_header_line_is_skipped(tmp_path: Path) -> None:
    head, row = "Class Index,Title,Description\n", '"2","a b","c"\n'
    path = tmp_path / "file.csv"
    path.write_text(head + row, encoding="utf-8")
    assert news.read(path) == [(1, ["a", "b", "c"])]


def test_the_number_of_rows_is_limited(tmp_path: Path) -> None:
    rows = "".join(f'"{i % 4 + 1}","word{i}","text"\n' for i in range(50))
    folder = write(tmp_path, rows, rows)
    data = news.news(folder, 20, 0)
    assert len(data.train.labels) == len(data.test.labels) == 20
    assert len(data.train.labels.unique()) > 1
    again, other = (news.news(folder, 20, seed) for seed in (0, 1))
    assert torch.equal(again.train.labels, data.train.labels)
    assert not torch.equal(other.train.labels, data.train.labels)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ('"1","a"\n', None, r"train.csv, line 1: expected class, title, description, got"),
        ('"1","a","b"\n"World","a","b"\n', None, r"line 2: expected a class of 1 or more, got 'W"),
        ('"1","a","b"\n"0","a","b"\n', None, r"line 2: expected a class of 1 or more, got '0'"),
        ("", None, r"train.csv has no rows"),
        ('"1","a","b"\n', '"2","a","b"\n', r"test.csv has class 2, train.csv ends with 1"),
    ],
)
def test_bad_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    train: str,
    test: str | None,
    message: str,
) -> None:
    folder = write(tmp_path, train, test or '"1","a","b"\n')
    assert news.main(["--data", str(folder), "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert news.main(["--data", str(tmp_path / "nothing")]) == 2
    assert "train.csv" in capsys.readouterr().err


def models(vowels: Any, *names: tuple[str, str]) -> list[Any]:
    """Classifiers of these kinds and ways, whose weights come from one seed."""
    result = []
    for kind, way in names:
        torch.manual_seed(5)
        result.append(news.Classifier(kind, way, vowels, 16))
    return result


def test_lengths_give_what_packing_gives(vowels: Any) -> None:
    names = ("torch", "packed"), ("fused", "packed"), ("fused", "lengths")
    batch = vowels.test.batch(torch.arange(0, 370, 11))
    expected, *others = (model(*batch) for model in models(vowels, *names))
    for scores in others:
        torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("way", ["rnn", "lstm"])
def test_padding_changes_the_ways_that_read_it(vowels: Any, way: str) -> None:
    (model,) = models(vowels, ("torch", way))
    x, lengths = vowels.test.batch(torch.arange(2))
    longer = torch.cat([x, torch.zeros(5, 2, 12)])
    assert (model(longer, lengths) - model(x, lengths)).abs().min() > 1e-5
    # "rnn" takes the mean over all steps and "lstm" the output of the last step, padding included.
    if way == "rnn":
        assert torch.equal(model(x, lengths), model.linear(model.rnn(x)[0].sum(0) / len(x)))
    else:
        assert torch.equal(model(x, lengths), model.linear(model.rnn(x)[0][-1]))


def test_mean_length_that_batches_are_padded_to() -> None:
    rows = [torch.zeros(T) for T in (2, 7, 3, 5)]
    part = news.Part(rows, torch.zeros(4))
    assert news.longest(part, argparse.Namespace(batch=4, seed=0)) == 7
    assert news.longest(part, argparse.Namespace(batch=1, seed=0)) == 17 / 4


def test_moved_by_padding(vowels: Any) -> None:
    options = argparse.Namespace(batch=16, seed=0)
    for kind, way in (("torch", "packed"), ("fused", "packed"), ("fused", "lengths")):
        (model,) = models(vowels, (kind, way))
        assert news.moved(model, vowels, options) == 0
    (model,) = models(vowels, ("fused", "lstm"))
    assert news.moved(model, vowels, options) > 0


def test_batches_hold_every_sequence_once(vowels: Any) -> None:
    for batches in (news.mixed(vowels.test, 16, 0), news.unpadded(vowels.test)):
        assert torch.cat(batches).sort()[0].tolist() == list(range(370))
    for batch in news.unpadded(vowels.test):
        assert len({len(vowels.test.sequences[i]) for i in batch.tolist()}) == 1
    lengths = [len(vowels.test.sequences[i]) for i in news.mixed(vowels.test, 16, 0)[0].tolist()]
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("way", ["rnn", "packed", "lengths"])
def test_disagreement_is_found(capsys: pytest.CaptureFixture[str], way: str) -> None:
    names = [(w, kind) for w in ("rnn", "packed") for kind in common.KINDS]
    names.append(("lengths", "fused"))
    runs = {n: common.Run(n[1], "title", None, losses=[2.0, 1.5]) for n in names}
    assert news.compare(runs)
    assert capsys.readouterr().out.count("ok  ") == 3
    runs[way, "fused"].losses = [2.0, 1.6]
    assert not news.compare(runs)
    assert capsys.readouterr().out.count("FAILED") == 1


def test_short_run(tmp_path: Path) -> None:
    done = programs.run("news", "--short", folder=tmp_path)
    rows = re.findall(r"^  (\w+) +(torch.nn|fusedrnn) +(\S+)% +(\S+)% +\S+ s$", done.stdout, re.M)
    assert [row[:2] for row in rows] == [
        (way, kind)
        for way in news.WAYS
        for kind in ("torch.nn", "fusedrnn")
        if (way, kind) != ("lengths", "torch.nn")
    ]
    accuracy = {row[:2]: float(row[2]) for row in rows}
    # Guessing reaches 11 %; always naming the most frequent speaker reaches 24 %.
    assert accuracy["packed", "fusedrnn"] == accuracy["lengths", "fusedrnn"] > 40
    assert abs(accuracy["packed", "torch.nn"] - accuracy["packed", "fusedrnn"]) <= 1
    assert done.stdout.count("  ok  ") == 4
    assert "FAILED" not in done.stdout
    assert (tmp_path / "news.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr.count("100%") >= len(rows)


def test_short_run_on_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topics = ["vote party law", "match goal team", "market oil price", "code chip web"]
    rows = "".join(f'"{i % 4 + 1}","{topics[i % 4]}","more {i}"\n' for i in range(120))
    folder = write(tmp_path / "data", rows, rows[:600].rsplit("\n", 1)[0])
    short = ["--short", "--epochs", "5", "--hidden", "16", "--rate", "0.01"]
    arguments = ["--data", str(folder), *short, "--out", str(tmp_path)]
    assert news.main(arguments) == 0
    out = capsys.readouterr().out
    assert "120 sequences to train on" in out
    assert re.search(r"^  packed +torch.nn +100.0% \(81.4%\) +0.0% ", out, re.M)
    assert out.count("  ok  ") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--batch", "0"], "must be at least 1"),
        (["--rate", "-1"], "--rate must be above 0"),
        (["--way", "padded"], "invalid choice"),
        (["--rnn", "torch", "--way", "lengths"], "torch.nn has no lengths="),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in programs.parse_fails(news, arguments, capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = programs.help_of(news, capsys)
    for word in ("--data", "--way", "--rnn", "--seed", "--short", "0.806", "0.773", "0.814"):
        assert word in text

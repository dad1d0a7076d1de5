"""examples/tagging.py: its words, its tags, its network, and a short run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyphen
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from tests.examples import programs

common = programs.load("common")
tagging = programs.load("tagging")


@pytest.fixture(scope="module", params=["pt", "en"])
def language(request: pytest.FixtureRequest) -> Any:
    return tagging.LANGUAGES[request.param]


@pytest.fixture(scope="module")
def parts(language: Any) -> Any:
    return tagging.load(language, 5000, 0)


def test_no_word_and_no_stem_is_in_both_parts(parts: Any) -> None:
    train, test = (part.words for part in parts)
    assert len(set(train) | set(test)) == len(train) + len(test) > 3500
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.15
    assert not {w[: tagging.STEM] for w in train} & {w[: tagging.STEM] for w in test}


def test_words_are_of_the_language(language: Any, parts: Any) -> None:
    for part in parts:
        for word, ids in zip(part.words, part.ids, strict=True):
            assert len(word) >= tagging.SHORTEST
            assert [language.letters[i - 1] for i in ids.tolist()] == list(word)
    assert {"São Paulo", "it's", "2nd"}.isdisjoint(parts[0].words)


def test_tags_are_those_of_pyphen(language: Any, parts: Any) -> None:
    dictionary = pyphen.Pyphen(lang=language.hyphens)
    for part in parts:
        for word, tags in zip(part.words, part.tags, strict=True):
            assert tagging.hyphenate(word, tags) == dictionary.inserted(word)


@pytest.mark.parametrize(
    ("code", "hyphenated"), [("pt", "tra-ba-lho"), ("pt", "na-ção"), ("en", "coun-try")]
)
def test_known_words(code: str, hyphenated: str) -> None:
    parts = tagging.load(tagging.LANGUAGES[code], 5000, 0)
    answers = {}
    for part in parts:
        for word, tags in zip(part.words, part.tags, strict=True):
            answers[word] = tagging.hyphenate(word, tags)
    assert answers[hyphenated.replace("-", "")] == hyphenated


def test_split_depends_on_the_seed_alone(language: Any, parts: Any) -> None:
    again, other = (tagging.load(language, 5000, seed)[1].words for seed in (0, 1))
    assert again == parts[1].words != other


def test_a_batch_packs_ids_and_tags_alike() -> None:
    words = ["ab", "abcd", "abc"]
    rows = [torch.tensor([ord(c) - 96 for c in word]) for word in words]
    part = tagging.Part(words, rows, [row / 10 for row in rows])
    ids, tags = part.batch(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(tags.data * 10, ids.data.float())
    assert ids.batch_sizes.tolist() == tags.batch_sizes.tolist() == [3, 3, 2, 1]


def test_hyphenate() -> None:
    assert tagging.hyphenate("banana", torch.tensor([0.0, 1, 0, 1, 0, 0])) == "ba-na-na"
    assert tagging.hyphenate("tree", torch.zeros(4)) == "tree"


def test_accuracies() -> None:
    expected = [torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0, 0, 1])]
    got = [torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0, 0, 1])]
    assert tagging.per_tag(expected, got) == 7 / 8
    assert tagging.per_word(expected, got) == 1 / 2
    assert tagging.per_word(expected, expected) == 1


@pytest.mark.parametrize("kind", ["torch", "fused"])
def test_answers_stand_in_the_order_of_the_words(kind: str) -> None:
    model = tagging.Tagger(kind, 26, 8, 2)
    rows = [torch.arange(1, T) for T in (4, 9, 6)]
    part = tagging.Part(["abc", "abcdefgh", "abcde"], rows, [torch.zeros(len(r)) for r in rows])
    for row, tags in zip(rows, tagging.tag(model, part), strict=True):
        assert torch.equal(tags, (model(pack_sequence([row])).data > 0).float())


def test_a_tag_depends_on_letters_before_and_behind() -> None:
    model = tagging.Tagger("fused", 26, 8, 1).eval()
    scores = [model(pack_sequence([torch.tensor(row)])).data for row in ([1, 2, 3], [1, 2, 4])]
    assert (scores[0] != scores[1]).all()


def test_short_run(tmp_path: Path) -> None:
    done = programs.run("tagging", "--short", "--language", "pt", "--wrong", "5", folder=tmp_path)
    number = r"(\d+\.\d+)%"
    row = rf"^  (never a hyphen|torch.nn|fusedrnn) +{number} +{number}"
    rows = re.findall(row, done.stdout, re.M)
    (_, tags_0, words_0), *trained = [(name, float(t), float(w)) for name, t, w in rows]
    assert len(trained) == 2
    for _, tags, words in trained:
        # The network has learned: it gets less than half as many tags wrong as a program that never
        # hyphenates, and at least 30 % more words right.
        assert 100 - tags < (100 - tags_0) / 2
        assert words > words_0 + 30
    assert re.search(r"  ok +first \d+ losses differ", done.stdout)
    shown = re.findall(r"^    ([\w-]+) +([\w-]+)$", done.stdout, re.M)
    assert len(shown) == 5
    for pyphens, networks in shown:
        assert pyphens != networks
        assert pyphens.replace("-", "") == networks.replace("-", "")
    assert (tmp_path / "tagging.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr.count("100%") >= 2


def test_disagreement_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "agree", lambda first, second: False)
    small = ["--short", "--words", "1000", "--epochs", "1", "--hidden", "4", "--out", str(tmp_path)]
    assert tagging.main([*small, "--language", "en"]) == 1
    assert "English" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--words", "999"], "--words must be at least 1000"),
        (["--wrong", "-1"], "--wrong must not be negative"),
        (["--language", "fi"], "invalid choice"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in programs.parse_fails(tagging, arguments, capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = programs.help_of(tagging, capsys)
    for word in ("--language", "--words", "--rnn", "--seed", "--short", "rules"):
        assert word in text

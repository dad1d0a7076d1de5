"""Where may a word be hyphenated? A bidirectional LSTM tags every letter of the word.

The words are the most common Portuguese and English words of the wordfreq package that have at
least four letters. A tag says whether a hyphen may follow a letter. The tags come from the
hyphenation dictionaries of the pyphen package. Rules (Liang's patterns of letters) made them, not
people, so the accuracy says how well the network has found the rules. If the network differs from
them, the rules are sometimes wrong.

This is synchronous many to many: an embedding, LSTM layers in both directions on packed sequences,
and a linear layer on the output of every step. One word in ten is held out, and words that begin
with the same five letters (hyphen, hyphens, hyphenate) are all in the same part. The network is
trained with torch.nn and with fusedrnn, from one seed on the same batches. The exit status is 1 if
the first losses do not agree.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # before torch
import torch
from common import Run
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

pyphen, wordfreq = common.need("pyphen"), common.need("wordfreq")


@dataclass
class Language:
    """A language, and its names in the packages with words and hyphens."""

    name: str
    words: str  # its name in wordfreq
    hyphens: str  # its name in pyphen
    letters: str


LANGUAGES = {
    "pt": Language("Portuguese", "pt", "pt_BR", "abcdefghijklmnopqrstuvwxyzáâãàéêíóôõúüç"),
    "en": Language("English", "en", "en_US", "abcdefghijklmnopqrstuvwxyz"),
}
SHORTEST, STEM = 4, 5  # least letters of a word; words that share STEM first letters stay together
TEST_SHARE = 0.1
PADDING = 0  # the id of padding; the letters follow
EMBEDDING, BATCH, LEARNING_RATE, DROPOUT = 32, 64, 5e-3, 0.2


@dataclass
class Part:
    """Words [samples], and letter ids and tags [T] of each; tag 1 means a hyphen may follow."""

    words: list[str]
    ids: list[Tensor]
    tags: list[Tensor]

    def batch(self, indices: Tensor) -> tuple[PackedSequence, PackedSequence]:
        """Returns the ids and tags of the words with these indices."""
        ids, tags = (
            pack_sequence([rows[i] for i in indices.tolist()], enforce_sorted=False)
            for rows in (self.ids, self.tags)
        )
        return ids, tags


def load(language: Language, number: int, seed: int) -> tuple[Part, Part]:
    """Divides the `number` most common words, except those with foreign letters, in two parts."""
    dictionary = pyphen.Pyphen(lang=language.hyphens)
    letters = {letter: i for i, letter in enumerate(language.letters, start=PADDING + 1)}
    words = [
        word
        for word in wordfreq.top_n_list(language.words, number)
        if len(word) >= SHORTEST and letters.keys() >= set(word)
    ]
    stems = sorted({word[:STEM] for word in words})
    held_out = set(random.Random(seed).sample(stems, round(len(stems) * TEST_SHARE)))
    parts = Part([], [], []), Part([], [], [])
    for word in words:
        part = parts[word[:STEM] in held_out]
        tags = torch.zeros(len(word))
        tags[[position - 1 for position in dictionary.positions(word)]] = 1
        part.words.append(word)
        part.ids.append(torch.tensor([letters[letter] for letter in word]))
        part.tags.append(tags)
    return parts


def hyphenate(word: str, tags: Tensor) -> str:
    """Returns the word with its hyphens: ba-na-na for banana and [0, 1, 0, 1, 0, 0]."""
    pairs = zip(word, tags.tolist(), strict=True)
    return "".join(letter + "-" * int(tag) for letter, tag in pairs)


class Tagger(nn.Module):
    """Maps packed letter ids to a score for each letter; a score above 0 means a hyphen."""

    def __init__(self, kind: str, letters: int, H: int, L: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters + 1, EMBEDDING)
        dropout = DROPOUT if L > 1 else 0.0
        lstm = common.layers(kind).LSTM
        self.lstm = lstm(EMBEDDING, H, L, bidirectional=True, dropout=dropout)
        self.linear = nn.Linear(2 * H, 1)

    def forward(self, ids: PackedSequence) -> PackedSequence:
        y, _ = self.lstm(like(ids, self.embedding(ids.data)))
        return like(ids, self.linear(y.data)[:, 0])


def like(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """Returns a PackedSequence of the same sequences with other data."""
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


@torch.no_grad()
def tag(model: nn.Module, part: Part) -> list[Tensor]:
    """Returns the network's tags of all words."""
    ids, _ = part.batch(torch.arange(len(part.words)))
    scores = model.eval()(ids)
    return unpack_sequence(like(scores, (scores.data > 0).float()))


def train(kind: str, language: Language, parts: tuple[Part, Part], options: Any) -> Run:
    """Trains one of the two kinds; both see the same initial weights, batches and dropout."""
    part, held_out = parts
    torch.manual_seed(options.seed)
    model = Tagger(kind, len(language.letters), options.hidden, options.layers)
    run = Run(kind, common.TITLES[kind], model)

    def loss(indices: Tensor) -> Tensor:
        ids, tags = part.batch(indices)
        return nn.functional.binary_cross_entropy_with_logits(model(ids).data, tags.data)

    def accuracy() -> float:
        return per_word(held_out.tags, tag(model, held_out))

    settings = {"epochs": options.epochs, "batch": BATCH, "rate": LEARNING_RATE}
    common.fit(run, loss, accuracy, len(part.words), **settings)
    return run


def per_tag(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The share of tags that are right."""
    return (torch.cat(list(expected)) == torch.cat(list(got))).double().mean().item()


def per_word(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The share of words all of whose tags are right."""
    return sum(map(torch.equal, expected, got)) / len(expected)


def plot(results: dict[str, tuple[list[Run], Part]], path: Path) -> None:
    """Plots losses, accuracies, times, and how the accuracy depends on a word's length."""
    figure = Figure(figsize=(15, 3.9 * len(results)), layout="constrained")
    for row, (name, (runs, held_out)) in zip(
        figure.subplots(len(results), 4, squeeze=False), results.items(), strict=True
    ):
        loss, accuracy, lengths, times = row
        common.plot_losses(loss, runs)
        common.plot_accuracies(accuracy, runs)
        common.plot_times(times, runs)
        loss.set(ylabel=name)
        if runs[-1].losses[-1] < 0.2:  # the beginning, at 0.7, is cut off
            loss.set_ylim(0, 0.5)
        accuracy.set(title="held-out words all right, %")
        wrong: dict[int, list[bool]] = {}
        got = tag(runs[-1].model, held_out)
        for expected, tags in zip(held_out.tags, got, strict=True):
            wrong.setdefault(len(tags), []).append(not torch.equal(expected, tags))
        for length, flags in wrong.items():
            lengths.bar(length, 100 * sum(flags) / len(flags), color="#7a7a7a")
        lengths.set(title="words with a mistake, %, by length", xlabel="letters")
        lengths.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=80)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    choices = {"nargs": "+", "choices": LANGUAGES, "default": list(LANGUAGES)}
    add("--language", **choices, metavar="CODE", help="pt, en (both)")
    add("--words", type=int, help="number of most common words (30000; 3000 with --short)")
    add("--epochs", type=int, help="passes over the words (4; 2 with --short)")
    add("--hidden", type=int, help="hidden size of a direction (96; 32 with --short)")
    add("--layers", type=int, default=2, help="number of layers (2)")
    add("--wrong", type=int, default=12, help="number of wrong answers to show (12)")
    options = parser.parse_args(arguments)
    for name, short, full in (("words", 3000, 30_000), ("epochs", 2, 4), ("hidden", 32, 96)):
        if getattr(options, name) is None:
            setattr(options, name, short if options.short else full)
    if min(options.epochs, options.hidden, options.layers) < 1:
        parser.error("--epochs, --hidden and --layers must be at least 1")
    if options.words < 1000:
        parser.error("--words must be at least 1000")
    if options.wrong < 0:
        parser.error("--wrong must not be negative")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares and plots for each language; returns 1 if the kinds do not agree."""
    options = parse(arguments)
    common.begin(options)
    results, agree = {}, True
    for code in options.language:
        language = LANGUAGES[code]
        parts = load(language, options.words, options.seed)
        held_out = parts[1]
        tags = torch.cat(parts[0].tags)
        print(
            f"{language.name}: {len(parts[0].words):,} words to train on, {len(held_out.words):,} "
            f"held out; a hyphen may stand behind {tags.mean():.1%} of the letters"
        )
        runs = [train(kind, language, parts, options) for kind in common.kinds(options)]
        results[language.name] = runs, held_out
        never = [torch.zeros_like(t) for t in held_out.tags]
        answers = {"never a hyphen": never} | {r.title: tag(r.model, held_out) for r in runs}
        seconds = {run.title: f"{run.seconds:.1f} s" for run in runs}
        rows = [
            (
                title,
                f"{per_tag(held_out.tags, got):.2%}",
                f"{per_word(held_out.tags, got):.1%}",
                seconds.get(title, ""),
            )
            for title, got in answers.items()
        ]
        common.table(("", "tags right", "words right", "trained in"), rows)
        if len(runs) == 2:
            agree &= common.agree(runs[0].losses, runs[1].losses)
        print(
            f"  commonest words that {runs[-1].title} gets wrong: pyphen's hyphens, the network's"
        )
        rows = zip(held_out.words, held_out.tags, answers[runs[-1].title], strict=True)
        wrong = [row for row in rows if not torch.equal(*row[1:])]
        for word, expected, got in wrong[: options.wrong]:
            print(f"    {hyphenate(word, expected):20} {hyphenate(word, got)}")
    path = options.out / "tagging.png"
    plot(results, path)
    print(f"plot: {path}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

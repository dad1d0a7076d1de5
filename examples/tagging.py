"""Where may a word be hyphenated? A bidirectional LSTM tags every letter of it.

The words are the commonest that the wordfreq package ships, Portuguese and English, of four letters
and more. The tags are what the pyphen package answers from its hyphenation dictionaries: whether a
hyphen may stand behind a letter. They are the output of rules (Liang's patterns of letters), not of
people, so the accuracy says how well the network has found the rules; where it differs from
them, now and then the rules are wrong.

Synchronous many to many: embedding, LSTM layers in both directions on packed sequences, a linear
layer on the output of every step. One word in ten is held out, and words that begin with the same
five letters (hyphen, hyphens, hyphenate) are all on one side. It is trained with torch.nn and with
fusedrnn, from one seed on the same batches; the exit status is 1 if the first losses do not agree.
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
    """Where words and hyphens come from."""

    name: str
    words: str  # wordfreq's
    hyphens: str  # pyphen's
    letters: str


LANGUAGES = {
    "pt": Language("Portuguese", "pt", "pt_BR", "abcdefghijklmnopqrstuvwxyzáâãàéêíóôõúüç"),
    "en": Language("English", "en", "en_US", "abcdefghijklmnopqrstuvwxyz"),
}
SHORTEST, STEM = 4, 5  # letters of a word; first letters that words on either side do not share
TEST_SHARE = 0.1
PADDING = 0  # letter id; the letters follow
EMBEDDING, BATCH, LEARNING_RATE, DROPOUT = 32, 64, 5e-3, 0.2


@dataclass
class Part:
    """Words [samples], their letter ids and tags, each [T]: 1 where a hyphen may stand behind."""

    words: list[str]
    ids: list[Tensor]
    tags: list[Tensor]

    def batch(self, indices: Tensor) -> tuple[PackedSequence, PackedSequence]:
        """Ids and tags of the words of these indices."""
        ids, tags = (
            pack_sequence([rows[i] for i in indices.tolist()], enforce_sorted=False)
            for rows in (self.ids, self.tags)
        )
        return ids, tags


def load(language: Language, number: int, seed: int) -> tuple[Part, Part]:
    """Training and held-out words of the `number` commonest; none with foreign letters."""
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
    """The word with its hyphens: banana, [0, 1, 0, 1, 0, 0] to ba-na-na."""
    pairs = zip(word, tags.tolist(), strict=True)
    return "".join(letter + "-" * int(tag) for letter, tag in pairs)


class Tagger(nn.Module):
    """Packed letter ids to a score for every one of them; above 0 is a hyphen."""

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
    """Other data, for every step of the same sequences."""
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


@torch.no_grad()
def tag(model: nn.Module, part: Part) -> list[Tensor]:
    """The network's tags of all words."""
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
    """Losses, accuracies and times, and how the accuracy depends on a word's length."""
    figure = Figure(figsize=(15, 3.9 * len(results)), layout="constrained")
    for row, (name, (runs, held_out)) in zip(
        figure.subplots(len(results), 4, squeeze=False), results.items(), strict=True
    ):
        loss, accuracy, lengths, times = row
        common.plot_losses(loss, runs)
        common.plot_accuracies(accuracy, runs)
        common.plot_times(times, runs)
        loss.set(ylabel=name)
        if runs[-1].losses[-1] < 0.2:  # where it begins, at 0.7, is of no interest
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
    """The command line."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    choices = {"nargs": "+", "choices": LANGUAGES, "default": list(LANGUAGES)}
    add("--language", **choices, metavar="CODE", help="pt, en (both)")
    add("--words", type=int, help="the commonest to choose from (30000; 3000 with --short)")
    add("--epochs", type=int, help="passes over the words (4; 2 with --short)")
    add("--hidden", type=int, help="hidden size of a direction (96; 32 with --short)")
    add("--layers", type=int, default=2, help="number of layers (2)")
    add("--wrong", type=int, default=12, help="words to show that it gets wrong (12)")
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
    """Trains, compares and plots for every language; 1 if the kinds do not agree."""
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

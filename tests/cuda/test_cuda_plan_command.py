"""`python -m fusedrnn plan` prints how a GPU would run a layer, on a machine without one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from fusedrnn.__main__ import main
from fusedrnn._cards import CARDS, card_named, card_spelled
from tools import cuda_estimates

NAMES = [
    *("T4", "A100", "A100 80GB", "RTX 3090", "RTX 4090"),
    *("L4", "H100", "H200", "B200", "RTX 5090"),
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "cuda.md"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["plan", *arguments]) == status
    return capsys.readouterr().out


def test_one_pass_of_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(
        capsys,
        *("--cell", "lstm", "--dtype", "bfloat16", "--shape", "150,32,1024,1024"),
        *("--arch", "sm_90", "--pass", "forward"),
    )
    assert "lstm bf16 forward on H100 (sm_90): T=150 N=32 I=1024 H=1024" in out
    assert re.search(r"resident, mma.sync: \d+ x \d+ x 1 blocks", out)
    assert re.search(r"estimate: .* us a step .*, limited by \w+", out)


def test_a_chosen_plan(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("--dtype", "bf16", "--shape", "150,32,1024,1024", "--pass", "backward")
    out = plan(capsys, *layer, "--arch", "h100", "--choice", "cluster=4")
    assert "clusters of 4 blocks share the source; " in out
    out = plan(capsys, *layer, "--arch", "a100", "--choice", "cluster=4", status=1)
    assert "the chosen plan: cannot run, this device has no clusters" in out


def test_both_passes_on_every_card(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--cell", "gru", "--shape", "10,4,32,64", "--bidirectional")
    assert re.findall(r"gru f32 forward on (.+) \(sm_\d+\): .* D=2", out) == NAMES
    assert re.findall(r"gru f32 backward on (.+) \(sm_\d+\): .* D=2", out) == NAMES


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        *((name, name) for name in NAMES),
        *((card.driver_name, card.name) for card in CARDS),
        ("h200", "H200"),
        ("rtx 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("RTX_4090", "RTX 4090"),
        ("rtx-5090", "RTX 5090"),
        ("a100", "A100"),
        ("a100-80gb", "A100 80GB"),
        ("sm_75", "T4"),
        ("sm_89", "RTX 4090"),
        ("SM90", "H100"),
    ],
)
def test_a_card_by_any_spelling(
    capsys: pytest.CaptureFixture[str], spelled: str, name: str
) -> None:
    assert card_spelled(spelled) == name
    out = plan(capsys, "--shape", "10,4,32,64", "--pass", "forward", "--arch", spelled)
    assert out.count("\nestimate: ") == 1
    assert out.startswith(f"lstm f32 forward on {name} (sm_")


def test_cards_in_the_order_in_which_they_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = plan(capsys, "--shape", "10,4,32,64", "--pass", "forward", "--arch=l4", "--arch=A100")
    assert re.findall(r" on (.+) \(sm_", out) == ["L4", "A100"]


@pytest.mark.parametrize(
    ("device_name", "capability", "name"),
    [
        ("Tesla T4", 75, "T4"),
        ("NVIDIA A100-SXM4-40GB", 80, "A100"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100 80GB"),
        ("NVIDIA GeForce RTX 3090", 86, "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", 89, "RTX 4090"),
        ("NVIDIA L4", 89, "L4"),
        ("NVIDIA H100 80GB HBM3", 90, "H100"),
        ("NVIDIA H200", 90, "H200"),
        ("NVIDIA B200", 100, "B200"),
        ("NVIDIA GeForce RTX 5090", 120, "RTX 5090"),
        # These have no entry, and get the first card of the nearest capability.
        ("NVIDIA H100 PCIe", 90, "H100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 90, "H100"),
        ("NVIDIA A100 80GB PCIe", 80, "A100"),
        ("NVIDIA L40S", 89, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 89, "RTX 4090"),
        ("NVIDIA GeForce GTX 1650", 75, "T4"),
        ("NVIDIA RTX A6000", 86, "RTX 3090"),
        ("Orin", 87, "RTX 3090"),
        ("NVIDIA B300 SXM6 AC", 103, "B200"),
        ("NVIDIA GB10", 121, "RTX 5090"),
        ("NVIDIA of years to come", 150, "RTX 5090"),
    ],
)
def test_the_card_of_a_device(device_name: str, capability: int, name: str) -> None:
    assert card_named(device_name, capability) == name


def test_the_cards_are_sorted_by_capability() -> None:
    """The choice of the nearest one relies on this order."""
    capabilities = [card.capability for card in CARDS]
    assert capabilities == sorted(capabilities)


def test_a_device_that_is_too_old() -> None:
    with pytest.raises(
        ValueError,
        match="capability must be at least 75, of sm_75, got 70 of 'Tesla V100-SXM2-16GB'",
    ):
        card_named("Tesla V100-SXM2-16GB", 70)


def test_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--shape", "20,16,64,256", "--arch", "sm_80")
    assert "FMA" in plan(capsys, *shape)
    assert "mma.sync" in plan(capsys, *shape, "--tf32")
    assert "per step" in plan(capsys, *shape, "--regime", "per_step")
    assert "P=32" in plan(capsys, *shape, "--cell", "lstm_proj", "--proj", "32")
    assert "streamed" in plan(capsys, *shape, "--dtype", "f64")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--shape", "10,4,64,64", "--dtype", "f64"], "float64 has no resident kernel"),
        (["--shape", "10,4,64,8192"], "the recurrent weights do not fit the device's registers"),
        (["--shape", "10,9999,64,64"], "9999 sequences do not fit .*, fewer would"),
        (["--shape", "9999999,4,64,512"], r"T \* H is more than a barrier can count"),
        (
            ["--shape", "10,4,64,64", "--cell", "lstm_proj", "--proj", "9"],
            "a projection has no resident kernel",
        ),
    ],
)
def test_a_regime_that_cannot_run(
    capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    """The command says why and prints no estimate. Without --regime another regime runs."""
    one = [*arguments, "--arch", "sm_90"]
    out = plan(capsys, *one, "--regime", "resident", status=1)
    assert len(re.findall(f"resident: cannot run, {why}", out)) == 2
    assert "estimate" not in out and "per step" not in out
    assert len(re.findall("\n(?:streamed, |per step: )", plan(capsys, *one))) == 2


def test_a_regime_that_runs_in_one_direction_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--dtype", "bf16", "--shape", "100,8,2048,2048", "--arch", "sm_90"]
    out = plan(capsys, *shape, "--regime", "resident", status=1)
    assert len(re.findall("resident, mma.sync", out)) == 1
    assert len(re.findall("resident: cannot run", out)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --shape"),
        (["--shape", "1,2,3"], "must be T,N,I,H, four integers .*got '1,2,3'"),
        (["--shape", "1,2,3,x"], "must be T,N,I,H, four integers"),
        (["--shape", "1,0,3,4"], r"must be integers in \[1, 2147483647\], got '1,0,3,4'"),
        (["--shape", f"1,2,3,{2**31}"], r"must be integers in \[1, 2147483647\], got '1,2,3,2147"),
        (["--shape", f"{10**30},2,3,4"], r"must be integers in \[1, 2147483647\], got '10000000"),
        (
            ["--shape", "1,2,3,4", "--arch", "sm_60"],
            r"must be one of T4 \(sm_75\), .*, got 'sm_60'",
        ),
        (["--shape", "1,2,3,4", "--arch", "h300"], r"must be one of .*H200 \(sm_90\), .*'h300'"),
        (["--shape", "1,2,3,4", "--arch", ""], "must be one of .*, got ''"),
        (["--shape", "1,2,3,4", "--dtype", "int8"], "must be one of f32, f64, f16, bf16, got 'int"),
        (["--shape", "1,2,3,4", "--cell", "lstm_proj"], "--cell lstm_proj needs --proj"),
        (
            ["--shape", "1,2,3,4", "--cell", "gru", "--proj", "2"],
            "--proj goes with --cell lstm_proj alone, got --cell gru",
        ),
        (
            ["--shape", "1,2,3,4", "--cell", "lstm_proj", "--proj", "5"],
            r"--proj must be in \[1, H\] = \[1, 4\], got 5",
        ),
        (
            ["--shape", "1,2,3,4", "--choice", "cluster=3"],
            "error: --choice must be cluster=1, 2, 4 or 8, got 'cluster=3'",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.startswith("usage: python -m fusedrnn plan ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "lsmt"}, "cell must be one of"),
        ({1: "f8"}, "dtype must be f32, f64, f16 or bf16, got 'f8'"),
        ({2: [1, 2]}, "sizes must be T, N, I, H, P, D, got 2 of them"),
        ({2: [1, 2, 3, 4, 4, -1]}, r"sizes must be positive and below 2\^31, got -1"),
        ({3: "sm_1"}, r"arch must be one of T4 \(sm_75\), .*, got 'sm_1'"),
        ({6: "fast"}, "regime must be resident, streamed or per_step, got 'fast'"),
    ],
)
def test_mistakes_of_the_op(change: dict[int, object], message: str) -> None:
    arguments = ["lstm", "f32", [1, 1, 1, 1, 1, 1], "sm_80", False, False, ""]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedrnn._plan(*arguments)


def test_the_largest_sizes_have_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    largest = str(2**31 - 1)
    out = plan(capsys, "--shape", ",".join([largest] * 4), "--bidirectional")
    assert out.count("\nper step: ") == out.count("\nestimate: ") == 2 * len(CARDS)
    assert not re.search(r"-\d|nan|inf", out)


def test_without_a_command_it_shows_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "instruction set chosen" in capsys.readouterr().out


def test_the_documented_estimates_are_up_to_date(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_estimates", str(DOCUMENT), "--check"])
    assert cuda_estimates.main() == 0, capsys.readouterr().out
    other = tmp_path / "cuda.md"
    text = DOCUMENT.read_text()
    other.write_text(text.replace("| H200 (sm_90) | 1.", "| H200 (sm_90) | 7."))
    assert other.read_text() != text
    monkeypatch.setattr(sys, "argv", ["cuda_estimates", str(other), "--check"])
    assert cuda_estimates.main() == 1
    assert str(other) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["cuda_estimates", str(other)])
    assert cuda_estimates.main() == 0
    assert other.read_text() == text

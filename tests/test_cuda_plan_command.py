"""`python -m fusedrnn plan`: what a GPU would run, on a machine without one."""

from __future__ import annotations

import re

import pytest
import torch

from fusedrnn.__main__ import main


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["plan", *arguments])
    return capsys.readouterr().out


def test_one_pass_of_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(
        capsys,
        *("--cell", "lstm", "--dtype", "bfloat16", "--shape", "150,32,1024,1024"),
        *("--arch", "sm_90", "--pass", "forward"),
    )
    assert "lstm bf16 forward on sm_90 (H100 SXM): T=150 N=32 I=1024 H=1024" in out
    assert re.search(r"resident, mma.sync: \d+ x \d+ x 1 blocks", out)
    assert re.search(r"estimate: .* us a step .*, limited by \w+", out)


def test_both_passes_on_every_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--cell", "gru", "--shape", "10,4,32,64", "--bidirectional")
    for arch in torch.ops.fusedrnn._plan_architectures().split(", "):
        for which in ("forward", "backward"):
            assert f"gru f32 {which} on {arch} " in out
    assert "D=2" in out


def test_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--shape", "20,16,64,256", "--arch", "sm_80")
    assert "FMA" in plan(capsys, *shape)
    assert "mma.sync" in plan(capsys, *shape, "--tf32")
    assert "per step" in plan(capsys, *shape, "--regime", "per_step")
    assert "P=32" in plan(capsys, *shape, "--cell", "lstm_proj", "--proj", "32")
    assert "float64 has no resident kernel" in plan(capsys, *shape, "--dtype", "f64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --shape"),
        (["--shape", "1,2,3"], "must be T,N,I,H, four integers .*got '1,2,3'"),
        (["--shape", "1,2,3,x"], "must be T,N,I,H, four integers"),
        (["--shape", "1,0,3,4"], "must be positive, got '1,0,3,4'"),
        (["--shape", "1,2,3,4", "--arch", "sm_60"], "invalid choice: 'sm_60'.*sm_75"),
        (["--shape", "1,2,3,4", "--dtype", "int8"], "must be one of f32, f64, f16, bf16, got 'int"),
        (["--shape", "1,2,3,4", "--cell", "lstm_proj"], "--proj goes with --cell lstm_proj"),
        (["--shape", "1,2,3,4", "--proj", "2"], "--proj goes with --cell lstm_proj"),
        (
            ["--shape", "1,2,3,4", "--cell", "lstm_proj", "--proj", "5"],
            r"--proj must be in \[1, H\] = \[1, 4\], got 5",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "lsmt"}, "cell must be one of"),
        ({1: "f8"}, "dtype must be f32, f64, f16 or bf16, got 'f8'"),
        ({2: [1, 2]}, "sizes must be T, N, I, H, P, D, got 2 of them"),
        ({2: [1, 2, 3, 4, 4, -1]}, r"sizes must be positive and below 2\^31, got -1"),
        ({3: "sm_1"}, "arch must be one of sm_75, .*, got 'sm_1'"),
        ({6: "fast"}, "regime must be resident or per_step, got 'fast'"),
    ],
)
def test_mistakes_of_the_op(change: dict[int, object], message: str) -> None:
    arguments = ["lstm", "f32", [1, 1, 1, 1, 1, 1], "sm_80", False, False, ""]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedrnn._plan(*arguments)


def test_without_a_command_it_shows_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "instruction set chosen" in capsys.readouterr().out

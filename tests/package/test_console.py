"""Commands whose output is not read to its end, such as `python -m fusedrnn plan | head`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedrnn import _console

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a stdout that nothing reads. It must print nothing to stderr."""
    read, write = os.pipe()
    os.close(read)
    try:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fusedrnn"],
        ["fusedrnn", "plan", "--shape", "100,32,256,256"],
        ["fusedrnn.selftest", "--device=cpu", "--quick", "--no-benchmark", "--out={tmp}"],
        ["benchmarks", "compare", *["benchmarks/results/isa-avx2.json"] * 2],
        ["tools.gpu.one", "--cell=lstm", "--shape=3,2,4,5", "--device=cpu"],
    ],
    ids=" ".join,
)
def test_a_reader_that_stops_early(arguments: list[str], tmp_path: Path) -> None:
    done = run("-m", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(tmp_path: Path) -> None:
    program = (
        "from fusedrnn import _console\n"
        "def main(): raise BrokenPipeError('of a worker')\n"
        "_console.run(main)"
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    done = subprocess.run(
        [sys.executable, path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "BrokenPipeError: of a worker" in done.stderr


@pytest.mark.parametrize("status", [None, 0, 3])
def test_exit_status(status: int | None) -> None:
    with pytest.raises(SystemExit) as caught:
        _console.run(lambda: status)
    assert caught.value.code == status

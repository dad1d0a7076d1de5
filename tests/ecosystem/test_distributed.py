"""DDP and FSDP2 under torchrun: two processes on the CPU compute the same as one, in float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.kit.layers import assert_same, error

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
# The module behind torchrun, for the Python that runs the tests.
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch was built without torch.distributed's gloo",
)


def run(*command: str, cwd: Path, **variables: str) -> str:
    """Runs a Python program with fusedrnn on its path and one thread; returns what it prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results that the worker saved, from one process, from DDP and from FSDP2."""
    folder = tmp_path_factory.mktemp("distributed")
    for kind in ("one", "ddp", "fsdp"):
        launcher = () if kind == "one" else LAUNCHER
        run(*launcher, str(WORKER), kind, str(folder), cwd=folder)
    return {kind: torch.load(folder / f"{kind}.pt") for kind in ("one", "ddp", "fsdp")}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_compute_the_same_as_one(trained: dict[str, Any], kind: str) -> None:
    """The losses of all steps, the first gradients and the last parameters are compared."""
    assert trained[kind]["parameter"] == {"ddp": "Parameter", "fsdp": "DTensor"}[kind]
    actual, expected = trained[kind]["unbroken"], trained["one"]["unbroken"]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert actual["losses"][-1] != pytest.approx(actual["losses"][0], rel=1e-3)
    assert_same(actual["gradients"], expected["gradients"])
    assert_same(actual["parameters"], expected["parameters"])


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_a_checkpoint_is_resumed_by_a_new_model(trained: dict[str, Any], kind: str) -> None:
    """The results are the same bits as without a break.

    The checkpoint is written by torch.save; for FSDP2 by torch.distributed.checkpoint.
    """
    unbroken, resumed = trained[kind]["unbroken"], trained[kind]["resumed"]
    assert resumed["losses"] == unbroken["losses"][-len(resumed["losses"]) :]
    for name, expected in unbroken["parameters"].items():
        assert torch.equal(resumed["parameters"][name], expected), name


def test_fsdp_in_bfloat16(trained: dict[str, Any]) -> None:
    """With MixedPrecisionPolicy the layers compute in bfloat16; the gradients are float32."""
    reduced, exact = trained["fsdp"]["bfloat16"], trained["one"]["unbroken"]["gradients"]
    assert reduced["seen"] == [torch.bfloat16]
    assert reduced["gradients"].keys() == exact.keys()
    for name, gradient in reduced["gradients"].items():
        assert gradient.dtype == torch.float32
        # bfloat16 has 2 to 3 significant digits, and the gradients pass through six layers.
        assert error(gradient, exact[name]) < 0.1, name


def test_the_program_of_the_docs(tmp_path: Path) -> None:
    """The program of docs/distributed.md learns with FSDP2, and torch.nn's GRU reads its file."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "train.py").write_text(program)
    said = run(*LAUNCHER, "train.py", "--fsdp", cwd=tmp_path, STEPS="20")
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 4.6  # log(100): the text has about a hundred characters
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    gru = {name[4:]: t for name, t in state.items() if name.startswith("gru.")}
    torch.nn.GRU(32, 128, num_layers=2).load_state_dict(gru, strict=True)

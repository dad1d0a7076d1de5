"""DDP and FSDP2 under torchrun, two processes on the CPU: what one process computes, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers import assert_same, error

HERE = Path(__file__).resolve().parent
WORKER = HERE / "distributed_worker.py"

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch was built without torch.distributed's gloo",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker saved: by one process, by DDP and by FSDP2."""
    folder = tmp_path_factory.mktemp("distributed")
    root = str(HERE.parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    results = {}
    for kind in ("one", "ddp", "fsdp"):
        start = [] if kind == "one" else launcher
        done = subprocess.run(
            [sys.executable, *start, str(WORKER), kind, str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{kind}\n{done.stdout}\n{done.stderr}"
        results[kind] = torch.load(folder / f"{kind}.pt")
    return results


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(trained: dict[str, Any], kind: str) -> None:
    """Losses of all steps, the gradients of the first, the parameters after AdamW and clipping."""
    assert trained[kind]["parameter"] == {"ddp": "Parameter", "fsdp": "DTensor"}[kind]
    actual, expected = trained[kind]["unbroken"], trained["one"]["unbroken"]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert actual["losses"][-1] != pytest.approx(actual["losses"][0], rel=1e-3)
    assert_same(actual["gradients"], expected["gradients"])
    assert_same(actual["parameters"], expected["parameters"])


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_a_new_model_goes_on_from_a_checkpoint(trained: dict[str, Any], kind: str) -> None:
    """The same bits as without a break: torch.save, and torch.distributed.checkpoint for FSDP2."""
    unbroken, resumed = trained[kind]["unbroken"], trained[kind]["resumed"]
    assert resumed["losses"] == unbroken["losses"][-len(resumed["losses"]) :]
    for name, expected in unbroken["parameters"].items():
        assert torch.equal(resumed["parameters"][name], expected), name


def test_fsdp_in_bfloat16(trained: dict[str, Any]) -> None:
    """MixedPrecisionPolicy(bfloat16): layers compute in it, gradients come in float32."""
    reduced, exact = trained["fsdp"]["bfloat16"], trained["one"]["unbroken"]["gradients"]
    assert reduced["seen"] == [torch.bfloat16]
    assert reduced["gradients"].keys() == exact.keys()
    for name, gradient in reduced["gradients"].items():
        assert gradient.dtype == torch.float32
        # 2 to 3 significant digits, through six layers.
        assert error(gradient, exact[name]) < 0.1, name

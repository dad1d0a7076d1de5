"""Calls that the CUDA ops refuse, and the errors they raise, with kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedrnn
import setup_build
from fusedrnn._errors import REGIME_TAG
from tests.kit.arguments import make_arguments
from tests.kit.torch_device import TorchDevice

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)


def test_a_reserve_of_the_cpu_is_refused(gpu: dict[str, Any]) -> None:
    call = make_arguments("lstm", dtype=torch.float32, requires_grad=False)
    y, _, _, reserve = torch.ops.fusedrnn.forward(*call.op_arguments())
    x, h0, c0, weights, batch_sizes, lengths, *options, _ = call.op_arguments()
    with pytest.raises(RuntimeError, match="reserve must be uint8, got float32"):
        gpu["backward"](
            *(y, None, None, x, h0, c0, weights, reserve, batch_sizes, lengths, *options),
            *(True, True, True),
        )


def test_regime_by_a_wrong_name(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", "fast")
    call = make_arguments("lstm", dtype=torch.float32, requires_grad=False)
    with pytest.raises(RuntimeError, match="FUSEDRNN_CUDA_REGIME must be resident, streamed or p"):
        gpu["forward"](*call.op_arguments())


def test_a_plan_in_wrong_words(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_PLAN", "unit=4")
    call = make_arguments("lstm", dtype=torch.float32, requires_grad=False)
    with pytest.raises(RuntimeError, match="FUSEDRNN_CUDA_PLAN must be some of cores=, units=, ro"):
        gpu["forward"](*call.op_arguments())


def test_a_plan_that_does_not_fit(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_PLAN", "rows=77")
    call = make_arguments("lstm", N=9, dtype=torch.float32, requires_grad=False)
    with pytest.raises(RuntimeError, match="rows=77 does not fit, what fits is rows=9 with units="):
        gpu["forward"](*call.op_arguments())


@pytest.mark.parametrize("limit", ["0", "-1", "fast", "1e6", "4294967296", " 5"])
def test_spin_limits_that_are_refused(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_SPIN_LIMIT", limit)
    call = make_arguments("lstm", dtype=torch.float32, requires_grad=False)
    with pytest.raises(
        RuntimeError,
        match=f"SPIN_LIMIT must be a whole number from 1 to 4294967295, got '{limit}'",
    ):
        gpu["forward"](*call.op_arguments())


def test_the_spin_limit_reaches_the_kernels(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of 1 a kernel gives up, since no block finds the others at its first look."""
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", "resident")
    call = make_arguments("lstm", H=40, dtype=torch.float32, requires_grad=False)
    monkeypatch.setenv("FUSEDRNN_CUDA_SPIN_LIMIT", "1")
    with pytest.raises(RuntimeError, match=r"assert.*in resident_forward_fma_f32"):
        gpu["forward"](*call.op_arguments())
    monkeypatch.setenv("FUSEDRNN_CUDA_SPIN_LIMIT", "4294967295")
    gpu["forward"](*call.op_arguments())


def test_regime_that_cannot_run(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", "resident")
    call = make_arguments("lstm_proj", dtype=torch.float32, requires_grad=False)
    with pytest.raises(RuntimeError) as refused:
        gpu["forward"](*call.op_arguments())
    assert str(refused.value).endswith(REGIME_TAG)


@pytest.mark.usefixtures("everywhere")
def test_lack_of_memory_if_torch_gives_no_reason(device: TorchDevice) -> None:
    """torch before 2.13 gives none."""
    layer = fusedrnn.FusedGRU(3, 4)
    x = torch.randn(5, 2, 3)
    y = layer(x)[0]
    device.full = True
    for call in (lambda: layer(x), lambda: layer(x.detach()), lambda: y.sum().backward()):
        device.memory_left = lambda: (7, 1000)
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"Tried to allocate \d+ bytes \(7 of 1000 free\); .* more\. A smaller batch",
        ):
            call()


@pytest.mark.usefixtures("everywhere")
def test_a_broken_device_is_not_reported_as_lack_of_memory(device: TorchDevice) -> None:
    def lost() -> tuple[int, int]:
        raise RuntimeError("cudaMemGetInfo failed: cudaErrorIllegalAddress")

    device.full, device.memory_left = True, lost
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress") as caught:
        fusedrnn.FusedGRU(3, 4)(torch.randn(5, 2, 3))
    assert not isinstance(caught.value, torch.OutOfMemoryError)


@pytest.mark.parametrize("name", ["x", "h0", "weight_hh", "reserve"])
def test_a_storage_that_was_freed(gpu: dict[str, Any], name: str) -> None:
    call = make_arguments("lstm", dtype=torch.float32, requires_grad=False)
    y, _, _, reserve = gpu["forward"](*call.op_arguments())
    x, h0, c0, weights, batch_sizes, lengths, *options, _ = call.op_arguments()
    freed = {"x": x, "h0": h0, "weight_hh": weights[1], "reserve": reserve}[name]
    freed.untyped_storage().resize_(4)
    backward = (y, None, None, x, h0, c0, weights, reserve, batch_sizes, lengths, *options)
    runs = [lambda: gpu["forward"](*call.op_arguments())] if name != "reserve" else []
    runs += [lambda: gpu["backward"](*backward, True, True, True)] if name != "h0" else []
    for run in runs:
        with pytest.raises(RuntimeError, match=f"{name} must have a storage of .* of 4: its"):
            run()

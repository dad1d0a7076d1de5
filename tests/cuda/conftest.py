"""The fixtures of the real bindings on CPU tensors, with kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fusedrnn import _raw_ops
from tests.kit.bindings import binding, ptx
from tests.kit.torch_device import TorchDevice, using


@pytest.fixture
def device() -> TorchDevice:
    return TorchDevice(ptx(80))


@pytest.fixture
def gpu(device: TorchDevice) -> Iterator[dict[str, Any]]:
    with using(device) as gpu_ops:
        yield gpu_ops


@pytest.fixture
def everywhere(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and functions on CPU tensors run the CUDA ops."""
    for name, attribute in (
        ("_forward_now", "forward"),
        ("_backward_now", "backward"),
        ("_step_now", "_step"),
        ("_step_backward_now", "_step_backward"),
    ):
        monkeypatch.setattr(_raw_ops, name, gpu[attribute])


@pytest.fixture
def by_name() -> Iterator[None]:
    """Torch lacks the C functions for products, as far as the bindings know."""
    binding().use_c_functions(False)
    yield
    binding().use_c_functions(True)

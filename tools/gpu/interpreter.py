"""Runs the CUDA library's host code on CPU tensors, with its kernels in the tests' interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fusedrnn import _raw_ops
from fusedrnn.selftest import Selftest


class Context:
    """Holds the PTX interpreter if it replaces a GPU in this process."""

    interpreter: Any = None


class Interpreted(Selftest):
    """The selftest with the interpreter: the device is torch's CPU, but it has TF32."""

    def why_no_tf32(self) -> str:
        """Returns "", because products can be computed in TF32."""
        return ""


@contextlib.contextmanager
def interpreted() -> Iterator[Any]:
    """Makes the ops on CPU tensors those of the CUDA library, with kernels in the interpreter."""
    from tests.kit.bindings import ptx
    from tests.kit.device import Limits
    from tests.kit.torch_device import TorchDevice, using

    limits = Limits(capability=90, sms=8, cluster_blocks=(8, 8, 8))
    device = TorchDevice(ptx(80, clusters=True), limits=limits)
    before = _raw_ops._forward_now, _raw_ops._backward_now
    with using(device) as gpu:
        _raw_ops._forward_now, _raw_ops._backward_now = gpu["forward"], gpu["backward"]
        try:
            yield device
        finally:
            _raw_ops._forward_now, _raw_ops._backward_now = before

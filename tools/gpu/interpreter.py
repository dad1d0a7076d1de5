"""The CUDA library on CPU tensors: its own host code, its kernels in the tests' interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fusedrnn import _raw_ops
from fusedrnn.selftest import Selftest


class Context:
    """What stands in for a GPU in this process: the PTX interpreter, or nothing."""

    interpreter: Any = None


class Interpreted(Selftest):
    """The selftest on that device, which is torch's CPU and has TF32 nevertheless."""

    def why_no_tf32(self) -> str:
        """Nothing keeps products from being computed in TF32."""
        return ""


@contextlib.contextmanager
def interpreted() -> Iterator[Any]:
    """The ops of the CUDA library on CPU tensors, their kernels in the interpreter of the tests."""
    from tests.torch_cuda.build import ptx
    from tests.torch_cuda.device import TorchDevice, using

    device = TorchDevice(ptx(80))
    before = _raw_ops._forward_now, _raw_ops._backward_now
    with using(device) as gpu:
        _raw_ops._forward_now, _raw_ops._backward_now = gpu["forward"], gpu["backward"]
        try:
            yield device
        finally:
            _raw_ops._forward_now, _raw_ops._backward_now = before

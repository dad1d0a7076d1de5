"""A GPU for torch's CPU tensors: the device of tests.kit.device may access their memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.kit.bindings import binding
from tests.kit.device import Device, Limits


class TorchDevice(Device):
    """Starts kernels in the interpreter. They access memory that torch allocated."""

    # Whether no memory is left. torch then fails without a message, as before 2.13.
    full = False

    def __init__(self, ptx: Sequence[Path], seed: int = 1, limits: Limits | None = None) -> None:
        super().__init__(list(ptx), seed, limits)
        self._lent: list[Tensor] = []

    def memory_left(self) -> tuple[int, int]:
        """The free bytes and all bytes of the device."""
        raise NotImplementedError("only a device that is full is asked")

    def lend(self, address: int, size: int, writable: bool) -> None:
        """Lets kernels access memory. The caller keeps it alive."""
        if size:
            raw = (ctypes.c_char * size).from_address(address)
            self.memory.add(np.frombuffer(raw, np.uint8), "tensor", writable=writable)

    def lend_tensors(self, values: Any) -> None:
        """Lets kernels read every tensor in the arguments of an op."""
        if isinstance(values, (list, tuple)):
            for value in values:
                self.lend_tensors(value)
        elif isinstance(values, Tensor):
            storage = values.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size and self.memory._holder(address, size) is None:
                self._lent.append(values)
                self.lend(address, size, False)


@contextmanager
def using(device: TorchDevice) -> Iterator[dict[str, Any]]:
    """The ops of torch.ops.fusedrnn_gpu by name. They run on `device`."""
    module = binding()

    def on_device(op: Any) -> Any:
        def call(*args: Any) -> Any:
            device.lend_tensors(args)
            return op(*args)

        return call

    module.use(device)
    try:
        ops = torch.ops.fusedrnn_gpu
        names = ("forward", "backward", "_step", "_step_backward")
        yield {name: on_device(getattr(ops, name).default) for name in names}
    finally:
        module.use(None)

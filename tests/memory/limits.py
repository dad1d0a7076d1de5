"""Runs layers and cells under a limit of memory that grows until they fit.

Each run must either raise an error about memory or give the right results. It is a process of its
own, because it limits the memory of the whole process:

    python -m tests.memory.limits
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedrnn
from tests.kit.layers import flat, randn


def used() -> int:
    """Bytes of address space that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit(more: int | None) -> None:
    """Lets the process allocate `more` bytes beyond those that it has; None removes the limit."""
    most = resource.RLIM_INFINITY if more is None else used() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def calls() -> list[tuple[str, Callable[[], list[Tensor]]]]:
    """Names of layers and cells, each with a function that runs its forward and backward."""
    result: list[tuple[str, Callable[[], list[Tensor]]]] = []

    def add(name: str, module: Any, input: Tensor, autocast: bool = False) -> None:
        leaves = [input.requires_grad_(), *module.parameters()]

        def call() -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = flat(module(input))
            gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
            return [*outputs, *gradients]

        result.append((name, call))

    f32, bf16 = torch.float32, torch.bfloat16
    # With these odd sizes bfloat16 is computed in float32. With batch_first, x and the gradient of
    # y are copied.
    lstm, gru = fusedrnn.FusedLSTM, fusedrnn.FusedGRU
    add("LSTM", lstm(65, 129, batch_first=True), randn(60, 100, 65, dtype=f32))
    add("LSTM bfloat16", lstm(65, 129).to(bf16), randn(100, 60, 65, dtype=bf16))
    add("GRU", gru(65, 129, bidirectional=True), randn(100, 60, 65, dtype=f32))
    add("LSTM autocast", lstm(65, 129), randn(100, 60, 65, dtype=f32), True)
    add("GRUCell", fusedrnn.FusedGRUCell(801, 901), randn(500, 801, dtype=f32))
    add("LSTMCell bfloat16", fusedrnn.FusedLSTMCell(801, 901).to(bf16), randn(500, 801, dtype=bf16))
    return result


def main() -> None:
    torch.set_num_threads(1)
    for name, call in calls():
        wanted = call()
        tried = failed = 0
        step = 1 << 20
        # Each round allows one step more, until the call succeeds.
        while True:
            limit(tried * step)
            try:
                got = call()
            except (RuntimeError, MemoryError) as error:
                limit(None)
                said = str(error)
                assert "memory" in said, f"{name} with {tried * step} bytes more: {said}"
                failed += 1
                del error
            else:
                limit(None)
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name
                break
            tried += 1
        got = call()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name
        print(name, failed, "errors", flush=True)
    print("done")


if __name__ == "__main__":
    main()

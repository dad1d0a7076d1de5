"""Runs layers and cells under a limit of memory that grows until they fit.

Each run must either raise an error about memory or give the right results. It is a process of its
own, because it limits the memory of the whole process:

    python -m tests.memory.limits
"""

from __future__ import annotations

import functools
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedrnn
from tests.kit.layers import randn
from tests.memory.calls import Call, same, training


def used() -> int:
    """Bytes of address space that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit(more: int | None) -> None:
    """Lets the process allocate `more` bytes beyond those that it has; None removes the limit."""
    most = resource.RLIM_INFINITY if more is None else used() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def calls() -> list[tuple[str, Call]]:
    """Names of layers and cells, each with a function that runs its forward and backward."""
    result: list[tuple[str, Call]] = []

    def add(name: str, module: Any, input: Tensor, **options: Any) -> None:
        result.append((name, training(module, input, **options)))

    f32, bf16 = torch.float32, torch.bfloat16
    # With these odd sizes bfloat16 is computed in float32. With batch_first, x and the gradient of
    # y are copied.
    lstm, gru = fusedrnn.FusedLSTM, fusedrnn.FusedGRU
    add("LSTM", lstm(65, 129, batch_first=True), randn(60, 100, 65, dtype=f32))
    add("LSTM bfloat16", lstm(65, 129).to(bf16), randn(100, 60, 65, dtype=bf16))
    add("GRU", gru(65, 129, bidirectional=True), randn(100, 60, 65, dtype=f32))
    autocast = functools.partial(torch.autocast, "cpu", bf16)
    add("LSTM autocast", lstm(65, 129), randn(100, 60, 65, dtype=f32), mode=autocast)
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
                assert same(got, wanted), name
                break
            tried += 1
        assert same(call(), wanted), name
        print(name, failed, "errors", flush=True)
    print("done")


if __name__ == "__main__":
    main()

"""Repeats a call and lets another one of its allocations fail each time.

Each call must either raise an error about memory or give the right results, and the next call must
be right. It is a process of its own, in which failing.so replaces the allocation functions:

    LD_PRELOAD=failing.so python -m tests.memory.refusals THREADS CALL...
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch
from torch import Tensor

import fusedrnn
from tests.kit.layers import CELLS, make_states, map_tensors, randn
from tests.memory.calls import Call, same, training

memory = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[0])


def calls() -> list[tuple[str, Call]]:
    """Names of layers and cells, each with a function that runs its forward and backward.

    The sizes are large enough for several threads; some calls are divided by rows, some by units.
    """
    result: list[tuple[str, Call]] = []

    def add(name: str, module: Any, input: Any, hx: Any, **kwargs: Any) -> None:
        result.append((name, training(module, input, hx, **kwargs)))

    kinds = [
        (1, "plain", torch.float32),
        (6, "lengths", torch.float32),
        (6, "packed", torch.float32),
        (6, "plain", torch.bfloat16),
    ]
    for k, cell in enumerate(CELLS):
        # The first cell takes all four kinds of calls, every other cell one of them.
        for N, form, dtype in kinds if k == 0 else [kinds[k % 4]]:
            module = cell.make(33, 260, bidirectional=form != "plain")[0].to(dtype)
            x = randn(5, N, 33, dtype=dtype)
            input: Any = x
            kwargs = {}
            lengths = torch.tensor([5, 4, 4, 2, 1, 1])
            if form == "lengths":
                kwargs["lengths"] = lengths
            if form == "packed":
                input = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
                input = map_tensors(Tensor.detach, input)
            add(f"{cell}, {form}, {dtype}", module, input, make_states(module, N, dtype), **kwargs)
    for kind, dtype in (
        (fusedrnn.FusedLSTMCell, torch.bfloat16),
        (fusedrnn.FusedGRUCell, torch.float32),
        (fusedrnn.FusedRNNCell, torch.float32),
    ):
        h, c = randn(8, 301, dtype=dtype), randn(8, 301, dtype=dtype)
        hx = (h, c) if kind is fusedrnn.FusedLSTMCell else h
        add(kind.__name__, kind(300, 301, dtype=dtype), randn(8, 300, dtype=dtype), hx)
    return result


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    for name, call in calls():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        wanted = call()
        n = 0
        while True:
            n += 1
            memory.refuse_allocation(n)
            try:
                got = call()
            except (RuntimeError, MemoryError) as error:
                memory.refuse_allocation(0)
                if "memory" not in str(error):
                    raise AssertionError(f"{name}, allocation {n}: {error}") from error
            else:
                reached = memory.allocations() >= n
                memory.refuse_allocation(0)
                assert same(got, wanted), f"{name}, allocation {n}"
                if not reached:
                    break
            assert same(call(), wanted), f"{name}, after allocation {n}"
        print(name, n - 1, "allocations", flush=True)


if __name__ == "__main__":
    main()

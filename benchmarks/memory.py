"""Measures the memory of a step: what training keeps, the peak, and what inference allocates."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn.utils.rnn import PackedSequence

from . import cases
from .measure import TimedCall
from .shapes import TRAINING, Row

_LIBC = ctypes.CDLL(None)


def events(rows: list[Row], job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measures our layer and torch.nn's for all rows. Nothing is timed."""
    for row in rows:
        for mode in row.modes:
            yield {"event": "start", "row": row.name, "mode": mode}
            case = cases.build(row)
            result = {
                "ours": _layer(case, case.ours, mode),
                "torch": _layer(case, case.torch, mode),
            }
            yield {"event": "result", "row": row.name, "mode": mode, "status": "ok", **result}


def _layer(case: cases.Case, layer: cases.Layer, mode: str) -> dict[str, Any]:
    """Measures the bytes of one step.

    allocated is the peak of the memory from torch's allocator, and resident is the peak of the
    process's memory, which includes other allocators; both are counted from the start of the step.
    outputs are y and the final states. kept is the memory that autograd holds after forward, beside
    the input and the parameters. beyond_outputs is allocated without the outputs.
    """
    step = cases.step(layer, case.x, case.d_y, mode)
    with cases.mode_of(layer, mode):
        step()
        y, states = cases.run(layer, case.x)
        outputs = sum(tensor.nbytes for tensor in (y, *states))
        del y, states
        found: dict[str, Any] = {"outputs": outputs}
        allocated = _allocated(step)
        found |= {"allocated": allocated, "resident": _resident(step)}
        if mode == TRAINING:
            found["kept"] = kept(layer, case.x)
        else:
            found["beyond_outputs"] = max(0, allocated - outputs)
    layer.zero_grad(set_to_none=True)
    return found


def kept(layer: cases.Layer, x: Any) -> int:
    """Bytes that autograd keeps for backward, without the input and the parameters.

    Each storage counts once.
    """
    x, leaf = cases.with_grad(x)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = cases.run(layer, x)
    sizes = [x.batch_sizes] if isinstance(x, PackedSequence) else []
    for tensor in (leaf, *sizes, *layer.parameters()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def _allocated(call: TimedCall) -> int:
    """The peak of the memory that torch's allocator hands out during a call.

    It is the largest of three measurements, because a profile can lose events.
    """
    return max(_profiled(call) for _ in range(3))


def _profiled(call: TimedCall) -> int:
    with profile(profile_memory=True) as recorded:
        result = call()
    del result
    now = peak = 0
    changes = (e for e in recorded.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _resident(call: TimedCall) -> int | None:
    """The peak of the process's resident memory during a call; None if Linux does not tell it."""
    gc.collect()
    _LIBC.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024

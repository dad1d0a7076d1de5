"""Checks of a layer's surroundings: offsets of tensors, modes, devices, new processes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fusedrnn
from fusedrnn import _reference
from fusedrnn import _selftest_cases as cases
from fusedrnn._selftest_cases import BFLOAT16, FLOAT16, FLOAT32, Call, Shape
from fusedrnn.selftest import Selftest

from .numbers import SMOKE, Options
from .tasks import REGIMES, SPIN_LIMIT


def offsets(test: Selftest, options: Options) -> None:
    """Checks tensors that begin in the middle of a storage, at odd elements."""
    call = Call("lstm", Shape(6, 9, 7, 17))
    for regime in test.regimes:
        for precision in (FLOAT32, FLOAT16, BFLOAT16):
            for by in (1, 3):
                name = f"{precision.name} {by} elements {regime}"
                with test.check("offsets", name) as check, cases.asking_for(regime):
                    leaves = call.leaves(test.device, precision.dtype)
                    moved = [None if t is None else _moved(t, by) for t in leaves]
                    worst, place = call.error_of(call.results(moved), precision)
                    check.detail = f"{worst:.2f} eps in {place}"
                    assert worst <= precision.limit, check.detail


def _moved(t: Tensor, by: int) -> Tensor:
    """Copies a leaf into a storage in which it begins at element `by`."""
    storage = torch.empty(t.numel() + by, dtype=t.dtype, device=t.device)
    view = storage[by:].view(t.shape)
    view.copy_(t.detach())
    return view.detach().requires_grad_()


def deterministic_mode(test: Selftest, options: Options) -> None:
    """Checks that in torch's deterministic mode a layer runs or raises, just as torch.mm."""
    layer = fusedrnn.FusedLSTM(6, 16, device=test.device)
    x = torch.randn(5, 9, 6, device=test.device)
    before = layer(x)[0]

    def outcome(call: Callable[[], Any]) -> str:
        try:
            call()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return ""

    torch.use_deterministic_algorithms(True)
    try:
        of_torch = outcome(lambda: torch.mm(x[0], x[0].t()))
        with test.check("deterministic mode", "as torch.mm") as check:
            ours = outcome(lambda: layer(x)[0].sum().backward())
            check.detail = ours[:200] or "runs"
            assert bool(ours) == bool(of_torch), f"torch.mm: {of_torch or 'runs'}; ours: {ours}"
            if not ours:
                assert torch.equal(layer(x)[0], before), "other numbers than before"
    finally:
        torch.use_deterministic_algorithms(False)


def two_devices(test: Selftest, options: Options) -> None:
    """Checks a layer on a GPU that is not the current device."""
    count = torch.cuda.device_count() if test.device.type == "cuda" else 0
    if count < 2:
        test.not_run("two devices", "a layer on the second", f"there are {count} GPUs here")
        return
    for regime in test.regimes:
        with test.check("two devices", f"cuda:1 while cuda:0 is current {regime}") as check:
            with cases.asking_for(regime):
                worst, place = Call("lstm", SMOKE[2]).error(torch.device("cuda", 1), FLOAT32)
            check.detail = f"{worst:.2f} eps in {place}"
            assert worst <= FLOAT32.limit, check.detail
            assert torch.cuda.current_device() == 0, "the current device is another one now"


# --- Checks in new processes ---------------------------------------------------------------------


def cold_capture(test: Selftest, options: Options) -> None:
    """Captures the first call of a process in a CUDA graph, which loads kernels in the capture."""
    with test.check("cold capture", "the first call of a process") as check:
        call = Call("lstm", SMOKE[1])
        leaves = call.leaves(test.device, torch.float32)
        # torch's products must make their handles, in this thread and in autograd's, outside of a
        # capture. They are not what this check is about, so they run before it.
        cotangents = call.cotangents(call.outputs(leaves, _reference.layer))
        call.results(leaves, cotangents, _reference.layer)
        test.synchronize()
        begin = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        with cases.capturing(graph, test.device):
            captured = call.results(leaves, cotangents)
        check.detail = f"{(time.perf_counter() - begin) * 1e3:.0f} ms"
        graph.replay()
        test.synchronize()
        assert cases.same_bits(captured, call.results(leaves, cotangents)), "the replay differs"


def allocator(test: Selftest, options: Options) -> None:
    """Checks that training with another allocator of torch gives right results repeatedly."""
    for regime in REGIMES:
        for precision in (FLOAT32, BFLOAT16):
            name = f"{options['name']}, {precision.name} {regime}"
            with test.check("allocator", name) as check, cases.asking_for(regime):
                call = Call("gru", cases.SMALL[2])
                for _ in range(10):
                    worst, place = call.error(test.device, precision)
                    check.detail = f"{worst:.2f} eps in {place}"
                    assert worst <= precision.limit, check.detail


def watchdog(test: Selftest, options: Options) -> None:
    """Checks that if a barrier gives up at once, an error names the kernel and nothing hangs."""
    which, regime = options["which"], options["regime"]
    kernel = f"{regime}_{which}_"
    with test.check("watchdog", f"{which} {regime}") as check, cases.asking_for(regime):
        call = Call("lstm", Shape(50, 4, 8, 256))
        leaves = call.leaves(test.device, torch.float32)
        limit = os.environ.pop(SPIN_LIMIT)
        if which == "backward":
            outputs = call.outputs(leaves)
            cotangents = call.cotangents(outputs)
            test.synchronize()
        os.environ[SPIN_LIMIT] = limit
        with said_by_process() as said:
            try:
                if which == "backward":
                    torch.autograd.grad(outputs, [t for t in leaves if t is not None], cotangents)
                else:
                    call.outputs(leaves)
                torch.cuda.synchronize(test.device)
                error = ""
            except RuntimeError as raised:
                error = str(raised).splitlines()[0]
        assert error, f"no barrier gave up with {SPIN_LIMIT}={limit}"
        named = next((line for line in said if kernel in line), "")
        check.detail = f"{error[:150]} | {named[:200]}"
        assert named, f"nothing names {kernel}*: {error[:300]} | {' / '.join(said)[-500:]}"
        # The context is lost now, so the check must not wait for it.
        test.synchronize = lambda: None  # type: ignore[method-assign]


@contextlib.contextmanager
def said_by_process() -> Iterator[list[str]]:
    """Collects the lines that this process, the driver included, writes in the block.

    The list is filled at the end of the block, and the first lines go to standard error then.
    """
    lines: list[str] = []
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+b") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield lines
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
            # Thousands of threads may write the same line, so only the first lines are printed.
            print("\n".join(lines[:20]), file=sys.stderr, flush=True)

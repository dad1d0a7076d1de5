"""Checks under load: repeated calls must give the same bits, also on two streams."""

from __future__ import annotations

import torch

from fusedrnn import _selftest_cases as cases
from fusedrnn._selftest_cases import BFLOAT16, FLOAT32, Call, Shape
from fusedrnn.selftest import Selftest

from .numbers import Options


def stress(test: Selftest, options: Options) -> None:
    """Repeats a call during work on another stream. If the bits differ, there is a race."""
    cuda = test.device.type == "cuda"
    shapes: tuple[tuple[int, int, int, int], ...]
    shapes = ((64, 32, 256, 1024), (200, 8, 64, 256), (300, 1, 64, 512))
    if options["regime"] == "streamed":
        shapes += ((32, 16, 256, 2048),)  # its weights come from L2
    if test.quick or not cuda:
        shapes = ((5, 12, 8, 24),)
    times = 3 if not cuda else 20 if options["regime"] == "per_step" else 60
    for sizes in shapes:
        for precision in (FLOAT32, BFLOAT16):
            name = f"{options['cell']} {precision.name} {Shape(*sizes)} {options['regime']}"
            with (
                test.check("stress", name, may_refuse=True) as check,
                cases.asking_for(options["regime"]),
            ):
                different = _repeat(test.device, options["cell"], Shape(*sizes), precision, times)
                check.detail = f"{different} of {times} differ"
                assert different == 0, check.detail


def _repeat(
    device: torch.device, cell: str, shape: Shape, precision: cases.Precision, times: int
) -> int:
    call = Call(cell, shape)
    leaves = call.leaves(device, precision.dtype)
    cotangents = call.cotangents(call.outputs(leaves))
    first = call.results(leaves, cotangents)
    burden = Burden(device) if device.type == "cuda" else None
    different = 0
    for k in range(times):
        if burden and k % 2:
            burden.enqueue()
        different += not cases.same_bits(first, call.results(leaves, cotangents))
    return different


class Burden:
    """Work on another stream that leaves room for a launch that needs all multiprocessors.

    A kernel that runs a time loop starts only when there is room for all its blocks. Therefore this
    work is copies to the host, and kernels of a few blocks, which run if a multiprocessor is free.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.values = torch.randn(1 << 24, device=device)
        self.host = torch.empty(1 << 24, pin_memory=True)
        self.small = torch.randn(64, 64, device=device)

    def enqueue(self) -> None:
        """Enqueues some milliseconds of work."""
        with torch.cuda.stream(self.stream):
            self.host.copy_(self.values, non_blocking=True)
            for _ in range(50):
                self.small @ self.small


def two_streams(test: Selftest, options: Options) -> None:
    """Launches kernels that each need the whole device on two streams; none may wait for ever.

    Both streams sleep until everything is enqueued, so that the launches meet.
    """
    rounds, cycles = 20, 20_000_000
    with (
        test.check("two streams", f"lstm beside gru {options['regime']}") as check,
        cases.asking_for(options["regime"]),
    ):
        calls = [Call(cell, Shape(1000, 16, 64, 512)) for cell in ("lstm", "gru")]
        streams = [torch.cuda.Stream(test.device) for _ in calls]
        leaves = [call.leaves(test.device, torch.bfloat16) for call in calls]
        jobs = [
            (call, stream, leaf, call.cotangents(call.outputs(leaf)))
            for call, stream, leaf in zip(calls, streams, leaves, strict=True)
        ]
        expected = [call.results(leaf, cotangents) for call, _, leaf, cotangents in jobs]
        test.synchronize()
        different = 0
        for _ in range(rounds):
            found = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(cycles)
            for call, stream, leaf, cotangents in jobs:
                with torch.cuda.stream(stream):
                    found.append(call.results(leaf, cotangents))
            test.synchronize()
            different += sum(
                not cases.same_bits(a, b) for a, b in zip(expected, found, strict=True)
            )
        check.detail = f"{different} of {2 * rounds} differ"
        assert different == 0, check.detail

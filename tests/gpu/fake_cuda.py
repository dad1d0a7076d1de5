"""Stand-ins for torch.cuda's events, streams and graphs on a machine without a GPU.

All work is done at once, on the CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


class Event:
    """An event, which remembers the time at which it was recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, other: Event) -> float:
        assert self.at is not None and other.at is not None
        return (other.at - self.at) * 1e3


class Stream:
    """A stream, which remembers the streams that it waited for."""

    def __init__(self, device: Any = None) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Graph:
    """A graph. A replay does nothing, so the results keep their values."""

    def __init__(self) -> None:
        self.captured = False
        self.replays = 0

    def replay(self) -> None:
        assert self.captured
        self.replays += 1


def use(monkeypatch: pytest.MonkeyPatch, synchronize: Callable[..., None] | None = None) -> None:
    """Replaces torch.cuda's names by the stand-ins."""
    default = Stream()

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(target: Graph) -> Iterator[None]:
        yield
        target.captured = True

    for name, thing in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "graph": graph,
        "current_stream": lambda device=None: default,
        "set_stream": lambda stream: None,
        "_sleep": lambda cycles: None,
        "synchronize": synchronize or (lambda device=None: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, thing)

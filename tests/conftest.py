"""Settings of the whole suite: seeds, hypothesis, and the table of errors at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.kit import parity_table
from tests.kit.layers import DEVICES, why_not_on_cuda

# One profile everywhere: the same examples on each run, none saved, no time limit per example.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=60, database=None
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config: pytest.Config) -> None:
    # torch.nn's, once a process, wherever a projected LSTM is the reference.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections:UserWarning")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds torch, and puts back the one thread that a test may have changed.

    torch.nn's small products on two threads of a busy machine take 30 times as long as on one.
    """
    torch.set_num_threads(1)
    torch.manual_seed(20250101)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, and a GPU too where there is one; cuDNN computes in float32 there, as we do."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cudnn.allow_tf32 = before


def pytest_report_header() -> str:
    why_not = why_not_on_cuda()
    return f"devices: {' and '.join(DEVICES)}" + (f", not cuda: {why_not}" if why_not else "")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if parity_table.MEASURED:
        terminalreporter.section("error as a multiple of torch.nn's own")
        terminalreporter.write_line(parity_table.as_text(parity_table.MEASURED))

"""Settings of the whole suite: seeds, hypothesis, devices, and the table of errors at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.kit import parity_table
from tests.kit.layers import DEVICES, why_not_on_cuda

# Hypothesis draws the same examples in every run, saves none, and has no time limit for an example.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=60, database=None
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config: pytest.Config) -> None:
    # torch.nn warns once a process when a projected LSTM runs, as our reference does.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections:UserWarning")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds torch, and sets one thread before and after each test.

    On a busy machine the small products of torch.nn take 30 times as long with two threads.
    """
    torch.set_num_threads(1)
    torch.manual_seed(20250101)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, and a GPU if there is one. cuDNN may not use TF32 there, since we do not either."""
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

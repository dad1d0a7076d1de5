"""The report of a selftest, in JSON for programs and in Markdown for people."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from ._library import CUDA, config
from ._version import __version__


@dataclasses.dataclass
class Check:
    """One check. Its result is "passed", "failed" or "not run"; detail has numbers or a reason."""

    section: str
    name: str
    result: str
    detail: str = ""


@dataclasses.dataclass
class Timing:
    """Our median and torch.nn's in microseconds, and the largest over the smallest of our times."""

    layer: str
    dtype: str
    shape: str  # T,N,I,H
    kind: str  # "forward" (inference) or "training" (forward and backward)
    ours: float
    theirs: float
    spread: float


@dataclasses.dataclass
class Report:
    """The results of a selftest on one device."""

    device: torch.device
    quick: bool
    regimes: Sequence[str]
    checks: list[Check] = dataclasses.field(default_factory=list)
    timings: list[Timing] = dataclasses.field(default_factory=list)

    def with_result(self, result: str) -> list[Check]:
        """The checks with a result."""
        return [check for check in self.checks if check.result == result]

    def summary(self) -> str:
        """The numbers of checks in one line."""
        failed, not_run = len(self.with_result("failed")), len(self.with_result("not run"))
        return f"{len(self.checks)} checks, {failed} failed, {not_run} not run"

    def as_json(self) -> dict[str, Any]:
        """The whole report, for JSON."""
        return {
            "fusedrnn": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cuda_library": dataclasses.asdict(CUDA) | {"path": str(CUDA.path)},
            "python": platform.python_version(),
            "machine": platform.platform(),
            "device": self._device_name(),
            "quick": self.quick,
            "regimes": [regime for regime in self.regimes if regime],
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "timings": [dataclasses.asdict(timing) for timing in self.timings],
        }

    def as_markdown(self) -> str:
        """A summary in Markdown."""
        lines = [
            f"# fusedrnn selftest: {self._device_name()}",
            "",
            f"{self.summary()}. {time.strftime('%Y-%m-%d')}, {platform.platform()}",
            "",
            "```",
            config(),
            "```",
            "",
            "| section | passed | failed | not run |",
            "| :-- | --: | --: | --: |",
        ]
        for section in dict.fromkeys(check.section for check in self.checks):
            results = [check.result for check in self.checks if check.section == section]
            counts = [str(results.count(result)) for result in ("passed", "failed", "not run")]
            lines.append(f"| {section} | {' | '.join(counts)} |")
        for result in ("failed", "not run"):
            lines += self._reasons(result)
        if self.timings:
            lines += self._medians()
        return "\n".join(lines) + "\n"

    def _reasons(self, result: str) -> list[str]:
        found = self.with_result(result)
        if not found:
            return []
        lines = ["", f"## {result.capitalize()}", ""]
        for reason in dict.fromkeys(check.detail for check in found):
            names = [f"{c.section}: {c.name}" for c in found if c.detail == reason]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"- {'; '.join(names[:5])}{more}: {reason}")
        return lines

    def _medians(self) -> list[str]:
        theirs = "torch.nn (cuDNN)" if self.device.type == "cuda" else "torch.nn"
        return [
            "",
            "## Medians in microseconds",
            "",
            f"| layer | dtype | T,N,I,H | | fusedrnn | {theirs} | ratio | spread |",
            "| :-- | :-- | :-- | :-- | --: | --: | --: | --: |",
            *(
                f"| {t.layer} | {t.dtype} | {t.shape} | {t.kind} | {t.ours:.0f} | {t.theirs:.0f} | "
                f"{t.theirs / t.ours:.2f} | {t.spread:.2f} |"
                for t in self.timings
            ),
        ]

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            return f"{torch.cuda.get_device_name(self.device)} (sm_{major}{minor})"
        return f"CPU, {torch.get_num_threads()} threads"

"""A folder of results of a run, as tools.gpu writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def row(name: str, ours: float, theirs: float, **more: Any) -> dict[str, Any]:
    times = {
        "ours": {"call": ours * 2, "graph": ours, "alone": ours * 3, "spread": 1.0},
        "torch": {"call": theirs * 2, "graph": theirs, "alone": theirs * 3, "spread": 1.0},
    }
    found = {"kind": "row", "name": name, "mode": "training", "source": "core", "status": "ok"}
    found |= {"why": "", "plan": ["resident, FMA: 8 x 1 x 1", "per step"], "estimate": 50.0}
    found |= {"chosen": "resident+per_step"}
    return found | {"floor": 12.0, "steps": 25, "times": times} | more


RATES = {"kind": "rates", "card": "H100", "rates": {"bf16": 7e14, "copy": 3e12, "launch": 2e-6}}
RATES |= {"gpu": "NVIDIA H100 PCIe", "date": "2026-11-29"}


def make(
    folder: Path,
    name: str = "NVIDIA H100 80GB HBM3",
    started: str = "2026-11-29T10:00:00+0000",
    checks: Sequence[dict[str, Any]] = (),
    rows: Sequence[dict[str, Any]] = (),
    steps: Sequence[dict[str, Any]] = (),
    gpu: dict[str, str] | None = None,
) -> Path:
    """A folder of results."""
    folder.mkdir(exist_ok=True)
    facts = {
        "gpu": gpu or {"name": name},
        "nvidia_smi": {"driver_version": "580.1"},
        "torch": {"version": "2.11.0+cu130", "cudnn": 91900},
        "sources": "0123",
    }
    run = {"format": 1, "started": started, "seconds": 1, "settings": {}, "facts": facts}
    (folder / "run.json").write_text(json.dumps(run | {"steps": list(steps)}))
    for file, lines in (("checks.jsonl", checks), ("bench.jsonl", [RATES, *rows])):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.txt").write_text("said\n")
    (folder / "log.txt").write_text("")
    return folder

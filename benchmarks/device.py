"""Measures rows on a GPU, for `run --device cuda`: ours and torch.nn's, which is cuDNN there.

All rows are measured in this process, without floors, and with torch's number of threads. Each call
ends with a wait for the device, so that the time is that of the whole work and not only of its
launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import cases, machine, runner
from .measure import TimedCall, alternate
from .shapes import Row
from .worker import LONGEST_STEP, NOT_RUN, OK, RED


def run(options: runner.Options, device: torch.device) -> dict[str, Any]:
    """Measures every row and mode on the device and returns the content of the file."""
    sets, _ = runner.plan(options)
    return {
        "device": _describe(device),
        "machine": machine.describe(),
        "settings": {"sets": list(options.sets), "seconds": options.seconds},
        "rows": [fields for row in sets for fields in _measure(row, device, options.seconds)],
    }


def as_markdown(found: dict[str, Any]) -> str:
    """Returns the table of a run."""
    lines = [
        f"{found['device']['name']}, {found['device']['library']}, torch {torch.__version__}. "
        "Medians in µs; spread is the 90th percentile of ours over its 10th.",
        "",
        "| row | mode | fusedrnn | torch.nn | ratio | spread |",
        "| :-- | :-- | --: | --: | --: | --: |",
    ]
    for row in found["rows"]:
        if row["status"] != OK:
            lines.append(f"| {row['name']} | {row['mode']} | {row['status']}: {row['why']} | | | |")
            continue
        ours, theirs = row["ours"], row["torch"]
        lines.append(
            f"| {row['name']} | {row['mode']} | {ours['median'] * 1e6:.1f} | "
            f"{theirs['median'] * 1e6:.1f} | {row['ratio']:.2f} | {ours['p90'] / ours['p10']:.2f} |"
        )
    return "\n".join(lines)


def _measure(row: Row, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    case = cases.there(cases.build(row), device)
    for mode in row.modes:
        fields: dict[str, Any] = {"name": row.name, "mode": mode}
        parity = cases.check(case, mode)
        fields |= {"status": OK, "why": "", "parity": parity.as_dict()}
        if not parity.right:
            why = f"{parity.worst} is off by {parity.ours:.1e}, the limit is {parity.limit:.1e}"
            yield fields | {"status": RED, "why": why}
            continue
        if parity.seconds > LONGEST_STEP:
            why = f"a step takes {parity.seconds:.1f} s here"
            yield fields | {"status": NOT_RUN, "why": why}
            continue
        layers = {"ours": case.ours, "torch": case.torch}
        steps = {
            name: _to_the_end(cases.step(layer, case.x, case.d_y, mode), device)
            for name, layer in layers.items()
        }
        with cases.mode_of(case.ours, mode), cases.mode_of(case.torch, mode):
            timings = alternate(steps, seconds)
        times = {name: timing.as_dict() for name, timing in timings.items()}
        yield fields | times | {"ratio": timings["torch"].median / timings["ours"].median}


def _to_the_end(step: TimedCall, device: torch.device) -> TimedCall:
    if device.type != "cuda":
        return step

    def whole() -> None:
        step()
        torch.cuda.synchronize(device)

    return whole


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": str(device), "library": "torch.nn on the CPU"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "sms": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "library": f"cuDNN {torch.backends.cudnn.version()}",
        "tf32": torch.backends.cuda.matmul.fp32_precision,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }

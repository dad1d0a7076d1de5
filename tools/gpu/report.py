"""Makes report.md of a run, and the table that a run prints at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import LOSS

from . import swept
from .fastest import NOISE, calls_of, fastest_of, in_words, missed
from .results import Fields, Results, load, one_line, three_times

# The table must be complete if only the last 12,000 characters of the output are kept.
TABLE_CHARACTERS = 11_500
FAILURES_SHOWN = 25
MISSED_SHOWN = 12
SHORT_MODES = {"forward": "fwd", "training": "train"}
SECTIONS = ("what", "passed", "failed", "not run")
TIMED = (
    *("row", "mode", "plan", "chosen by the plan", "fastest", "fusedrnn", "torch.nn (cuDNN)"),
    *("call", "graph", "a step", "resident", "streamed", "per step", "estimate", "floor"),
)
SWEPT = (
    *("row", "mode", "chosen", "us a step", "fastest", "its blocks", "us a step", "choice over it"),
    *("torch.nn (cuDNN), us a step", "timed"),
)


def write(folder: Path) -> Results:
    """Writes report.md from the files in a folder."""
    found = load(folder)
    (folder / "report.md").write_text(as_markdown(found))
    return found


def final_table(found: Results) -> str:
    """Makes a table of steps, failures and timings, as much as fits, the most important first."""
    lines = [f"fusedrnn on {found.card}: {found.verdict()}", found.software(), ""]
    for step in found.run["steps"]:
        why = f": {one_line(step['why'])}" if step["why"] else ""
        lines.append(f"{step['result']:<10} {step['seconds']:6.1f} s  {step['name']}{why}"[:150])
    wrong = list(_wrong(found))
    lines += ["", *wrong[:FAILURES_SHOWN]] if wrong else []
    if len(wrong) > FAILURES_SHOWN:
        lines.append(f"and {len(wrong) - FAILURES_SHOWN} more, in report.md")
    lines += ["", *_rates(found)]
    rows = [_short(row) for row in found.rows()]
    if rows:
        late = [line for row in found.rows() if (line := missed(row))]
        lines += [f"another regime was faster: {line}" for line in late[:MISSED_SHOWN]]
        if len(late) > MISSED_SHOWN:
            lines.append(f"and {len(late) - MISSED_SHOWN} more rows, in report.md")
        better = list(filter(None, map(swept.missed, swept.groups(found.bench))))
        lines += [f"another plan was faster: {line}" for line in better[:MISSED_SHOWN]]
        if len(better) > MISSED_SHOWN:
            lines.append(f"and {len(better) - MISSED_SHOWN} more plans, in report.md")
        lines.append("us, call/graph/alone: ours beside torch.nn's; torch.nn's over ours")
    kept: list[str] = []
    used = 0
    for number, line in enumerate([*lines, *rows]):
        more = f"and {len(lines) + len(rows) - number} more lines, in report.md"
        if used + len(line) + 1 + len(more) + 1 > TABLE_CHARACTERS:
            kept.append(more)
            break
        kept.append(line)
        used += len(line) + 1
    return "\n".join(kept) + "\n"


def _wrong(found: Results) -> Iterator[str]:
    """Yields a line for each thing that is wrong."""
    yield from map(one_line, _failures(found))


def _failures(found: Results) -> Iterator[str]:
    for check in found.with_result("failed"):
        yield f"FAILED {check['section']}: {check['name']}: {check['detail']}"[:300]
    for task in found.lost():
        yield f"TASK {task['task']}: {task['ended']}"[:200]
    for row in found.rows():
        if row["status"] != "ok":
            yield f"ROW {row['name']} {row['mode']}: {row['status']}: {row['why']}"[:200]
    for group in swept.groups(found.bench):
        for line in group.wrong:
            plan = f"{group.name} {group.mode}, {swept.words_of(line)}"
            yield f"PLAN {plan}: {line['status']}: {line['why']}"[:200]


def _rates(found: Results) -> Iterator[str]:
    measured = found.rates()
    if measured:
        rates = dict(measured["rates"])
        copy, launch = rates.pop("copy"), rates.pop("launch")
        products = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
        yield (
            f"measured: products {products} TFLOP/s, copy {copy / 1e9:.0f} GB/s, "
            f"launches {launch * 1e6:.2f} us apart"
        )


def ratio(row: Fields, key: str) -> float | None:
    """torch.nn's time over ours, or None if one is missing."""
    ours, theirs = (row["times"][name].get(key) for name in ("ours", "torch"))
    return theirs / ours if ours and theirs else None


def device_time(row: Fields) -> float:
    """Microseconds of our call on the device: as a graph if there is one."""
    ours = row["times"]["ours"]
    return float(ours.get("graph") or ours["call"])


def _ratio_text(row: Fields, key: str) -> str:
    value = ratio(row, key)
    return "-" if value is None else f"{value:.2f}"


def _short(row: Fields) -> str:
    head = f"{row['name']} {SHORT_MODES[row['mode']]}"
    if row["status"] != "ok":
        return f"{head}: {row['status']}"
    times = row["times"]
    others = [
        f" {in_words(regime)} {call:.0f}"
        for regime, call in calls_of(row).items()
        if regime != row["chosen"]
    ]
    return (
        f"{head}: {three_times(times['ours'])} {three_times(times['torch'])} "
        f"x{_ratio_text(row, 'call')} x{_ratio_text(row, 'graph')}{''.join(others)} "
        f"est {row['estimate']:.0f}"
    )


def as_markdown(found: Results) -> str:
    """The whole report."""
    return "\n".join(_markdown(found)) + "\n"


def _markdown(found: Results) -> Iterator[str]:
    yield f"# fusedrnn on {found.card}"
    yield ""
    yield f"{found.date}, {found.software()}. {found.verdict()}."
    yield ""
    yield "## Steps"
    yield ""
    yield from _table(
        ("step", "result", "why", "seconds", "limit"),
        [[s["name"], s["result"], s["why"], s["seconds"], s["limit"]] for s in found.run["steps"]],
    )
    wrong = list(_wrong(found))
    if wrong:
        yield from ("", "## What is wrong", "")
        yield from (f"- {line}" for line in wrong)
    yield from ("", "## Checks", "")
    yield from _table(SECTIONS, list(_sections(found)))
    not_run = found.with_result("not run")
    if not_run:
        yield from ("", "Not run:", "")
        yield from (f"- {c['section']}: {c['name']}: {c['detail']}" for c in not_run)
    if found.rows():
        yield from ("", "## Times", "")
        yield from _rates(found)
        yield from ("", *timing_table(found.rows()))
        yield from missed_list(found.rows())
    if others := swept.groups(found.bench):
        yield from ("", "## Other plans", "", *sweep_table(others))
    yield from ("", "## Facts", "")
    yield from (f"- {key}: {_fact(value)}" for key, value in found.run["facts"].items())


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sections(found: Results) -> Iterator[list[Any]]:
    for section in dict.fromkeys(c["section"] for c in found.checks if "section" in c):
        results = [c["result"] for c in found.checks if c.get("section") == section]
        yield [section, *(results.count(result) for result in SECTIONS[1:])]


def timing_table(rows: list[Fields]) -> Iterator[str]:
    """Makes the table of all timed rows, losses included."""
    yield (
        "Times are microseconds per call; call/graph/alone: back to back, as a CUDA graph, and one "
        "at a time with a wait. Ratios are torch.nn's time over ours; **bold** is a loss. "
        '"a step" is a graph\'s time over the number of steps and layers. "resident", "streamed", '
        '"per step": calls back to back in that regime, with the microseconds of a step and the '
        "floor's part of the call in brackets."
    )
    yield ""
    body = []
    for row in rows:
        if row["status"] != "ok":
            body.append(
                [
                    row["name"],
                    row["mode"],
                    f"{row['status']}: {row['why']}",
                    *[""] * (len(TIMED) - 3),
                ]
            )
            continue
        times, device = row["times"], device_time(row)
        body.append(
            [
                row["name"],
                row["mode"],
                "; ".join(dict.fromkeys(row["plan"])),
                in_words(row.get("chosen", "")),
                in_words(fastest_of(row)),
                three_times(times["ours"]),
                three_times(times["torch"]),
                _bold(ratio(row, "call")),
                _bold(ratio(row, "graph")),
                f"{device / row['steps']:.2f}",
                *(_regime(row, regime) for regime in ("resident", "streamed", "per_step")),
                f"{row['estimate']:.0f}",
                f"{row['floor']:.0f}",
            ]
        )
    yield from _table(TIMED, body)


def _regime(row: Fields, regime: str) -> str:
    """What the table says about a regime; nothing if the row was not timed in it."""
    of = row.get("regimes", {}).get(regime, {})
    if "call" not in of:
        return str(of.get("left_out", ""))
    return f"{of['call']:.0f} ({of['step']:.2f}, {100 * of['of_floor']:.0f} %)"


def sweep_table(groups: list[swept.Group]) -> Iterator[str]:
    """Makes the table of the rows whose plan was compared with other plans."""
    yield (
        "The plan's choice beside the fastest of the other plans that were timed, in calls back to "
        "back: microseconds of a step, and the floor's part of the call in brackets. In training "
        "only backward has another plan. **Bold** is clearly faster than the choice."
    )
    yield ""
    yield from _table(SWEPT, [_swept(group) for group in groups])


def _swept(group: swept.Group) -> list[Any]:
    chosen, fastest = group.chosen, group.fastest

    def times(of: Fields | None) -> str:
        return f"{of['step']:.2f} ({100 * of['of_floor']:.0f} %)" if of else "-"

    gain = group.gain
    return [
        *(group.name, group.mode),
        *(chosen["plan"] if chosen else "-", times(chosen)),
        *(swept.words_of(fastest) if fastest else "-", fastest["plan"] if fastest else "-"),
        times(fastest),
        "-" if gain is None else f"**{gain:.2f}**" if gain > NOISE else f"{gain:.2f}",
        "-" if group.torch is None else f"{group.torch:.2f}",
        f"{len(group.timed)} of {len(group.lines)}",
    ]


def missed_list(rows: list[Fields]) -> Iterator[str]:
    """Makes a list of the rows for which another regime than the plan's was faster."""
    found = [line for row in rows if (line := missed(row))]
    if found:
        yield from ("", "The plan's choice was not the fastest in these rows:", "")
        yield from (f"- {line}" for line in found)


def _bold(value: float | None) -> str:
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value < LOSS else f"{value:.2f}"


def _table(head: tuple[str, ...], rows: list[list[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' :-- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(one_line(value).replace('|', '/') for value in row)} |"

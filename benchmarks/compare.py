"""Compares two runs of the same rows, usually of two commits on one machine."""

from __future__ import annotations

from .results import Group, Result, geometric_mean
from .tables import CELL_TITLES, ms, status_text, table

# A smaller change is noise, whatever the percentiles say.
NOISE = 0.03


def as_markdown(before: Result, after: Result) -> str:
    """Makes a table with a line for each row that both runs have.

    A change counts (bold) if it is larger than the noise and each median lies outside the other
    run's 10th to 90th percentile. Another column has torch.nn's change, which shows how much the
    machine has changed.
    """
    old, new = Group(), Group()
    old.add(before)
    new.add(after)
    lines, changes, drifts = [], [], []
    for key, row in new.rows.items():
        earlier = old.rows.get(key)
        if earlier is None:
            continue
        start = [CELL_TITLES[row["cell"]], row["shape"], row["mode"], row["threads"]]
        if row["status"] != "ok" or earlier["status"] != "ok":
            texts = [status_text(side) or ms(side["ours"]["median"]) for side in (earlier, row)]
            lines.append([*start, *texts, "–", "–"])
            continue
        change, drift = (row[s]["median"] / earlier[s]["median"] for s in ("ours", "torch"))
        changes.append(change)
        drifts.append(drift)
        text = f"{change - 1:+.1%}"
        text = f"**{text}**" if _counts(earlier["ours"], row["ours"]) else text
        times = (ms(side["ours"]["median"]) for side in (earlier, row))
        lines.append([*start, *times, text, f"{drift - 1:+.1%}"])
    if not lines:
        return "The two runs have no row in common."
    header = [
        "cell",
        "T,N,I,H",
        "mode",
        "threads",
        "before, ms",
        "after, ms",
        "change",
        "torch.nn's",
    ]
    parts = [f"Before: {_name(before)}", f"After: {_name(after)}", "", table(header, lines, left=3)]
    if _where(before) != _where(after):
        parts.insert(0, "**Different machines or instruction sets: the times do not compare.**\n")
    mean, drift_mean = geometric_mean(changes), geometric_mean(drifts)
    if mean and drift_mean:
        parts += ["", f"Geometric mean of {len(changes)} rows: ours {mean - 1:+.1%}, torch.nn's "
                  f"{drift_mean - 1:+.1%}."]  # fmt: skip
    only = len(old.rows.keys() ^ new.rows.keys())
    parts += [f"{only} rows are in one run only."] if only else []
    return "\n".join(parts)


def _counts(before: Result, after: Result) -> bool:
    apart = after["median"] > before["p90"] and before["median"] < after["p10"]
    apart |= after["median"] < before["p10"] and before["median"] > after["p90"]
    return apart and abs(after["median"] / before["median"] - 1) > NOISE


def _name(run: Result) -> str:
    machine = run["machine"]
    changed = " and changes" * bool(machine["changed_files"])
    return f"{(machine['commit'] or '?')[:12]}{changed}, {machine['date'][:16]}, {machine['cpu']}"


def _where(run: Result) -> tuple[str, str, int]:
    machine = run["machine"]
    return machine["cpu"], machine["isa"], machine["cores"]

"""Prints where ncu took the most samples: python -m tools.gpu.hot REPORT.ncu-rep."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterable, Iterator

SHOWN = 25


def hottest(lines: Iterable[str]) -> Iterator[str]:
    """Yields each kernel's name and its instructions with the most samples."""
    header: list[str] = []
    rows: list[list[str]] = []
    for row in csv.reader(line for line in lines if not line.startswith("==")):
        if "Source" in row and len(row) > 3:
            yield from _table(header, rows)
            header, rows = row, []
        elif header and len(row) == len(header):
            rows.append(row)
        elif row and any(regime in ",".join(row) for regime in ("resident", "streamed")):
            yield from _table(header, rows)
            header, rows = [], []
            yield ",".join(row)[:150]
    yield from _table(header, rows)


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    if not header or not rows:
        return
    columns = [i for i, name in enumerate(header) if "Samples" in name and "Not" not in name]
    if not columns:
        yield f"no column of samples among {', '.join(header)[:200]}"
        return
    at, source = columns[0], header.index("Source")

    def samples(row: list[str]) -> float:
        try:
            return float(row[at].replace(",", ""))
        except ValueError:
            return 0.0

    total = sum(map(samples, rows)) or 1.0
    yield f"{len(rows)} instructions, {total:.0f} of {header[at]}"
    for number, row in sorted(enumerate(rows), key=lambda pair: -samples(pair[1]))[:SHOWN]:
        yield f"{100 * samples(row) / total:5.1f} %  #{number:<6} {row[source][:90]}"


def main() -> int:
    """Lets ncu print the source page of a report, and prints its hottest lines."""
    command = ["ncu", "--import", sys.argv[1], "--page", "source", "--csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(hottest(done.stdout.splitlines()))
    print("\n".join(found or ["no source page in this report", done.stderr[:2000]]))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

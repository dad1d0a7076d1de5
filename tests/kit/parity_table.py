"""Errors relative to float64, compared with the errors of torch.nn in the same dtype.

`python -m tests.kit.parity_table` prints the worst error of each cell and dtype in the cases below.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from fusedrnn import _console
from tests.kit.layers import CELLS, Cell, error, make_states, map_tensors, ragged, randn, run

# How many times numbers are drawn. The error of a tensor is the largest error of all draws. With
# one draw the comparison would depend on luck: a small tensor of torch.nn may be exact to half an
# ulp, and rounding may move an argument of relu across its kink, which is a large error.
DRAWS = {torch.float32: 6, torch.bfloat16: 6, torch.float16: 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """The shape of an input, and a set of options."""

    name: str
    T: int
    N: int
    I: int
    H: int
    options: tuple[tuple[str, Any], ...] = ()
    lengths: tuple[int, ...] = ()
    states: bool = True

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("small", 5, 3, 4, 7),
    Case("one step", 1, 5, 11, 13),
    Case("one unit", 9, 2, 1, 2),
    Case("odd primes", 13, 7, 17, 37),
    Case("no bias", 11, 4, 8, 19, (("bias", False),)),
    Case("two layers, both ways", 7, 5, 6, 23, (("num_layers", 2), ("bidirectional", True))),
    Case("packed", 9, 5, 6, 17, lengths=(2, 9, 1, 9, 5)),
    Case("packed, both ways", 9, 4, 6, 17, (("bidirectional", True),), lengths=(2, 9, 1, 6)),
    Case("zero states", 12, 3, 5, 16, states=False),
    Case("long", 100, 2, 8, 32),
    Case("wide", 8, 9, 64, 128),
    Case("400 rows", 20, 20, 16, 80),
    Case("4,096 rows", 128, 32, 8, 24),
]


@dataclasses.dataclass
class Measured:
    """The errors of one tensor."""

    cell: str
    dtype: torch.dtype
    case: str
    tensor: str
    ours: float = 0.0
    theirs: float = 0.0

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def budget(self) -> float:
        return 2 * self.theirs + self.eps

    @property
    def multiple(self) -> float:
        """Our error, less the one ulp that the budget grants, as a multiple of torch.nn's error."""
        return max(0.0, self.ours - self.eps) / self.theirs if self.theirs > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.tensor}: {self.ours:.2e}, torch.nn's {self.theirs:.2e}, "
            f"{self.ours / self.budget:.0%} of the budget"
        )


MEASURED: list[Measured] = []


def measure(
    cell: Cell, dtype: torch.dtype, case: Case, device: torch.device | None = None
) -> list[Measured]:
    """Runs torch.nn in float64, and torch.nn and ours in the dtype, on the same rounded numbers.

    The runs in the dtype are on the device.
    """
    result: dict[str, Measured] = {}
    for draw in range(DRAWS[dtype]):
        torch.manual_seed(draw)
        ours, theirs = cell.make(case.I, case.H, device=device, **dict(case.options))
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        reference = copy.deepcopy(theirs).double()
        theirs.to(device)
        x: Any
        if case.lengths:
            x = pack_sequence(ragged(case.lengths, case.I, dtype), enforce_sorted=False)
        else:
            x = randn(case.T, case.N, case.I, dtype=dtype)
        hx = make_states(ours, case.N, dtype) if case.states else None
        wide = run(reference, map_tensors(Tensor.double, x), map_tensors(Tensor.double, hx))
        expected = run(theirs, x, hx)
        actual = run(ours, x, hx)
        for name, value in wide.items():
            m = result.setdefault(name, Measured(cell.name, dtype, case.name, name))
            m.ours = max(m.ours, error(actual[name], value))
            m.theirs = max(m.theirs, error(expected[name], value))
    return list(result.values())


def as_text(measured: list[Measured]) -> str:
    """Makes a table of the worst tensor of each cell and dtype."""
    lines = [
        f"{'cell':<17}{'dtype':<10}{'tensors':>8}{'ours':>10}{'torch.nn':>10}{'multiple':>10}"
        f"{'of budget':>11}  worst"
    ]
    groups: dict[tuple[str, torch.dtype], list[Measured]] = {}
    for m in measured:
        groups.setdefault((m.cell, m.dtype), []).append(m)
    for (cell, dtype), group in groups.items():
        worst = max(group, key=lambda m: m.ours / m.budget)
        lines.append(
            f"{cell:<17}{str(dtype)[6:]:<10}{len(group):>8}{worst.ours:>10.1e}"
            f"{worst.theirs:>10.1e}{max(m.multiple for m in group):>10.2f}"
            f"{worst.ours / worst.budget:>11.0%}  {worst.tensor}, {worst.case}"
        )
    lines.append(
        "error: largest difference from float64 over the largest value; multiple: of torch.nn's "
        "error, beyond 1 ulp (the limit is 2); worst of several draws"
    )
    return "\n".join(lines)


def main() -> int:
    """Measures all cases and prints the table. Returns 1 if a budget is exceeded."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    for cell in CELLS:
        for dtype in DRAWS:
            for case in CASES:
                MEASURED.extend(measure(cell, dtype, case))
    print(as_text(MEASURED))
    return int(any(m.ours > m.budget for m in MEASURED))


if __name__ == "__main__":
    _console.run(main)

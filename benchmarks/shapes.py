"""The rows that are measured (a layer, its sizes and a dtype), and the sets of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

CELLS = ("lstm", "gru", "rnn")
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
FORWARD, TRAINING = "forward", "training"
BOTH = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Row:
    """One layer, or one call of a cell module, on one input.

    Forward is inference; training is forward, and backward to all parameters and the input.
    """

    cell: str  # lstm, gru or rnn (tanh)
    T: int
    N: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    P: int = 0  # size of a projected h, 0 without projection
    dtype: str = "float32"
    packed: bool = False  # a PackedSequence with lengths drawn uniformly from 1 to T
    single: bool = False  # one call of the cell module (nn.LSTMCell), T = 1
    modes: tuple[str, ...] = BOTH

    @property
    def name(self) -> str:
        """The name of the row in tables, in results and for --rows."""
        return f"{self.cell} {self.shape}"

    @property
    def shape(self) -> str:
        """The name without the cell: T,N,I,H and every option that is not the default."""
        words = [f"{self.T},{self.N},{self.I},{self.H}"]
        words += [f"{self.L} layers"] if self.L > 1 else []
        words += ["bidirectional"] if self.D > 1 else []
        words += [f"proj {self.P}"] if self.P else []
        words += ["packed"] if self.packed else []
        words += ["cell"] if self.single else []
        words += [self.dtype] if self.dtype != "float32" else []
        return " ".join(words)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of input, weights and results."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def G(self) -> int:
        """The number of gates: weight_ih is [G*H, I]."""
        return GATES[self.cell]

    @property
    def out(self) -> int:
        """The size of h: P with projection, else H."""
        return self.P or self.H

    def lengths(self) -> list[int]:
        """The steps of each sequence, the same in every process."""
        if not self.packed:
            return [self.T] * self.N
        generator = torch.Generator().manual_seed(1)
        return torch.randint(1, self.T + 1, (self.N,), generator=generator).tolist()

    def inputs(self) -> list[int]:
        """The input size of every layer."""
        return [self.I] + [self.D * self.out] * (self.L - 1)

    def u_bytes(self) -> int:
        """The bytes of weights that a step of one direction must read: weight_hh and weight_hr."""
        size = torch.finfo(self.torch_dtype).bits // 8
        return (self.G * self.H * self.out + self.P * self.H) * size

    def input_flops(self) -> int:
        """Operations of x W over all steps, layers and directions; a multiply-add is two."""
        S = sum(self.lengths())
        return sum(2 * S * I * self.G * self.H * self.D for I in self.inputs())

    def step_flops(self) -> int:
        """Operations of h U, and of the projection, over all steps, layers and directions."""
        S = sum(self.lengths())
        return 2 * S * (self.G * self.H * self.out + self.P * self.H) * self.D * self.L

    def flops(self, mode: str) -> int:
        """Operations of the products. Training has three times as many as forward.

        In addition to x W and h U it computes dx and dh, and dW and dU.
        """
        return (self.input_flops() + self.step_flops()) * (3 if mode == TRAINING else 1)

    def as_dict(self) -> dict[str, Any]:
        """Fields and name, for JSON."""
        return asdict(self) | {"name": self.name, "shape": self.shape}


def row_from(fields: dict[str, Any]) -> Row:
    """The row that `as_dict` was called on."""
    known = {key: fields[key] for key in Row.__dataclass_fields__}
    return Row(**known | {"modes": tuple(fields["modes"])})


CORE = (
    (100, 1, 64, 64),
    (100, 1, 256, 256),
    (25, 1, 1024, 1024),
    (1000, 8, 64, 64),
    (100, 16, 128, 128),
    (100, 32, 256, 256),
    (25, 16, 512, 512),
    (50, 64, 512, 512),
    (25, 64, 1024, 1024),
)


def _core(cell: str) -> list[Row]:
    rows = [Row(cell, *sizes) for sizes in CORE]
    plain = Row(cell, 100, 32, 256, 256)
    return [*rows, replace(plain, L=2, D=2), replace(plain, packed=True)]


def _packed(cell: str) -> list[Row]:
    small = Row(cell, 100, 16, 128, 128, modes=(TRAINING,))
    rows = [
        Row(cell, 100, 32, 256, 256, packed=True),
        Row(cell, 1000, 16, 128, 128, packed=True, modes=(TRAINING,)),
        replace(small, dtype="float64"),
    ]
    return rows + ([replace(small, P=64)] if cell == "lstm" else [])


def _bf16(cell: str) -> list[Row]:
    return [replace(row, dtype="bfloat16") for row in _core(cell)]


def _deepbench(cell: str) -> list[Row]:
    """The rows of Baidu's DeepBench, where H = I. An entry is H, T and the values of N."""
    training: list[tuple[int, int, tuple[int, ...]]]
    inference: list[tuple[int, int, tuple[int, ...]]]
    if cell == "lstm":
        training = [(H, 25, (16, 32, 64, 128)) for H in (512, 1024, 2048, 4096)]
        training += [(1536, 50, (8, 16, 32)), (256, 150, (16, 32, 64))]
        inference = [(H, 25, (1, 2, 4)) for H in (512, 1024, 2048)]
        inference += [(1536, 50, (1, 2, 4)), (256, 150, (1, 2, 4))]
    elif cell == "gru":
        long = [(2816, 1500), (2048, 750), (1536, 375), (2560, 187)]
        training = [(H, T, (32,)) for H, T in long] + [(512, 1, (32,)), (1024, 1500, (32, 64))]
        inference = [(H, T, (1, 2, 4)) for H, T in [*long, (512, 1), (1024, 1500)]]
    else:
        training = [(H, 50, (16, 32, 64, 128)) for H in (1760, 2048, 2560)]
        inference = [(32, 672, (1,)), (64, 96, (1,))]
    return [
        Row(cell, T, N, H, H, modes=modes)
        for entries, modes in ((training, BOTH), (inference, (FORWARD,)))
        for H, T, batches in entries
        for N in batches
    ]


def _scaling(cell: str) -> list[Row]:
    """Rows in which one size varies and the others are fixed: T, then N, then H."""
    rows = [Row(cell, T, 1, 64, 64) for T in (1, 10, 100, 1000, 10_000)]
    rows.append(Row(cell, 100_000, 1, 64, 64, modes=(FORWARD,)))
    rows += [Row(cell, 100, N, 256, 256) for N in (1, 2, 4, 8, 16, 32, 64)]
    return rows + [Row(cell, 50, 16, H, H) for H in (32, 64, 128, 256, 512, 1024)]


def _overhead(cell: str) -> list[Row]:
    call = Row(cell, 1, 1, 64, 64, modes=(FORWARD,))
    return [call, replace(call, single=True)]


def _memory(cell: str) -> list[Row]:
    return [
        *_core(cell),
        Row(cell, 1000, 32, 256, 256),
        *(Row(cell, T, 1, 64, 64, modes=(FORWARD,)) for T in (1000, 10_000, 100_000)),
    ]


def _contention(cell: str) -> list[Row]:
    return [Row(cell, 100, 32, 256, 256), Row(cell, 100, 1, 256, 256)]


SETS: dict[str, Callable[[str], list[Row]]] = {
    "core": _core,
    "deepbench": _deepbench,
    "packed": _packed,
    "bf16": _bf16,
    "scaling": _scaling,
    "overhead": _overhead,
    "memory": _memory,
    "contention": _contention,
}
# The sets whose rows are timed, with torch.nn and rivals, while nothing else runs.
TIMED = ("core", "deepbench", "packed", "bf16", "scaling", "overhead")


def select(name: str, cells: Sequence[str], substring: str = "") -> list[Row]:
    """The rows of a set, for some cells, whose name contains a substring."""
    return [row for cell in cells for row in SETS[name](cell) if substring in row.name]


def merge(sets: Iterable[tuple[str, Sequence[Row]]]) -> dict[Row, list[str]]:
    """Returns every row once, with the modes and the names of all sets that contain it."""
    found: dict[str, tuple[Row, list[str]]] = {}
    for name, rows in sets:
        for row in rows:
            known, names = found.get(row.name, (row, []))
            modes = tuple(mode for mode in BOTH if mode in known.modes + row.modes)
            found[row.name] = (replace(known, modes=modes), [*names, name])
    return dict(found.values())

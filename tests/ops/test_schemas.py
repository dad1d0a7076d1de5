"""The schemas of the ops, and a program of an earlier version that calls them.

`python -m tests.ops.test_schemas FILE` writes such a program with the present ops. The files
of earlier versions stay as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedrnn

HERE = Path(__file__).parent
SCHEMAS = HERE / "golden_schemas.txt"
# A program that was saved with fusedrnn 0.1 and torch 2.13.0.
EXPORTED = HERE / "exported.pt2"
# torch.compile and torch.export put these ops into graphs. Only fusedrnn calls the last two.
OPS = ("forward", "backward", "double_backward", "_own", "info", "cuda_info")

RULE = (
    "Graphs that were exported before name these ops and their arguments. A new option goes to the "
    "end of the arguments and has a default; nothing is renamed, reordered or removed. Only such a "
    f"change may be written into {SCHEMAS.name}"
)


class Model(nn.Module):
    """A model of a layer without lengths and a layer with lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = fusedrnn.FusedLSTM(3, 4)
        self.padded = fusedrnn.FusedLSTM(4, 2, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, _ = self.plain(x)
        y, (h_n, c_n) = self.padded(y, lengths=lengths)
        return y, h_n, c_n


def arguments() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 5 * 3 * 3).view(5, 3, 3)
    return x, torch.tensor([2, 5, 0])


def test_schemas() -> None:
    schemas = [str(getattr(torch.ops.fusedrnn, op).default._schema) for op in OPS]
    assert schemas == SCHEMAS.read_text().splitlines(), RULE


def test_a_program_of_an_earlier_version() -> None:
    program = torch.export.load(EXPORTED)
    model = Model()
    model.load_state_dict(program.state_dict)
    for got, wanted in zip(program.module()(*arguments()), model(*arguments()), strict=True):
        assert torch.equal(got, wanted), RULE


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Model().eval(), arguments()), sys.argv[1])

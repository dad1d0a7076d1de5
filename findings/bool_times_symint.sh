#!/usr/bin/env bash
# torch 2.11.0: the product of a tensor's size and a bool fails if the size is symbolic.
#
# One would expect `x.shape[0] * keep` to be a size for any `keep`: a bool is an int in Python, and the
# line works on real tensors. But in a fake implementation under torch.export (or torch.compile with
# dynamic shapes) the size is a SymInt, and the product raises
#     TypeError: BooleanAtom not allowed in this context.
# With int(keep) it works. torch 2.13.0 and 2.14.1 accept the bool too. On Linux, x86-64, Python 3.12, the
# script prints:
#     eager: [5]
#     export, int(keep): ok
#     export, keep: TypeError: BooleanAtom not allowed in this context.
#
# The script exits with 0 if this is still so, and with 1 if it has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.11.0 sympy==1.14.0 numpy==2.2.6

cat >"$folder/program.py" <<'PROGRAM'
import logging

import torch

logging.disable(logging.ERROR)  # torch logs the error that the program prints


def define(name, number_of):
    """Defines an op whose result has as many rows as x, or none."""

    @torch.library.custom_op(f"findings::{name}", mutates_args=())
    def op(x: torch.Tensor, keep: bool) -> torch.Tensor:
        return x.new_zeros([x.shape[0] * number_of(keep)])

    @op.register_fake
    def _(x, keep):
        return x.new_empty([x.shape[0] * number_of(keep)])

    return op


class Model(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x, True)


def export(op):
    rows = torch.export.Dim("rows")
    torch.export.export(Model(op), (torch.randn(5, 3),), dynamic_shapes=({0: rows},))


as_int, as_bool = define("as_int", int), define("as_bool", bool)
print("eager:", list(as_bool(torch.randn(5, 3), True).shape))
export(as_int)
print("export, int(keep): ok")
try:
    export(as_bool)
except TypeError as error:
    print(f"export, keep: TypeError: {error}")
    raise SystemExit(0 if "BooleanAtom" in str(error) else 1)
print("export, keep: ok")
raise SystemExit(1)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"

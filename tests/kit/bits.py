"""Digests of outputs and gradients, to see whether a change keeps every bit.

    python -m tests.kit.bits write build/bits.json      # at the commit before
    python -m tests.kit.bits compare build/bits.json    # after the change

There is one digest for each cell, form of batch, dtype and size. The CPU engine runs with every
instruction set of this machine, with one thread and with two. The CUDA engine runs in every regime,
with its kernels in the PTX interpreter, if nvcc is there. The numbers come from numpy's generator,
which is the same everywhere, so a file may be compared on another machine with the same instruction
sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedrnn._library import CELLS, LIBRARY

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# T, N, I, H: odd sizes, few rows (so that weights are read as stored), several chunks, and sizes
# with which threads share steps by units.
CPU_SIZES = ((5, 3, 4, 6), (1, 1, 1, 1), (7, 9, 13, 33), (3, 1, 40, 64), (40, 17, 24, 128))
CUDA_SIZES = ((4, 3, 4, 5), (3, 9, 6, 24))
FORMS = ("plain", "packed", "lengths")


def arguments(
    cell: str, form: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], directions: int
) -> tuple[Any, ...]:
    """Arguments of the op `forward` with keep=True. The seed follows from the sizes."""
    T, N, I, H = sizes
    spec = CELLS[cell]
    P = max(1, H // 2) if spec.projects else H
    generator = np.random.RandomState(T * 1000 + N * 100 + I * 10 + H)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape) * scale).to(dtype)

    weights: list[Tensor] = []
    for p in spec.parameters_with(form != "packed") * directions:
        scale = 1.0
        if len(p.sizes) == 2:
            scale = 0.5 if p.sizes[-1] == "I" else H**-0.5
        weights.append(draw(*p.shape(G=spec.gates, H=H, I=I, P=P), scale=scale))
    lengths = generator.randint(0, T + 1, size=N)
    lengths[0] = T
    batch_sizes = given_lengths = None
    x = draw(T, N, I)
    if form == "packed":
        sorted_lengths = np.sort(np.maximum(lengths, 1))[::-1]
        counts = [int((sorted_lengths > t).sum()) for t in range(T)]
        batch_sizes = torch.tensor(counts)
        x = torch.cat([x[t, :count] for t, count in enumerate(counts)])
    elif form == "lengths":
        given_lengths = torch.from_numpy(lengths.astype(np.int64))
    h0 = draw(directions, N, P)
    c0 = draw(directions, N, H) if spec.has_c else None
    return x, h0, c0, weights, batch_sizes, given_lengths, N, cell, directions == 2, True


def digest(tensors: list[Tensor]) -> str:
    """A digest of values, dtypes and shapes."""
    total = hashlib.sha256()
    for t in tensors:
        total.update(f"{t.dtype} {list(t.shape)}".encode())
        total.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def run(
    forward: Callable[..., Any], backward: Callable[..., Any], given: tuple[Any, ...]
) -> list[Tensor]:
    """Outputs without a reserve, outputs with one, and all gradients."""
    x, h0, c0, weights, batch_sizes, lengths, N, cell, bidirectional, _ = given
    plain = list(forward(*given[:-1], False))[:3]
    y, h_n, c_n, reserve = forward(*given)
    generator = np.random.RandomState(7)

    def gradient(t: Tensor) -> Tensor:
        return torch.from_numpy(generator.standard_normal(tuple(t.shape))).to(t.dtype)

    grad_c = gradient(c_n) if CELLS[cell].has_c else None
    d_x, d_h0, d_c0, d_weights = backward(
        *(gradient(y), gradient(h_n), grad_c, x, h0, c0, weights, reserve),
        *(batch_sizes, lengths, N, cell, bidirectional, True, True, True),
    )
    return [*plain, y, h_n, c_n, d_x, d_h0, d_c0, *d_weights]


def cases(sizes: tuple[tuple[int, int, int, int], ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The name and the arguments of each case."""
    for cell in CELLS:
        for form in FORMS:
            for dtype in DTYPES:
                for size in sizes:
                    for directions in (1, 2):
                        name = f"{cell} {form} {str(dtype)[6:]} {size} D={directions}"
                        yield name, arguments(cell, form, dtype, size, directions)


def on_cpu() -> dict[str, str]:
    """Digests for the instruction set that this process runs."""
    ops = torch.ops.fusedrnn
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, given in cases(CPU_SIZES):
            result = digest(run(ops.forward, ops.backward, given))
            found[f"{LIBRARY.isa} threads={threads} {name}"] = result
    return found


def on_cuda() -> dict[str, str]:
    """Digests of the CUDA engine in the interpreter, in each regime that can run the case."""
    from tests.kit.bindings import ptx
    from tests.kit.torch_device import TorchDevice, using

    found = {}
    for regime in ("per_step", "resident", "streamed"):
        os.environ["FUSEDRNN_CUDA_REGIME"] = regime
        for name, given in cases(CUDA_SIZES):
            can_be_resident = given[0].dtype != torch.float64 and not CELLS[given[7]].projects
            if regime == "resident" and not can_be_resident:
                continue
            with using(TorchDevice(ptx(80))) as ops:
                found[f"cuda {regime} {name}"] = digest(run(ops["forward"], ops["backward"], given))
    return found


def everything() -> dict[str, str]:
    """Digests of every instruction set, each in its own process, and of the CUDA engine."""
    found: dict[str, str] = {}
    where = ["cuda", *(isa for isa, supported in LIBRARY.compiled.items() if supported)]
    for isa in where:
        variables = os.environ | ({} if isa == "cuda" else {"FUSEDRNN_ISA": isa})
        command = [sys.executable, "-m", "tests.kit.bits", "one", isa]
        said = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
        found |= json.loads(said.stdout.splitlines()[-1])  # a build may print lines before
        print(f"{isa}: {len(found)} digests", file=sys.stderr)
    return found


def main() -> int:
    """Runs the command that the arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kit.bits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (("write", "write the digests to a file"), ("compare", "compare with them")):
        commands.add_parser(name, help=help).add_argument("path", type=Path)
    one = commands.add_parser("one", help="print the digests of one instruction set, or of cuda")
    one.add_argument("isa")
    given = parser.parse_args()
    if given.command == "one":
        print(json.dumps(on_cuda() if given.isa == "cuda" else on_cpu()))
        return 0
    if given.command == "write":
        given.path.write_text(json.dumps(everything(), indent=1))
        return 0
    before, after = json.loads(given.path.read_text()), everything()
    common = before.keys() & after.keys()
    changed = sorted(name for name in common if before[name] != after[name])
    print(f"{len(common)} digests in common, {len(changed)} changed")
    print("\n".join(changed[:50]))
    print(f"only before: {sorted(before.keys() - after.keys())[:5]}")
    print(f"only after: {sorted(after.keys() - before.keys())[:5]}")
    return 1 if changed or not common else 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures exp, sigmoid and tanh over every float32, on every instruction set of this CPU.

python -m tests.kernels.sweep                 all 2^32 arguments, about 20 minutes on one CPU
python -m tests.kernels.sweep --stride 64     256 neighbours of every 64 * 256: half a minute
python -m tests.kernels.sweep --isas avx2 scalar --functions tanh
"""

from __future__ import annotations

import argparse

from fusedrnn import _console
from tests.kit.build import native

FUNCTIONS = ("exp", "sigmoid", "tanh")


def main() -> None:
    """Prints one line for each instruction set and function."""
    module = native()
    runnable = [isa for isa, missing in module.isas().items() if not missing]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--isas", nargs="+", default=runnable, choices=[*runnable, "scalar"])
    parser.add_argument("--functions", nargs="+", default=FUNCTIONS, choices=FUNCTIONS)
    arguments = parser.parse_args()
    print("| instruction set | function | arguments | worst ulps | at | worst step back | at |")
    print("|---|---|---|---|---|---|---|")
    for isa in arguments.isas:
        for function in arguments.functions:
            if (isa, function) == ("scalar", "exp"):
                continue
            found = module.sweep_float32(isa, function, stride=arguments.stride)
            print(
                f"| {isa} | {function} | {found['count']} "
                f"| {found['worst_ulps']:.3f} | {found['worst_at']!r} "
                f"| {found['worst_step_back']:g} | {found['step_back_at']!r} |",
                flush=True,
            )


if __name__ == "__main__":
    _console.run(main)

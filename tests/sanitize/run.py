"""Builds the CPU engine with AddressSanitizer and UndefinedBehaviorSanitizer, without torch, and
runs tests/sanitize/main.cpp on it: whole layers, odd shapes, every instruction set of this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

sys.path.insert(0, str(ROOT))
import setup_build

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# -O1 keeps every access that the sanitizers are to see. -Og and -O0 would take minutes to run.
# g++ warns of uninitialised values that are none where it instruments: no reason to stop.
FLAGS = [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer", "-Wno-error"]
LINK_FLAGS = [*SANITIZERS, "-pthread"]


def main() -> int:
    """Builds and runs the binary; returns the exit status."""
    try:
        binary = setup_build.ninja_build(
            ROOT / "build" / "sanitize",
            "engine",
            {**setup_build.engine_units(), HERE / "main.cpp": []},
            # The later of two -O holds.
            [*setup_build.common_flags(), *FLAGS],
            LINK_FLAGS,
        )
    except setup_build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([binary, *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

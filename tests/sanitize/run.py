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
# -O1 keeps the accesses that the sanitizers check. With -Og or -O0 the run would take minutes.
# g++ wrongly warns of uninitialised values in instrumented code, so warnings are no errors here.
FLAGS = [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer", "-Wno-error"]
LINK_FLAGS = [*SANITIZERS, "-pthread"]


def main() -> int:
    """Builds and runs the binary; returns the exit status."""
    try:
        binary = setup_build.ninja_build(
            ROOT / "build" / "sanitize",
            "engine",
            {**setup_build.engine_units(), HERE / "main.cpp": []},
            # -O1 comes behind the -O of common_flags, and the last -O counts.
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

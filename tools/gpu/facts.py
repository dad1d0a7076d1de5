"""Prints facts about the machine, its software and the sources as JSON.

Each fact is gathered separately, so that if one fails, the others are still found.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .process import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "setuptools", "ninja", "pytest", "hypothesis", "pybind11", "triton")
PROGRAMS = ("nvcc", "g++", "ncu", "compute-sanitizer", "cuobjdump")
VARIABLES = ("CUDA_", "CUBLAS_", "NVIDIA_", "PYTORCH_", "TORCH_", "FUSEDRNN_", "LD_PRELOAD", "OMP_")
# The names that nvidia-smi uses.
QUERIES = (
    *("name", "driver_version", "memory.total", "memory.used", "compute_mode", "mig.mode.current"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit"),
    *("persistence_mode", "ecc.mode.current", "pstate"),
)


def gather() -> dict[str, Any]:
    """Gathers all facts; a fact that fails is replaced by its error."""
    parts: dict[str, Callable[[], Any]] = {
        "python": platform.python_version,
        "platform": platform.platform,
        "libc": lambda: " ".join(platform.libc_ver()),
        "cores": lambda: len(os.sched_getaffinity(0)),
        "sources": sources,
        "commit": _commit,
        "programs": lambda: {name: shutil.which(name) is not None for name in PROGRAMS},
        "packages": _packages,
        "environment": _environment,
        "nvidia_smi": _nvidia_smi,
        "processes": _processes,
        "torch": _torch,
        "gpu": _gpu,
    }
    return {name: _attempt(part) for name, part in parts.items()}


def _attempt(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # any error, because the other facts are still needed
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def sources() -> str:
    """A checksum of the sources, by which the commit of results can be found."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("csrc/**/*"), *ROOT.glob("fusedrnn/*.py"), ROOT / "setup_build.py"]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip()[:200])
    return done.stdout.strip()


def _commit() -> str:
    changed = len(_run("git", "status", "--porcelain").splitlines())
    return _run("git", "rev-parse", "HEAD") + (f" and {changed} changed files" if changed else "")


def _packages() -> dict[str, str | None]:
    """The packages' versions, without importing them, which may be slow on a cold disk."""

    def version_of(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version_of(name) for name in PACKAGES}


def _environment() -> dict[str, str]:
    return {k: v[:500] for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}


def _nvidia_smi() -> dict[str, str]:
    said = _run("nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader")
    return dict(zip(QUERIES, said.splitlines()[0].split(", "), strict=True))


def _processes() -> list[str]:
    """Other programs on the GPU: they may take it away from a kernel that is spinning."""
    said = _run("nvidia-smi", "--query-compute-apps=pid,name,used_memory", "--format=csv,noheader")
    return said.splitlines()


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": torch.cuda.device_count(),
    }


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"error": "torch finds no GPU"}
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "sms": p.multi_processor_count,
        "memory": p.total_memory,
        "l2": getattr(p, "L2_cache_size", None),
        "shared_per_sm": getattr(p, "shared_memory_per_multiprocessor", None),
        "shared_per_block": getattr(p, "shared_memory_per_block_optin", None),
    }


def main() -> int:
    """Prints the facts."""
    end_with_parent()
    print(json.dumps(gather(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The header of a result file: the machine, its state and the versions of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fusedrnn
from fusedrnn._library import LIBRARY

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino", "jax", "jaxlib")
# The processor's flags that decide which kernels run.
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16", "amx_int8", "hypervisor"),
)
# Environment variables that change what is measured.
VARIABLES = re.compile(
    r"(OMP|GOMP|KMP|MKL|ONEDNN|DNNL|ATEN|FUSEDRNN|MALLOC|OPENBLAS|XLA|TORCHINDUCTOR)_|"
    r"LD_PRELOAD$|GLIBC_TUNABLES$"
)
# These environment variables keep torch.nn and the other libraries on AVX2.
AVX2 = {
    "FUSEDRNN_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def describe() -> dict[str, Any]:
    """Returns the machine, versions, commit and settings of this process."""
    config = torch.__config__.show()
    cpu = _cpuinfo()
    return {
        "date": now(),
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "caches": _caches(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": _found(r"Math Kernel Library Version ([\w.-]+)", config),
        "onednn": _found(r"MKL-DNN v([\d.]+)", config),
        "fusedrnn": fusedrnn.__version__,
        "isa": LIBRARY.isa,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len((_git("status", "--porcelain") or "").splitlines()),
        "environment": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k)},
        "load_before": list(os.getloadavg()),
    }


def now() -> str:
    """The time, to the second, with its zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _cpuinfo() -> dict[str, str]:
    """Returns the entry of the first processor in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> dict[str, int]:
    """Returns the size in bytes of each cache of the first core: L1d, L2, L3."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            scale = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            name = f"L{level}{'d' if kind == 'Data' else ''}"
            found[name] = int(size.rstrip("KM")) * scale
    return found


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None

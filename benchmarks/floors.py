"""The least time a row could take on this machine, from rates measured in the same process.

    floor = max(FLOPs / rate of matrix products, bytes of U read at every step / bandwidth)

The input product and the recurrent product have separate FLOPs and rates, each at its own shape. A
slow library must not make the floor high, so a rate is the best of those that torch.mm, oneDNN's
linear layer with packed weights, and both on large squares reach. The results also keep the floor
with the rates of the row's own shapes alone, and the peak of the multiply-add units.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

import setup_build
from fusedrnn._library import LIBRARY

from .measure import TimedCall, elapsed
from .shapes import TRAINING, Row

SOURCE = Path(__file__).with_name("native.cpp")
VECTOR_BYTES = {"avx512_bf16": 64, "avx512": 64, "avx2": 32}
# A product reaches its full rate with this many rows; more rows would only take longer.
MOST_ROWS = 4096
SQUARES = (512, 1024, 2048)
# The native loops run in this many short parts, and the best counts: at least one is undisturbed.
SLICES = 10


@cache
def native() -> ctypes.CDLL | None:
    """Returns the compiled native.cpp, or None if there is no compiler for it."""
    isa = LIBRARY.isa
    flags = [*setup_build.isa_flags().get(isa, []), f"-DVECTOR_BYTES={VECTOR_BYTES.get(isa, 16)}"]
    # Unlike the library's kernels, this code may fuse a * b + c.
    flags += ["-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast"]
    key = hashlib.sha256((SOURCE.read_text() + " ".join(flags)).encode()).hexdigest()[:12]
    target = setup_build.ROOT / "build" / "benchmarks" / f"native-{key}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(f".{threading.get_native_id()}")
            command = ["g++", *flags, str(SOURCE), "-o", str(unfinished)]
            subprocess.run(command, check=True, capture_output=True)
            unfinished.replace(target)
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError):
        return None
    library.multiply_add_rate.argtypes = [ctypes.c_double]
    library.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double]
    library.multiply_add_rate.restype = library.read_rate.restype = ctypes.c_double
    return library


class Rates:
    """The rates of this machine with some threads. Each is measured once, when it is needed."""

    def __init__(self, threads: int, seconds: float) -> None:
        """Measures each rate for about `seconds`."""
        self.threads = threads
        self.seconds = seconds
        self._known: dict[tuple[Any, ...], Any] = {}

    def product(self, M: int, K: int, N: int, dtype: torch.dtype) -> dict[str, float]:
        """Returns the FLOP/s of [M, K] x [K, N] by library."""
        M = min(M, MOST_ROWS)
        key = ("product", M, K, N, dtype)
        rates: dict[str, float] = self._once(key, lambda: self._product(M, K, N, dtype))
        return rates

    def square(self, dtype: torch.dtype) -> float:
        """The best FLOP/s of any library on a large square product."""
        sizes = [n for n in SQUARES if n <= 1024 or self.seconds >= 0.1]
        best = max(max(self.product(n, n, n, dtype).values()) for n in sizes)
        # oneDNN has no float64 products, but the units compute them at half of float32's rate.
        return max(best, self.square(torch.float32) / 2) if dtype == torch.float64 else best

    def peak(self, dtype: torch.dtype) -> float | None:
        """FLOP/s of the multiply-add units, for float32 and for float64 (half as many)."""
        if dtype not in (torch.float32, torch.float64):
            return None
        rate = self._once(("peak",), self._peak)
        if rate is None:
            return None
        # No product is faster than the peak, unless the measurement of the peak was disturbed.
        return max(float(rate) / (2 if dtype == torch.float64 else 1), self.square(dtype))

    def bandwidth(self, size: int) -> float | None:
        """Bytes/s at which the threads read an array of `size` bytes again and again."""
        rate: float | None = self._once(("bandwidth", size), lambda: self._bandwidth(size))
        return rate

    def as_dict(self) -> dict[str, Any]:
        """Everything measured so far, for JSON."""
        found: dict[str, Any] = {"products": [], "bandwidth": []}
        for (kind, *key), value in self._known.items():
            if kind == "product":
                *sizes, dtype = key
                name = str(dtype).removeprefix("torch.")
                found["products"].append({"sizes": sizes, "dtype": name, "rates": value})
            elif kind == "bandwidth":
                found["bandwidth"].append({"bytes": key[0], "rate": value})
            else:
                found["peak"] = value
        return found

    def _once(self, key: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _product(self, M: int, K: int, N: int, dtype: torch.dtype) -> dict[str, float]:
        generator = torch.Generator().manual_seed(3)
        x, w = (torch.randn(*s, generator=generator).to(dtype) for s in ((M, K), (N, K)))
        w_t = w.t().contiguous()
        calls: dict[str, TimedCall] = {
            "torch.mm": lambda: torch.mm(x, w_t),
            "torch.mm, transposed": lambda: torch.mm(x, w.t()),
        }
        with torch.inference_mode():
            if dtype != torch.float64 and torch.backends.mkldnn.is_available():
                mkldnn = torch.ops.mkldnn
                packed = mkldnn._reorder_linear_weight(w, M)
                calls["oneDNN"] = lambda: mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            return {name: 2 * M * K * N / self._fastest(call) for name, call in calls.items()}

    def _fastest(self, call: TimedCall) -> float:
        call()
        best, end = elapsed(call), time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            best = min(best, elapsed(call))
        return best

    def _peak(self) -> float | None:
        library = native()
        if library is None:
            return None
        return self._on_all_threads(lambda _: library.multiply_add_rate(self.seconds / SLICES))

    def _bandwidth(self, size: int) -> float | None:
        library = native()
        if library is None:
            return None
        # Each thread reads its own part, as it reads its own units' rows of U in a layer.
        part = max(512, size // self.threads // 512 * 512)
        memory = [torch.ones(part + 64, dtype=torch.uint8) for _ in range(self.threads)]

        def read(i: int) -> float:
            address = (memory[i].data_ptr() + 63) // 64 * 64
            return float(library.read_rate(address, part, self.seconds / SLICES))

        return self._on_all_threads(read)

    def _on_all_threads(self, body: Callable[[int], float]) -> float:
        """Returns the best sum over all threads, which run at once: ctypes releases the GIL."""
        time.sleep(0.02)  # until torch's threads, which spin when idle, have gone to sleep
        barrier = threading.Barrier(self.threads)

        def run(i: int) -> float:
            barrier.wait()
            return body(i)

        with ThreadPoolExecutor(self.threads) as pool:
            return max(sum(pool.map(run, range(self.threads))) for _ in range(SLICES))


def floor(row: Row, mode: str, rates: Rates) -> dict[str, Any]:
    """Computes the floors of a row in seconds, and the rates from which they follow.

    Returns:
        seconds: the floor with the best rates. own: the floor with only the rates of the row's own
        shapes. compute: the time of the products with the best rates. memory: the time to read U;
        None without a C++ compiler. peak: the time of the FLOPs at the peak of the multiply-add
        units. rate, bandwidth: the rates of products and of reading U, for display.
    """
    dtype = row.torch_dtype
    best, own = _products(row, mode, rates, rates.square(dtype)), _products(row, mode, rates, 0)
    passes = (2 if mode == TRAINING else 1) * max(row.lengths()) * row.D * row.L
    bandwidth = rates.bandwidth(row.u_bytes())
    memory = passes * row.u_bytes() / bandwidth if bandwidth else None
    peak = rates.peak(dtype)
    return {
        "seconds": max(best, memory or 0),
        "own": max(own, memory or 0),
        "compute": best,
        "memory": memory,
        "peak": row.flops(mode) / peak if peak else None,
        "rate": row.flops(mode) / best,
        "bandwidth": bandwidth,
    }


def _products(row: Row, mode: str, rates: Rates, at_least: float) -> float:
    """Seconds of all products, if none of them is slower than `at_least` FLOP/s."""
    S, GH, dtype = sum(row.lengths()), row.G * row.H, row.torch_dtype

    def rate(M: int, K: int) -> float:
        return max(at_least, *rates.product(M, K, GH, dtype).values())

    at_step, over_time = rate(row.N, row.out), rate(S, row.out)
    x_w = sum(2 * S * I * GH * row.D / rate(S, I) for I in row.inputs())
    h_u = row.step_flops()
    if mode != TRAINING:
        return x_w + h_u / at_step
    # Like x W, dx, dW and dU are products over all steps at once; dh is computed step by step.
    return 3 * x_w + 2 * h_u / at_step + h_u / over_time

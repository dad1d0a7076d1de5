"""Requests of plans of the CUDA engine, and the cards that the plan knows."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedrnn._library import CELLS

DTYPES = ["f32", "f64", "f16", "bf16"]
# Multiprocessors, and bytes of shared memory that a block may have.
CARDS = {
    "T4": (40, 65536),
    "A100": (108, 166912),
    "A100 80GB": (108, 166912),
    "RTX 3090": (82, 101376),
    "RTX 4090": (128, 101376),
    "L4": (58, 101376),
    "H100": (132, 232448),
    "H200": (132, 232448),
    "B200": (148, 232448),
    "RTX 5090": (170, 101376),
}


def random_request(rng: np.random.Generator) -> dict[str, Any]:
    cell = list(CELLS)[rng.integers(len(CELLS))]
    H = int(2 ** rng.uniform(0, 12))
    sizes = {
        "T": int(2 ** rng.uniform(0, 14)),
        "N": int(2 ** rng.uniform(0, 11)),
        "I": int(2 ** rng.uniform(0, 12)),
        "H": H,
        "P": max(1, int(H * rng.uniform(0.1, 1))) if CELLS[cell].projects else H,
        "D": int(rng.integers(1, 3)),
    }
    return {
        "cell": cell,
        "dtype": DTYPES[rng.integers(len(DTYPES))],
        "arch": list(CARDS)[rng.integers(len(CARDS))],
        "sizes": list(sizes.values()),
        "backward": bool(rng.integers(2)),
        "allow_tf32": bool(rng.integers(2)),
        "registers": int(rng.integers(32, 256)),
    }

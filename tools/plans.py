"""The plans of the CUDA engine for a card, as values. They need no GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusedrnn.selftest import REGIMES

# The cores, the units and the sequences of a block in the text of a plan.
_BLOCK = re.compile(r", (FMA|mma\.sync): .* each (\d+) units of (\d+) sequences")
_CORES = {"FMA": "fma", "mma.sync": "mma"}
# How the text of a plan names a regime, where that is not the regime's own name.
_WORDS = {"per_step": "per step"}


@dataclass(frozen=True)
class Block:
    """A block of a plan, in the words of FUSEDRNN_CUDA_PLAN.

    Args:
        cores: "mma" or "fma".
        units: how many units it has.
        rows: how many sequences it has.
    """

    cores: str
    units: int
    rows: int

    @property
    def choice(self) -> str:
        """The text that asks for such a block."""
        return f"cores={self.cores},units={self.units},rows={self.rows}"


@dataclass(frozen=True)
class Plan:
    """How a pass of a layer runs on a card, and the model's estimate.

    Args:
        regime: one of REGIMES, or "" if the regime that was asked for cannot run.
        words: the plan in words, or why that regime cannot run.
        step: the estimated microseconds of a step.
        total: those of the pass.
        limit: the resource that limits a step; "" if the regime cannot run.
    """

    regime: str
    words: str
    step: float
    total: float
    limit: str

    @property
    def short(self) -> str:
        """The regime, the kind of product and the blocks; "per step" for that regime."""
        return self.words.split(" blocks")[0] if " blocks" in self.words else word_of(self.regime)

    @property
    def layout(self) -> str:
        """The plan in words, without the measurement that it follows."""
        return self.words.split("; as measured on ")[0]

    @property
    def measured(self) -> bool:
        """Whether the plan follows a measurement (csrc/cuda/measured.h)."""
        return "as measured on " in self.words

    @property
    def block(self) -> Block | None:
        """The cores and the size of a block; None if no time loop runs in a kernel."""
        found = _BLOCK.search(self.words)
        return Block(_CORES[found[1]], int(found[2]), int(found[3])) if found else None

    @property
    def more_choice(self) -> str:
        """What the text that asks for the plan has besides its block, after a comma: how values are
        exchanged, and the clusters.
        """
        words = ",exchange=words" if "exchange of words" in self.words else ""
        found = re.search(
            r"clusters of (\d+) blocks share the source( and arrive as one)?", self.words
        )
        if found:
            words += f",cluster={found[1]}" + (",arrive=clusters" if found[2] else "")
        return words

    @property
    def streamed_bytes(self) -> int:
        """The bytes of weights that a block reads from L2 in each step."""
        found = re.search(r"(\d+) bytes of weights of a block come from L2", self.words)
        return int(found[1]) if found else 0


def word_of(regime: str) -> str:
    """The name of a regime in a text for people."""
    return _WORDS.get(regime, regime)


def regime_of(words: str) -> str:
    """The regime that a plan in words begins with, or "" if it says that the regime cannot run.

    The op does not return the regime, so this is the place that reads it from the text.

    Raises:
        ValueError: the text begins with another word.
    """
    if re.match(rf"(?:{'|'.join(REGIMES)}): cannot run, ", words):
        return ""
    for regime in REGIMES:
        if re.match(rf"{word_of(regime)}[,:] ", words):
            return regime
    raise ValueError(f"a plan must begin with its regime, got {words[:80]!r}")


def plan_of(
    cell: str,
    dtype: str,
    sizes: Sequence[int],
    card: str,
    backward: bool,
    tf32: bool = False,
    regime: str = "",
    choice: str = "",
) -> Plan:
    """Plans a pass of a layer.

    Args:
        cell: the engine's name of the cell.
        dtype: f32, f64, f16 or bf16.
        sizes: T, N, I, H, P, D.
        card: the name of a card or an architecture.
        backward: whether the pass is backward.
        tf32: whether float32 products may be computed in TF32.
        regime: the regime to ask for; "" leaves the choice to the plan.
        choice: what FUSEDRNN_CUDA_PLAN may be.
    """
    text, step, total, limit = torch.ops.fusedrnn._plan(
        cell, dtype, list(sizes), card, backward, tf32, regime, choice
    )
    words = text.splitlines()[1]
    return Plan(regime_of(words), words, step, total, limit)

"""The regimes of a row that is timed: what the plan chooses, and what else can run it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.shapes import TRAINING
from tools.plans import Plan, plan_of

from .rows import Timed
from .tasks import REGIME, REGIMES

PASSES = {"forward": False, "backward": True}


@dataclass(frozen=True)
class Choice:
    """The plans of a row in a mode.

    Args:
        plans: the plan of each layer, by the name of the pass.
    """

    plans: Mapping[str, list[Plan]]

    @property
    def words(self) -> list[str]:
        """Each plan in a few words, those of forward first."""
        return [plan.short for plans in self.plans.values() for plan in plans]

    @property
    def estimate(self) -> float:
        """The estimated microseconds of all passes and layers."""
        return sum(plan.total for plans in self.plans.values() for plan in plans)

    @property
    def measured(self) -> bool:
        """Whether a plan follows a measurement."""
        return any(plan.measured for plans in self.plans.values() for plan in plans)

    @property
    def by_pass(self) -> dict[str, str]:
        """The regime of each pass; if layers have several, as in "resident+streamed"."""
        return {which: _joined(plan.regime for plan in self.plans[which]) for which in self.plans}

    @property
    def regime(self) -> str:
        """The regime of all passes, or several as above."""
        return _joined(plan.regime for plans in self.plans.values() for plan in plans)


def _joined(regimes: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(regimes))


def choice_of(timed: Timed, mode: str, card: str, regime: str | None = None) -> Choice:
    """Plans a row.

    Args:
        timed: the row.
        mode: "forward" or "training".
        card: the plan's name of the card.
        regime: the regime to ask for; None asks as the engine does, by the environment's variable.
    """
    asked = os.environ.get(REGIME, "") if regime is None else regime
    tf32 = timed.precision == "tf32"
    return Choice(
        {
            which: [
                plan_of(timed.cell, timed.dtype, sizes, card, backward, tf32, asked)
                for sizes in timed.layers()
            ]
            for which, backward in PASSES.items()
            if mode == TRAINING or not backward
        }
    )


def others(timed: Timed, mode: str, card: str, chosen: str) -> list[str]:
    """The regimes that can run every pass and layer of a row, and that were not chosen for all.

    If the environment asks for a regime, there is none, because the others may be broken.
    """
    if os.environ.get(REGIME):
        return []
    return [
        regime
        for regime in REGIMES
        if regime != chosen and choice_of(timed, mode, card, regime).regime == regime
    ]

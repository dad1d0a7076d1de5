"""The cards whose limits the plan of the CUDA engine knows without a GPU, and their names."""

from __future__ import annotations

import dataclasses
import re

import torch


@dataclasses.dataclass(frozen=True)
class Card:
    """An entry of the table in csrc/cuda/estimate.h."""

    name: str
    architecture: str  # as in sm_90
    driver_name: str  # the result of torch.cuda.get_device_name

    @property
    def capability(self) -> int:
        """The compute capability, 90 for 9.0."""
        return int(self.architecture.removeprefix("sm_"))


# The cards in ascending order of capability. The first card of an architecture stands for it. The
# op is available here, because importing the package loads the library.
CARDS = [Card(*line.split("\t")) for line in torch.ops.fusedrnn._plan_cards().splitlines()]


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]", "", text).lower()


def card_spelled(text: str) -> str:
    """Returns the name of a card in the plan's table.

    Args:
        text: its name ("rtx 4090"), its driver's name for it ("NVIDIA GeForce RTX 4090") or an
            architecture ("sm_89"). Case, blanks, "-" and "_" do not matter.

    Raises:
        ValueError: no card has this name.
    """
    for card in CARDS:
        if _plain(text) in map(_plain, dataclasses.astuple(card)):
            return card.name
    names = ", ".join(f"{card.name} ({card.architecture})" for card in CARDS)
    raise ValueError(f"must be one of {names}, got {text!r}")


def card_named(device_name: str, capability: int) -> str:
    """Returns the name of the card in the plan's table that stands for a device.

    If the device itself is not in the table, the plan uses the number of multiprocessors and the
    memory of the card that stands for it: an H100 PCIe has 114 multiprocessors, but the plan counts
    the 132 of the H100.

    Args:
        device_name: the result of torch.cuda.get_device_name.
        capability: its compute capability, 90 for 9.0.

    Returns:
        The card with this name and capability. If there is none, the first card of the highest
        capability that is not above `capability`.

    Raises:
        ValueError: the capability is below that of every card.
    """
    below = [card for card in CARDS if card.capability <= capability]
    if not below:
        least = CARDS[0]
        raise ValueError(
            f"capability must be at least {least.capability}, of {least.architecture}, "
            f"got {capability} of {device_name!r}"
        )
    nearest = [card for card in below if card.capability == below[-1].capability]
    same = [card for card in nearest if _plain(card.driver_name) == _plain(device_name)]
    return (same or nearest)[0].name

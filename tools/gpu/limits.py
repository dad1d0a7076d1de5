"""Compares the plan's limits of a card with those that its driver reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from fusedrnn._cards import card_named
from fusedrnn.selftest import Selftest

# The card whose plan a dry run uses.
WITHOUT_A_GPU = "H100"
THREADS = 256  # per block


@dataclasses.dataclass(frozen=True)
class DriverFacts:
    """The driver's facts about a device and about the library's kernels on it."""

    device: dict[str, str]
    kernels: dict[str, dict[str, int]]  # name -> registers, shared, local, constant, max_threads


def parse(text: str) -> DriverFacts:
    """Reads the text of `torch.ops.fusedrnn._device_facts`."""
    device: dict[str, str] = {}
    kernels: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "kernel":
            name, *words = value.split()
            kernels[name] = {k: int(v) for k, v in zip(words[::2], words[1::2], strict=True)}
        else:
            device[key] = value
    return DriverFacts(device, kernels)


def driver_facts(device: torch.device) -> DriverFacts:
    """Asks the driver for its facts about a GPU."""
    return parse(torch.ops.fusedrnn._device_facts(device.index or 0))


def card(device: torch.device) -> str:
    """The plan's name of a device."""
    if device.type != "cuda":
        return WITHOUT_A_GPU
    major, minor = torch.cuda.get_device_capability(device)
    return card_named(torch.cuda.get_device_name(device), 10 * major + minor)


def differences(believed: Mapping[str, str], said: Mapping[str, str]) -> list[str]:
    """Lists the limits for which the plan and the driver have different values.

    How many blocks of clusters run together differs from device to device of a card, since it
    depends on where its multiprocessors are. A launch goes by what the driver says.
    """
    return [
        f"{key}: the plan has {value}, the driver says {said.get(key, 'nothing')}"
        for key, value in believed.items()
        if said.get(key) != value and not key.startswith("blocks_in_clusters")
    ]


def check(test: Selftest, options: Mapping[str, str]) -> None:
    """Compares the limits, and how many blocks of the kernels with a time loop run together."""
    facts = driver_facts(test.device)
    name = card(test.device)
    for key, value in facts.device.items():
        with test.check("driver", key) as found:
            found.detail = value
            assert value, "the driver says nothing"
    believed = parse(torch.ops.fusedrnn._plan_device(name)).device
    with test.check("limits", f"the card, as the plan knows {name}") as found:
        differ = differences(believed, facts.device)
        assert believed, f"the plan knows nothing of {name}"
        assert not differ, "; ".join(differ)
        found.detail = ", ".join(f"{key} {value}" for key, value in believed.items())
    if int(facts.device["capability"]) >= 90:
        for key, value in facts.device.items():
            if key.startswith("blocks_in_clusters"):
                with test.check("limits", f"{key}, at least one cluster") as found:
                    found.detail = f"the plan has {believed[key]}, the driver says {value}"
                    assert int(value) > 0, found.detail
    most = int(facts.device["shared_per_block"])
    for kernel, of in facts.kernels.items():
        with test.check("limits", f"registers of {kernel}") as found:
            found.detail = ", ".join(f"{key} {value}" for key, value in of.items())
            assert of["local"] == 0, f"it spills: {found.detail}"
            assert of["max_threads"] >= THREADS, found.detail
        if not kernel.startswith(("resident", "clustered", "streamed")):
            continue
        for shared in (0, 48 << 10, most // 2, most):
            with test.check("limits", f"blocks of {kernel} with {shared} bytes") as found:
                planned = torch.ops.fusedrnn._plan_blocks_per_sm(name, of["registers"], shared)
                told = torch.ops.fusedrnn._occupancy(kernel, shared, test.device.index or 0)
                found.detail = f"the plan has {planned}, the driver says {told}"
                assert planned == told, found.detail

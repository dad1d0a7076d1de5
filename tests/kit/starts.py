"""Calls that say where sequences begin, or whose y has c of every step, and what they must give."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

from fusedrnn import _reference
from fusedrnn._library import CELLS
from fusedrnn._options import Batch, Options
from tests.kit.device_cases import EPS, DeviceCase, Run, assert_close
from tests.kit.numpy_reference import WEIGHTS, Array


@dataclasses.dataclass(frozen=True)
class StartsCase(DeviceCase):
    """A call of a layer with these options.

    Attributes:
        share: the share of rows at which a sequence begins anew, or None if the call says nothing.
        seed: decides which rows these are.
        steps: steps at which all sequences begin anew beside that.
    """

    share: float | None = 0.4
    seed: int = 0
    steps: tuple[int, ...] = ()

    @functools.cached_property
    def starts(self) -> Array | None:  # type: ignore[override]
        if self.share is None:
            return None
        step = np.repeat(np.arange(len(self.batch_sizes)), self.batch_sizes)
        rng = np.random.default_rng([self.seed, len(step)])
        return (rng.random(len(step)) < self.share) | np.isin(step, self.steps)

    @functools.cached_property
    def leaves(self) -> dict[str, torch.Tensor]:
        """The inputs by their names in `expected`, in float64."""
        i = self.inputs
        given = {name: i[name] for name in ("x", "h0", "c0")}
        for d, direction in enumerate(i["weights"]):
            given |= {f"{w} {d}": v for w, v in zip(WEIGHTS, direction, strict=True)}
        return {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in given.items()
            if value is not None
        }

    @functools.cached_property
    def outputs(self) -> dict[str, torch.Tensor]:
        """The outputs of the layer in plain torch, in float64."""
        t = self.leaves
        # In the order in which the ops take them.
        order = {name: w for w, name in WEIGHTS.items()}
        weights = [
            t[f"{order[p.name]} {d}"]
            for d in range(self.D)
            for p in CELLS[self.cell].parameters_with(self.bias)
        ]
        starts = None if self.starts is None else torch.from_numpy(self.starts)
        batch = Batch(torch.tensor(self.batch_sizes), None, self.batch_sizes[0], starts)
        options = Options(self.cell, self.D == 2, self.c_in_y)
        # The reference takes as many states as there are sequences with steps.
        n = self.batch_sizes[0]
        states = [None if k not in t else t[k][:, :n] for k in ("h0", "c0")]
        y, h_n, c_n = _reference.layer(t["x"], *states, weights, batch, options)
        h_n = torch.cat([h_n, t["h0"][:, n:]], 1)
        if c_n is None:
            return {"y": y, "h_n": h_n}
        return {"y": y, "h_n": h_n, "c_n": torch.cat([c_n, t["c0"][:, n:]], 1)}

    @functools.cached_property
    def loss_weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        return {
            name: self._round(rng.normal(size=tuple(output.shape)))
            for name, output in self.outputs.items()
        }

    @functools.cached_property
    def expected(self) -> dict[str, Array]:
        """The outputs, and the gradients of the inputs."""
        loss = sum(
            (v * torch.from_numpy(self.loss_weights[k])).sum() for k, v in self.outputs.items()
        )
        leaves = self.leaves
        gradients: Any = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
        found = {name: v.detach().numpy() for name, v in self.outputs.items()}
        return found | {f"d_{name}": g.numpy() for name, g in zip(leaves, gradients, strict=True)}


def assert_as_expected(got: Run, case: StartsCase, eps: float | None = None) -> None:
    """Asserts that outputs and gradients equal those of plain torch.

    Args:
        eps: the eps of the products, if it differs from the dtype's.
    """
    assert_close(got.results, case.expected, case, eps or EPS[case.dtype])

"""Sequences that begin inside others, and c of every step in y, in all regimes of the CUDA engine.

Outputs and gradients are compared with the layer in plain torch in float64, and those of the ops
with the ops on the CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import setup_build
from fusedrnn._library import CELLS
from tests.kit import build
from tests.kit.arguments import FORMS, make_arguments
from tests.kit.device import Device, Limits
from tests.kit.device_cases import EPS_OF_TF32, Run, run_on, tight
from tests.kit.numpy_reference import Array
from tests.kit.starts import StartsCase, assert_as_expected
from tests.kit.torch_device import TorchDevice

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

RESIDENT_CELLS = [cell for cell, spec in CELLS.items() if not spec.projects]
DTYPES = ["f32", "f64", "f16", "bf16"]
# How a call is run, by a short name: the regime, the plan and the capability of the device.
WAYS: dict[str, tuple[str, str, int]] = {
    "per_step": ("per_step", "", 80),
    "fma": ("resident", "cores=fma", 80),
    "mma": ("resident", "cores=mma", 80),
    "words": ("resident", "exchange=words", 80),
    "clustered_fma": ("resident", "cores=fma,cluster=2", 90),
    "clustered_mma": ("resident", "cores=mma,cluster=2,arrive=clusters", 90),
    "streamed_fma": ("streamed", "cores=fma", 80),
    "streamed_mma": ("streamed", "cores=mma", 80),
}
RESIDENT_WAYS = [way for way, (regime, *_) in WAYS.items() if regime == "resident"]


def run(case: StartsCase, way: str, seed: int = 1, limits: Limits | None = None, **how: Any) -> Run:
    """Runs a case in one of WAYS, and checks that the kernels are those of that way."""
    regime, choice, capability = WAYS[way]
    clusters = (16, 16, 16) if capability == 90 else (0, 0, 0)
    limits = limits or Limits(capability=capability, sms=16, cluster_blocks=clusters)
    kernels = build.ptx_with_clusters() if capability == 90 else build.ptx(80)
    how = {"allow_tf32": "mma" in way and case.dtype == "f32"} | how
    got = run_on(case, Device(kernels, seed, limits), regime=regime, choice=choice, **how)
    cores = "mma" if "mma" in way else "fma"
    begin = "clustered" if "cluster" in way else "step" if way == "per_step" else regime
    loops = {name for name in got.device.launches if "forward_" in name or "backward_" in name}
    assert loops and all(name.startswith(begin) for name in loops), loops
    assert way == "per_step" or all(f"_{cores}_" in name for name in loops), loops
    return got


def check(case: StartsCase, way: str, seed: int = 1, **how: Any) -> Run:
    """Runs a case and checks the results, which are the same if nothing is kept for backward."""
    got = run(case, way, seed, **how)
    tf32 = any("tf32" in name for name in got.device.launches)
    assert_as_expected(got, case, EPS_OF_TF32 if tf32 else None)
    plain = run(case, way, seed + 1, keep=False, **how).results
    assert all((got.results[name] == value).all() for name, value in plain.items())
    # One launch more in each pass, for the states that a beginning drops, and none for a step.
    assert got.device.launches.count("drop_states") == 2
    return got


def assert_same(a: Run, b: Run) -> None:
    assert a.results.keys() == b.results.keys()
    assert all((b.results[name] == value).all() for name, value in a.results.items())


def case_of(cell: str, dtype: str, N: int = 4, **options: Any) -> StartsCase:
    """A case whose sequences have different lengths, one of them none."""
    P = 10 if CELLS[cell].projects else 18
    sizes = (N, N, N - 1, N - 1, N - 2, 2, 1)
    return StartsCase(cell, N + 1, 3, 18, P, 2, True, sizes, dtype, **options)


def case_for(way: str, cell: str, **options: Any) -> StartsCase:
    """A case that the cores of a way run: those for tensor cores take 8 sequences or more."""
    if "mma" in way:
        dtype = ("bf16", "f16", "f32")[list(CELLS).index(cell) % 3]
        return case_of(cell, dtype, 9, **options)
    return case_of(cell, "f32", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_per_step(cell: str, dtype: str) -> None:
    for seed in range(2):
        c_in_y = CELLS[cell].has_c and seed == 1
        check(case_of(cell, dtype, seed=seed, c_in_y=c_in_y), "per_step")


@pytest.mark.parametrize("way", RESIDENT_WAYS)
@pytest.mark.parametrize("cell", RESIDENT_CELLS)
def test_resident(cell: str, way: str) -> None:
    check(case_for(way, cell, c_in_y=CELLS[cell].has_c), way)


@pytest.mark.parametrize("way", ["streamed_fma", "streamed_mma"])
@pytest.mark.parametrize("cell", CELLS)
def test_streamed(cell: str, way: str) -> None:
    check(case_for(way, cell, c_in_y=CELLS[cell].has_c), way)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("way", ["fma", "streamed_fma"])
def test_other_beginnings(way: str, seed: int) -> None:
    """Few or many of them, and float64 or 16 bits on ordinary cores."""
    share = (0.1, 0.5, 1.0)[seed - 1]
    dtype = ("f16", "bf16", "f64" if way == "streamed_fma" else "f32")[seed - 1]
    for cell in ("lstm", "gru_reset_before"):
        check(case_of(cell, dtype, share=share, seed=seed), way)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "per_step"])
def test_several_launches(way: str) -> None:
    """A beginning at the first position of a launch drops the state that the last launch stored."""
    cell = "rnn_tanh" if "cluster" in way else "lstm"
    case = case_for(way, cell, steps=(2, 4))
    step = 2 * case.batch_sizes[0] * CELLS[cell].gates * 18 * 4
    got = run(case, way, gates_bytes=2 * step)
    assert_as_expected(got, case)
    forwards = [name for name in got.device.launches if "_forward_" in name]
    assert len(forwards) == -(-len(case.batch_sizes) // 2)
    assert_same(got, run(case, way, 2))


def test_several_groups_of_sequences_and_streamed_weights() -> None:
    case = StartsCase("gru", 11, 3, 110, 110, 2, True, (11, 9, 9, 2))
    check(case, "streamed_fma", limits=tight(case, 4, "fma_f32"))


@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
@pytest.mark.parametrize("way", WAYS)
def test_without_beginnings_no_bit_changes(way: str, cell: str) -> None:
    case = case_for(way, cell, share=0.0)
    silent = dataclasses.replace(case, share=None)
    got = run(silent, way)
    assert "drop_states" not in got.device.launches
    assert_same(run(case, way), got)


@pytest.mark.parametrize("way", WAYS)
def test_c_in_y(way: str) -> None:
    """h in y, and the states, have the same bits as without c. The gradient of c in y arrives."""
    for cell in ("lstm",) if way in RESIDENT_WAYS else ("lstm", "lstm_proj"):
        case = case_for(way, cell, share=None, c_in_y=True)
        whole = run(case, way)
        assert_as_expected(whole, case)
        got = whole.results
        without = run(dataclasses.replace(case, c_in_y=False), way, keep=False).results
        assert (got["y"][:, : 2 * case.P] == without["y"]).all()
        assert (got["c_n"] == without["c_n"]).all() and (got["h_n"] == without["h_n"]).all()


def sick_at(case: StartsCase, row: dict[int, int], array: Array) -> None:
    """NaN in the row of step row[n] for each sequence n."""
    for n, t in row.items():
        array[t * case.N + n] = np.nan


NAN_CELLS = ["lstm", "gru_reset_before", "lstm_proj"]


@pytest.mark.parametrize(
    ("way", "cell"),
    [(w, c) for w in WAYS for c in NAN_CELLS if w not in RESIDENT_WAYS or c in RESIDENT_CELLS],
)
def test_nan_stays_before_or_behind_a_beginning(way: str, cell: str) -> None:
    """All sequences begin at steps 0 and 2. Sequence 0 is ill before step 2, and 1 behind it."""
    N = 9 if "mma" in way else 3
    P = 10 if CELLS[cell].projects else 18
    dtype = "bf16" if "mma" in way else "f32"
    has_c = CELLS[cell].has_c
    case = StartsCase(
        *(cell, N, 3, 18, P, 2, True, (N,) * 4, dtype), share=0.0, steps=(0, 2), c_in_y=has_c
    )
    first, second = slice(2 * N), slice(2 * N, None)  # the rows before and behind step 2
    clean = run(case, way).results

    def same(got: dict[str, Array], name: str, rows: slice, n: int) -> bool:
        a, b = (r[name].reshape(4 * N, -1)[rows][n::N] for r in (got, clean))
        return bool((a == b).all())

    sick = dataclasses.replace(case)  # a copy computes its own inputs
    sick_at(case, {0: 1, 1: 3}, sick.inputs["x"])
    sick.inputs["h0"][0, 2] = np.nan
    if has_c:
        sick.inputs["c0"][0, 2] = np.nan
    got = run(sick, way).results
    for name in ("y", "d_x"):
        assert (
            same(got, name, second, 0) and same(got, name, first, 1) and same(got, name, first, 2)
        )
        assert not same(got, name, first, 0) and not same(got, name, second, 1)
    for name in ("h_n", "c_n", "d_h0", "d_c0")[:: 1 if has_c else 2]:
        assert (got[name][:, 2] == clean[name][:, 2]).all()
    for name in ("h_n", "c_n")[: 1 + has_c]:
        assert (got[name][0, 0] == clean[name][0, 0]).all()
        assert (got[name][1, 1] == clean[name][1, 1]).all()

    sick = dataclasses.replace(case)
    sick_at(case, {0: 1, 1: 3}, sick.loss_weights["y"])
    sick.loss_weights["h_n"][0, 1] = sick.loss_weights["h_n"][1, 0] = np.nan
    got = run(sick, way).results
    assert same(got, "d_x", second, 0) and same(got, "d_x", first, 1)
    assert not same(got, "d_x", first, 0) and not same(got, "d_x", second, 1)
    for name in ("d_h0", "d_c0")[: 1 + has_c]:
        assert not got[name][0].any()
        assert (got[name][1, 0] == clean[name][1, 0]).all()


# --- The ops, on CPU tensors ---------------------------------------------------------------------


def with_starts(form: str, dtype: torch.dtype, cell: str, **options: Any) -> tuple[Any, Tensor]:
    """Arguments of the ops, and where sequences begin."""
    call = make_arguments(cell, form, dtype=dtype, requires_grad=False, **options)
    shape = call.x.shape[:-1]
    return call, torch.from_numpy(np.random.default_rng(0).random(shape) < 0.4)


def both_ways(ops: Any, call: Any, starts: Tensor | None, c_in_y: bool) -> list[Tensor]:
    """The outputs of the ops but for the reserve, and all gradients."""
    *given, keep = call.op_arguments()
    rest = (starts, c_in_y)
    y, h_n, c_n, reserve = ops["forward"](*given, keep, *rest)
    rng = np.random.default_rng(1)
    grads = [torch.from_numpy(rng.normal(size=tuple(t.shape))).to(t.dtype) for t in (y, h_n, c_n)]
    if not CELLS[call.options.cell].has_c:
        grads[2] = None
    x, h0, c0, weights, *others = given
    *d_states, d_weights = ops["backward"](
        *(*grads, x, h0, c0, weights, reserve, *others, True, True, True, *rest)
    )
    # The CPU engine returns gradients of weights in the dtype of their sums.
    return [y, h_n, c_n, *d_states, *(d.to(x.dtype) for d in d_weights)]


def assert_as_on_cpu(gpu: dict[str, Any], call: Any, starts: Tensor | None, c_in_y: bool) -> None:
    cpu = {name: getattr(torch.ops.fusedrnn, name) for name in ("forward", "backward")}
    results = [both_ways(ops, call, starts, c_in_y) for ops in (gpu, cpu)]
    limit = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[call.x.dtype]
    for got, wanted in zip(*results, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if got.numel():
            error = (got.double() - wanted.double()).abs().max()
            assert error <= limit * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_ops(gpu: dict[str, Any], device: TorchDevice, cell: str, form: str) -> None:
    call, starts = with_starts(form, torch.float32, cell)
    assert_as_on_cpu(gpu, call, starts, CELLS[cell].has_c)
    assert device.launches.count("find_beginnings") == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ops_in_one_direction(gpu: dict[str, Any], dtype: torch.dtype, form: str) -> None:
    call, starts = with_starts(form, dtype, "lstm", D=1)
    assert_as_on_cpu(gpu, call, starts, True)
    assert_as_on_cpu(gpu, call, None, True)


def test_strided_starts(gpu: dict[str, Any]) -> None:
    call, starts = with_starts("lengths", torch.float32, "gru")
    strided = torch.stack([starts, ~starts], -1)[..., 0]
    assert not strided.is_contiguous()
    assert_as_on_cpu(gpu, call, strided, False)


def test_beginnings_in_padding_and_of_empty_sequences(gpu: dict[str, Any]) -> None:
    """A beginning behind the end of a sequence, or of one without steps, means nothing."""
    call, starts = with_starts("lengths", torch.float32, "lstm")
    for lengths in ([0, 5, 2], [0, 0, 0], [1, 0, 1]):
        call.batch = call.batch._replace(lengths=torch.tensor(lengths))
        assert_as_on_cpu(gpu, call, torch.ones_like(starts), True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_fake_results_are_as_large_as_the_real_ones(
    gpu: dict[str, Any], cell: str, form: str
) -> None:
    call, starts = with_starts(form, torch.bfloat16, cell)
    c_in_y = CELLS[cell].has_c
    real = gpu["forward"](*call.op_arguments(), starts, c_in_y)
    x, h0, c0, weights, sizes, lengths, *options = call.op_arguments()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")

        host = (None if t is None else mode.from_tensor(t) for t in (sizes, lengths))
        fakes = torch.ops.fusedrnn.forward(
            *(fake(x), fake(h0), fake(c0), [fake(w) for w in weights]),
            *(*host, *options, fake(starts), c_in_y),
        )
    for got, wanted in zip(fakes, real, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype

"""Checks of numbers: the smallest layers, every cell, every kernel, and torch's products.

Most of them run one case of fusedrnn.selftest at a time. If numbers are wrong, a second check says
which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusedrnn import _selftest_cases as cases
from fusedrnn._library import CELLS
from fusedrnn._selftest_cases import BFLOAT16, FLOAT32, FLOAT64, TF32, Call, Shape
from fusedrnn.selftest import Selftest, has_no_kernel
from tools.plans import Plan, plan_of

from . import limits
from .interpreter import Context
from .tasks import REGIMES

Options = Mapping[str, str]

# The smallest layers, from one step of one sequence to a layer that uses every part of a kernel,
# with the tensor cores, which begin at 8 sequences.
SMOKE = (
    Shape(1, 1, 3, 5),
    Shape(4, 3, 4, 7),
    Shape(3, 9, 6, 16, D=2, lengths=(3, 1, 0, 2, 3, 3, 1, 2, 3)),
)
# The sequences of a call that streams weights, and the largest H that is tried for one.
FEW, MOST_UNITS = 9, 3072
SHORT = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}


def compare(
    test: Selftest, call: Call, precision: cases.Precision, regime: str, choice: str = ""
) -> None:
    """Runs the selftest's check. If it fails, a second check says which numbers are wrong."""
    if has_no_kernel(call, precision, regime):
        return
    before = len(test.report.with_result("failed"))
    test.compare(call, precision, regime, choice)
    if len(test.report.with_result("failed")) > before:
        name = f"{call.cell} {precision.name} {call.shape} {regime} {choice}".rstrip()
        with test.check("where", name), cases.asking_for(regime, choice):
            raise AssertionError(where(test, call, precision, regime))


def where(test: Selftest, call: Call, precision: cases.Precision, regime: str) -> str:
    """Describes each tensor's wrong numbers (their count, range and first one) and the plan."""
    expected = cases.expected_results(call.cell, call.shape, precision.dtype)
    with cases.asking_for(regime), cases.float32_products(precision.tf32):
        leaves = call.leaves(test.device, precision.dtype)
        actual, again = call.results(leaves), call.results(leaves)
        test.synchronize()
    said = []
    for key, wanted in expected.items():
        got = actual[key].cpu().double()
        if got.shape != wanted.shape or wanted.numel() == 0:
            continue
        bad = ~(cases.error_in_eps(got, wanted, precision) <= precision.limit)
        if not bad.any():
            continue
        at = bad.nonzero()
        first = tuple(at[0].tolist())
        said.append(
            f"{_name_of(call, key)} {list(got.shape)}: {int(bad.sum())} wrong, in "
            f"{at.min(0).values.tolist()}..{at.max(0).values.tolist()}, "
            f"{int(got.isnan().sum())} of them nan, first {list(first)} is {got[first]:.6g}, "
            f"wanted {float(wanted[first]):.6g}"
            + ("" if torch.equal(actual[key], again[key]) else ", other bits in a second run")
        )
    return "; ".join(said)[:1200] + " | " + _plan_of(test, call, precision, regime).words[:200]


def _name_of(call: Call, key: str) -> str:
    """The name of the tensor that is "gradient 3" or "output 1" of a call's results."""
    kind, number = key.split()
    if kind == "output":
        return ("y", "h_n", "c_n")[int(number)]
    weights = [parameter.name for parameter in CELLS[call.cell].parameters]
    names = ["x", "h0", "c0", *weights, *(f"{name}_reverse" for name in weights)]
    return f"d_{names[int(number)]}"


def _plan_of(
    test: Selftest,
    call: Call,
    precision: cases.Precision,
    regime: str,
    backward: bool = False,
) -> Plan:
    s = call.shape
    P = max(1, s.H // 2) if CELLS[call.cell].projects else s.H
    dtype, sizes = SHORT[precision.dtype], [s.T, s.N, s.I, s.H, P, s.D]
    card = limits.card(test.device)
    return plan_of(call.cell, dtype, sizes, card, backward, precision.tf32, regime)


def smoke(test: Selftest, options: Options) -> None:
    """Compares the smallest layers in every dtype."""
    for shape in SMOKE:
        for precision in test.precisions(shape):
            compare(test, Call("lstm", shape), precision, options["regime"])


def parity(test: Selftest, options: Options) -> None:
    """Compares one cell in one regime in every dtype, at small or at large sizes."""
    shapes = cases.SMALL if options["size"] == "small" else cases.LARGE
    if Context.interpreter:
        shapes = cases.SMALL[:1]
    for shape in shapes:
        for precision in test.precisions(shape):
            compare(test, Call(options["cell"], shape), precision, options["regime"])


def choice(test: Selftest, options: Options) -> None:
    """Compares one cell with a plan that runs only if it is asked for."""
    for shape in SMOKE[1:]:
        for precision in test.precisions(shape):
            call = Call(options["cell"], shape)
            compare(test, call, precision, options["regime"], options["choice"])


def from_l2(test: Selftest, options: Options) -> None:
    """Compares one cell at the least H at which both passes stream weights from L2."""
    cell, card = options["cell"], limits.card(test.device)
    for precision in (FLOAT32, FLOAT64, BFLOAT16, *([] if test.why_no_tf32() else [TF32])):
        H = least_streamed(cell, SHORT[precision.dtype], precision.tf32, card)
        if H:
            compare(test, Call(cell, Shape(3, FEW, 32, H)), precision, "streamed")
        else:
            why = f"no H up to {MOST_UNITS} streams weights on {card}"
            test.not_run("from L2", f"{cell} {precision.name}", why)


def least_streamed(cell: str, dtype: str, tf32: bool, card: str) -> int:
    """The least H, in steps of 128, at which both passes stream weights from L2; 0 for none."""
    for H in range(256, MOST_UNITS + 1, 128):
        P = H // 2 if CELLS[cell].projects else H
        sizes = [3, FEW, 32, H, P, 1]
        passes = (plan_of(cell, dtype, sizes, card, b, tf32, "streamed") for b in (False, True))
        if all(plan.streamed_bytes for plan in passes):
            return H
    return 0


def kernels(test: Selftest, options: Options) -> None:
    """Checks with the profiler (or the interpreter) that every kernel of the library runs."""

    clusters = has_clusters(test)

    def run() -> None:
        for cell, regime, choice in (
            *(("lstm", regime, "") for regime in REGIMES),
            ("gru", "per_step", ""),
            *([("lstm", "resident", "cluster=2")] if clusters else []),
        ):
            for shape in SMOKE[1:]:
                call = Call(cell, shape)
                for precision in test.precisions(shape):
                    if has_no_kernel(call, precision, regime):
                        continue
                    asking = cases.asking_for(regime, choice)
                    with asking, cases.float32_products(precision.tf32):
                        call.results(call.leaves(test.device, precision.dtype))
        # Some kernels run only where sequences begin inside the rows.
        call = Call("gru", cases.STARTS)
        call.results(call.leaves(test.device, FLOAT32.dtype))
        test.synchronize()

    run()  # the first call loads kernels, which should not be profiled
    if Context.interpreter:
        there, ran = set(Context.interpreter.kernels), set(Context.interpreter.launches)
    else:
        there = set(limits.driver_facts(test.device).kernels)
        ran = _profiled(run)
        if not ran:
            test.not_run("kernels", "which ran", "torch's profiler saw nothing of the GPU")
            return
    if not clusters:
        there = {name for name in there if not name.startswith("clustered")}
    # Torch itself adds products of float64, unless it lacks the C function for that.
    there.discard("store_f64")
    with test.check("kernels", "all have run") as check:
        check.detail = f"{len(there & ran)} of {len(there)}"
        missing = sorted(there - ran)
        assert not missing, f"{check.detail}; not: {', '.join(missing)}"


def has_clusters(test: Selftest) -> bool:
    """Whether blocks can be in clusters on the device."""
    if Context.interpreter:
        return bool(Context.interpreter.device.cluster_blocks[0])
    return int(limits.driver_facts(test.device).device.get("blocks_in_clusters_of_2", 0)) > 0


def _profiled(run: Callable[[], None]) -> set[str]:
    """The names of the kernels that ran on the GPU, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
    # The types of arguments, templates and return values are cut off the names.
    names = (event.key.split("(")[0].split("<")[0].split() for event in found.key_averages())
    return {words[-1] for words in names if words}


def products(test: Selftest, options: Options) -> None:
    """Checks torch's products as the engine uses them: strides, odd offsets, 16 bits to float32."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        wide = dtype.itemsize == 2 and test.device.type == "cuda"  # a CPU has no such product
        for into in [dtype, *([torch.float32] if wide else [])]:
            for offset in (0, 1, 3):
                for rows in (37, 1):
                    name = f"{dtype} into {into}, offset {offset}, {rows} rows"
                    with test.check("products", name) as check:
                        check.detail = _product(test.device, dtype, into, offset, rows)
    if test.device.type != "cuda":
        return
    for dtype in (torch.bfloat16, torch.float16):
        with test.check("products", f"{dtype} a long sum") as check:
            check.detail = _long_sum(test.device, dtype)


def _product(
    device: torch.device, dtype: torch.dtype, into: torch.dtype, offset: int, rows: int
) -> str:
    """Checks that a product into a part of a matrix is right and writes nothing else."""
    N, K = 45, 50

    def randn(count: int) -> Tensor:
        return torch.randn(count + offset, device=device).to(dtype)[offset:]

    a = randn(rows * (K + 9)).view(rows, K + 9)[:, :K]
    b = randn(N * K).view(N, K).t()
    c = torch.full((rows, N + 5), 7.0, device=device, dtype=into)
    out = c[:, 2 : N + 2]
    if into == dtype:
        torch.mm(a, b, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, into, out=out)
    wanted = a.double().cpu() @ b.double().cpu()
    off = float((out.double().cpu() - wanted).abs().max() / wanted.abs().max())
    eps = torch.finfo(into).eps * (2 if into.itemsize == 2 else 16)
    assert off <= eps, f"off by {off:.1e}, allowed {eps:.1e}"
    beside = torch.cat([c[:, :2], c[:, N + 2 :]], 1)
    assert bool((beside == 7).all()), "it wrote beside the output"
    return f"off by {off:.1e}"


def _long_sum(device: torch.device, dtype: torch.dtype) -> str:
    """Checks a weight's gradient, a long sum for which torch may let cuBLAS add 16-bit parts."""
    a = torch.randn(4800, 1024, device=device).to(dtype)
    b = torch.randn(4800, 256, device=device).to(dtype)
    wanted = a.double().t() @ b.double()

    def off(result: Tensor) -> float:
        eps = torch.finfo(dtype).eps
        return float((result.double() - wanted).abs().max() / wanted.abs().max()) / eps

    wide = torch.empty(1024, 256, device=device)
    torch.ops.aten.mm.dtype_out(a.t(), b, torch.float32, out=wide)
    ours, torchs = off(wide.to(dtype)), off(torch.mm(a.t(), b))
    said = f"{ours:.2f} eps by way of float32, {torchs:.2f} by torch.mm alone"
    assert ours <= 0.6, said  # the rounding alone is half of eps at most
    return said

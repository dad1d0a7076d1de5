"""What the tasks of a run look at; `do` finds each by its name.

Most of it is fusedrnn.selftest's, one section or case at a time, so that a GPU that hangs in one
costs no other. Here stands what only a run of its own can look at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import fusedrnn
from fusedrnn import _selftest_cases as cases
from fusedrnn import ops
from fusedrnn._selftest_cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TF32, Call, Shape
from fusedrnn.selftest import Selftest

from . import limits
from .tasks import REGIMES, SPIN_LIMIT

Options = Mapping[str, str]

# The smallest layers, from one step of one sequence to one that uses every part of a kernel: the
# tensor cores begin at 8 sequences.
SMOKE = (
    Shape(1, 1, 3, 5),
    Shape(4, 3, 4, 7),
    Shape(3, 9, 6, 16, D=2, lengths=(3, 1, 0, 2, 3, 3, 1, 2, 3)),
)
SHORT = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}


class Context:
    """What stands in for a GPU in this process: the PTX interpreter, or nothing."""

    interpreter: Any = None


@contextlib.contextmanager
def interpreted() -> Iterator[Any]:
    """The ops of the CUDA library on CPU tensors, their kernels in the interpreter of the tests."""
    from tests.torch_cuda.build import ptx
    from tests.torch_cuda.device import TorchDevice, using

    device = TorchDevice(ptx(80))
    before = ops._forward_now, ops._backward_now
    with using(device) as gpu:
        ops._forward_now, ops._backward_now = gpu["forward"], gpu["backward"]
        try:
            yield device
        finally:
            ops._forward_now, ops._backward_now = before


def do(kind: str, test: Selftest, options: Options) -> None:
    """Does one task; what it finds goes into the test's report."""
    task = TASKS.get(kind)
    if task:
        task(test, options)
    else:
        # A section of the selftest.
        {
            "tf32": test.tf32_is_used,
            "determinism": test.determinism,
            "modules": test.modules,
            "errors": test.errors,
            "memory": test.memory,
            "streams": test.streams,
            "graphs": test.graphs,
        }[kind]()


def has_tf32(test: Selftest) -> bool:
    """Whether float32 products can be computed in TF32 there."""
    return Context.interpreter is not None or not test.why_no_tf32()


def precisions(test: Selftest, shape: Shape) -> Iterator[cases.Precision]:
    """Those that a shape is checked in."""
    yield from (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
    if shape.N >= 8 and has_tf32(test):
        yield TF32


def compare(test: Selftest, call: Call, precision: cases.Precision, regime: str) -> None:
    """The selftest's own check; where it fails, a second one says where the numbers are wrong."""
    if precision == FLOAT64 and regime == "resident":
        return  # there is no such kernel
    before = len(test.report.with_result("failed"))
    test.compare(call, precision, regime)
    if len(test.report.with_result("failed")) > before:
        with test.check("where", f"{call.cell} {precision.name} {call.shape} {regime}"):
            raise AssertionError(where(test, call, precision, regime))


def where(test: Selftest, call: Call, precision: cases.Precision, regime: str) -> str:
    """Which numbers are wrong: of each tensor how many, in which box, the first; and the plan."""
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
    return "; ".join(said)[:1200] + " | " + _plan_of(test, call, precision, regime)


def _name_of(call: Call, key: str) -> str:
    """What "gradient 3" or "output 1" of a call's results is."""
    kind, number = key.split()
    if kind == "output":
        return ("y", "h_n", "c_n")[int(number)]
    per = 5 if call.cell == "lstm_proj" else 4
    weights = ["w_ih", "w_hh", "b_ih", "b_hh", "w_hr"][:per]
    names = ["x", "h0", "c0", *weights, *(f"{name}_reverse" for name in weights)]
    return f"d_{names[int(number)]}"


def _plan_of(test: Selftest, call: Call, precision: cases.Precision, regime: str) -> str:
    s = call.shape
    P = max(1, s.H // 2) if call.cell == "lstm_proj" else s.H
    sizes = [s.T, s.N, s.I, s.H, P, s.D]
    card = limits.card(test.device)
    arguments = (card, False, precision.tf32, regime if P == s.H else "")
    text, *_ = torch.ops.fusedrnn._plan(call.cell, SHORT[precision.dtype], sizes, *arguments)
    return text.splitlines()[1][:200]


# --- Smallest layers, kernels, products ----------------------------------------------------------


def smoke(test: Selftest, options: Options) -> None:
    """The smallest layers in every dtype."""
    for shape in SMOKE:
        for precision in precisions(test, shape):
            compare(test, Call("lstm", shape), precision, options["regime"])


def parity(test: Selftest, options: Options) -> None:
    """One cell in one regime, every dtype, at small or at large sizes."""
    shapes = cases.SMALL if options["size"] == "small" else cases.LARGE
    if Context.interpreter:
        shapes = cases.SMALL[:1]
    for shape in shapes:
        for precision in precisions(test, shape):
            compare(test, Call(options["cell"], shape), precision, options["regime"])


def kernels(test: Selftest, options: Options) -> None:
    """Every kernel of the library has run, by what the profiler (or the interpreter) saw."""

    def run() -> None:
        for cell, regime in (("lstm", "resident"), ("lstm", "per_step"), ("gru", "per_step")):
            for shape in SMOKE[1:]:
                for precision in precisions(test, shape):
                    if precision == FLOAT64 and regime == "resident":
                        continue
                    with cases.asking_for(regime), cases.float32_products(precision.tf32):
                        call = Call(cell, shape)
                        call.results(call.leaves(test.device, precision.dtype))
        test.synchronize()

    run()  # what is loaded at a first call is not to be profiled
    if Context.interpreter:
        there, ran = set(Context.interpreter.kernels), set(Context.interpreter.launches)
    else:
        there = set(limits.driver_facts(test.device).kernels)
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
        seen = {event.key.split("(")[0].split("<")[0].strip() for event in found.key_averages()}
        ran = {name.split()[-1] for name in seen if name}
        if not ran:
            test.not_run("kernels", "which ran", "torch's profiler saw nothing of the GPU")
            return
    with test.check("kernels", "all have run") as check:
        check.detail = f"{len(there & ran)} of {len(there)}"
        missing = sorted(there - ran)
        assert not missing, f"{check.detail}; not: {', '.join(missing)}"


def products(test: Selftest, options: Options) -> None:
    """Products of torch's as the engine asks for them: strides, odd offsets, float32 of 16 bits."""
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
    """One product into a part of a matrix: that it is right, and wrote nothing beside itself."""
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
    """A gradient of a weight: a long sum, which torch may let cuBLAS cut into 16-bit parts."""
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


# --- Tensors, modes and devices ------------------------------------------------------------------


def offsets(test: Selftest, options: Options) -> None:
    """Tensors that begin in the middle of a storage, at odd elements."""
    call = Call("lstm", Shape(6, 9, 7, 17))
    for regime in test.regimes:
        for precision in (FLOAT32, FLOAT16, BFLOAT16):
            for by in (1, 3):
                name = f"{precision.name} {by} elements {regime}"
                with test.check("offsets", name) as check, cases.asking_for(regime):
                    leaves = call.leaves(test.device, precision.dtype)
                    moved = [None if t is None else _moved(t, by) for t in leaves]
                    worst, place = call.error_of(call.results(moved), precision)
                    check.detail = f"{worst:.2f} eps in {place}"
                    assert worst <= precision.limit, check.detail


def _moved(t: Tensor, by: int) -> Tensor:
    """The same leaf in a storage in which it begins `by` elements later."""
    storage = torch.empty(t.numel() + by, dtype=t.dtype, device=t.device)
    view = storage[by:].view(t.shape)
    view.copy_(t.detach())
    return view.detach().requires_grad_()


def deterministic_mode(test: Selftest, options: Options) -> None:
    """Under torch.use_deterministic_algorithms a layer does what torch.mm does: runs, or raises."""
    layer = fusedrnn.FusedLSTM(6, 16, device=test.device)
    x = torch.randn(5, 9, 6, device=test.device)
    before = layer(x)[0]

    def outcome(call: Callable[[], Any]) -> str:
        try:
            call()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return ""

    torch.use_deterministic_algorithms(True)
    try:
        of_torch = outcome(lambda: torch.mm(x[0], x[0].t()))
        with test.check("deterministic mode", "as torch.mm") as check:
            ours = outcome(lambda: layer(x)[0].sum().backward())
            check.detail = ours[:200] or "runs"
            assert bool(ours) == bool(of_torch), f"torch.mm: {of_torch or 'runs'}; ours: {ours}"
            if not ours:
                assert torch.equal(layer(x)[0], before), "other numbers than before"
    finally:
        torch.use_deterministic_algorithms(False)


def two_devices(test: Selftest, options: Options) -> None:
    """A layer on a GPU that is not the current one."""
    count = torch.cuda.device_count() if test.device.type == "cuda" else 0
    if count < 2:
        test.not_run("two devices", "a layer on the second", f"there are {count} GPUs here")
        return
    for regime in test.regimes:
        with test.check("two devices", f"cuda:1 while cuda:0 is current {regime}") as check:
            with cases.asking_for(regime):
                worst, place = Call("lstm", SMOKE[2]).error(torch.device("cuda", 1), FLOAT32)
            check.detail = f"{worst:.2f} eps in {place}"
            assert worst <= FLOAT32.limit, check.detail
            assert torch.cuda.current_device() == 0, "the current device is another one now"


# --- Processes of their own ----------------------------------------------------------------------


def cold_capture(test: Selftest, options: Options) -> None:
    """A CUDA graph of the very first call: its kernels are loaded while the graph is captured."""
    warm = torch.randn(64, 64, device=test.device)
    warm @ warm  # torch's own products are not what is looked at
    warm.bfloat16() @ warm.bfloat16()
    test.synchronize()
    with test.check("cold capture", "the first call of a process") as check:
        call = Call("lstm", SMOKE[1])
        leaves = call.leaves(test.device, torch.float32)
        sizes = [s.shape for s in cases.expected_results("lstm", SMOKE[1], torch.float32).values()]
        cotangents = [torch.ones(size, device=test.device) for size in sizes[:3]]
        begin = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call.results(leaves, cotangents)
        check.detail = f"{(time.perf_counter() - begin) * 1e3:.0f} ms"
        graph.replay()
        test.synchronize()
        assert cases.same_bits(captured, call.results(leaves, cotangents)), "the replay differs"


def allocator(test: Selftest, options: Options) -> None:
    """Training under another allocator of torch's: the same numbers again and again."""
    for regime in REGIMES:
        for precision in (FLOAT32, BFLOAT16):
            name = f"{options['name']}, {precision.name} {regime}"
            with test.check("allocator", name) as check, cases.asking_for(regime):
                call = Call("gru", cases.SMALL[2])
                for _ in range(10):
                    worst, place = call.error(test.device, precision)
                    check.detail = f"{worst:.2f} eps in {place}"
                    assert worst <= precision.limit, check.detail


def watchdog(test: Selftest, options: Options) -> None:
    """A barrier that is given up at once: an error that names the kernel, and no hang."""
    kernel = f"resident_{options['which']}_"
    with test.check("watchdog", options["which"]) as check, cases.asking_for("resident"):
        call = Call("lstm", Shape(50, 4, 8, 256))
        leaves = call.leaves(test.device, torch.float32)
        limit = os.environ.pop(SPIN_LIMIT)
        if options["which"] == "backward":
            outputs = call.outputs(leaves)
            cotangents = call.cotangents(outputs)
            test.synchronize()
        os.environ[SPIN_LIMIT] = limit
        with said_by_process() as said:
            try:
                if options["which"] == "backward":
                    torch.autograd.grad(outputs, [t for t in leaves if t is not None], cotangents)
                else:
                    call.outputs(leaves)
                torch.cuda.synchronize(test.device)
                error = ""
            except RuntimeError as raised:
                error = str(raised).splitlines()[0]
        assert error, f"no barrier gave up with {SPIN_LIMIT}={limit}"
        named = next((line for line in said if kernel in line), "")
        check.detail = f"{error[:150]} | {named[:200]}"
        assert named, f"nothing names {kernel}*: {error[:300]} | {' / '.join(said)[-500:]}"
        # What is left of this context answers nothing; the check must not ask it.
        test.synchronize = lambda: None  # type: ignore[method-assign]


@contextlib.contextmanager
def said_by_process() -> Iterator[list[str]]:
    """What this process writes meanwhile, that of the driver included; a list of lines in the end.

    Nothing is lost: it is written on standard error afterwards.
    """
    lines: list[str] = []
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+b") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield lines
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
            # Of thousands of threads that say the same, the first.
            print("\n".join(lines[:20]), file=sys.stderr, flush=True)


# --- Under load ----------------------------------------------------------------------------------


def stress(test: Selftest, options: Options) -> None:
    """The same bits, many times, beside work on another stream: results that move are a race."""
    cuda = test.device.type == "cuda"
    shapes = ((64, 32, 256, 1024), (200, 8, 64, 256), (300, 1, 64, 512))
    if test.quick or not cuda:
        shapes = ((5, 12, 8, 24),)
    times = 3 if not cuda else 20 if options["regime"] == "per_step" else 60
    for sizes in shapes:
        for precision in (FLOAT32, BFLOAT16):
            name = f"{options['cell']} {precision.name} {Shape(*sizes)} {options['regime']}"
            with (
                test.check("stress", name, may_refuse=True) as check,
                cases.asking_for(options["regime"]),
            ):
                different = _repeat(test.device, options["cell"], Shape(*sizes), precision, times)
                check.detail = f"{different} of {times} differ"
                assert different == 0, check.detail


def _repeat(
    device: torch.device, cell: str, shape: Shape, precision: cases.Precision, times: int
) -> int:
    call = Call(cell, shape)
    leaves = call.leaves(device, precision.dtype)
    cotangents = call.cotangents(call.outputs(leaves))
    first = call.results(leaves, cotangents)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    load = torch.randn(2048, 2048, device=device) if side else None
    different = 0
    for k in range(times):
        if side is not None and load is not None and k % 2:
            with torch.cuda.stream(side):
                load @ load
        different += not cases.same_bits(first, call.results(leaves, cotangents))
    return different


def two_streams(test: Selftest, options: Options) -> None:
    """Launches on two streams that each want the whole device: none may wait for ever."""
    rounds = 20
    with (
        test.check("two streams", f"lstm beside gru {options['regime']}") as check,
        cases.asking_for(options["regime"]),
    ):
        calls = [Call(cell, Shape(100, 16, 64, 512)) for cell in ("lstm", "gru")]
        streams = [torch.cuda.Stream(test.device) for _ in calls]
        leaves = [call.leaves(test.device, torch.bfloat16) for call in calls]
        jobs = [
            (call, stream, leaf, call.cotangents(call.outputs(leaf)))
            for call, stream, leaf in zip(calls, streams, leaves, strict=True)
        ]
        expected = [call.results(leaf, cotangents) for call, _, leaf, cotangents in jobs]
        test.synchronize()
        different = 0
        for _ in range(rounds):
            found = []
            for call, stream, leaf, cotangents in jobs:
                with torch.cuda.stream(stream):
                    found.append(call.results(leaf, cotangents))
            test.synchronize()
            different += sum(
                not cases.same_bits(a, b) for a, b in zip(expected, found, strict=True)
            )
        check.detail = f"{different} of {2 * rounds} differ"
        assert different == 0, check.detail


# --- Of a dry run: what goes wrong on purpose ----------------------------------------------------


def hang(test: Selftest, options: Options) -> None:
    """Never ends."""
    while True:
        time.sleep(1)


def crash(test: Selftest, options: Options) -> None:
    """Dies of a signal."""
    os.kill(os.getpid(), signal.SIGKILL)


def wrong(test: Selftest, options: Options) -> None:
    """Finds a wrong number."""
    right = cases.Call.results

    def spoiled(self: Call, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        results = right(self, *arguments, **named)
        if not named:  # ours, not the reference's
            results["output 0"].view(-1)[-1] += 1
        return results

    cases.Call.results = spoiled  # type: ignore[method-assign]
    try:
        compare(test, Call("lstm", SMOKE[1]), FLOAT32, "")
    finally:
        cases.Call.results = right  # type: ignore[method-assign]


def raising(test: Selftest, options: Options) -> None:
    """Raises outside of a check."""
    raise RuntimeError("a task that raises")


TASKS: dict[str, Callable[[Selftest, Options], None]] = {
    "limits": limits.check,
    "products": products,
    "smoke": smoke,
    "kernels": kernels,
    "parity": parity,
    "offsets": offsets,
    "deterministic_mode": deterministic_mode,
    "two_devices": two_devices,
    "cold_capture": cold_capture,
    "allocator": allocator,
    "watchdog": watchdog,
    "stress": stress,
    "two_streams": two_streams,
    "hang": hang,
    "crash": crash,
    "wrong": wrong,
    "raise": raising,
}

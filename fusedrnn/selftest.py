"""Checks fusedrnn on this machine and writes a report: `python -m fusedrnn.selftest`.

It compares every cell, dtype and regime with a float64 reference on the CPU, gradients included. It
checks that the same call gives the same bits, that wrong arguments are errors, that training does
not use more and more memory, and on a GPU other streams and CUDA graphs. A small benchmark compares
times with torch.nn's (cuDNN on a GPU). The report is written as Markdown and as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _console
from ._cell_modules import FusedLSTMCell
from ._errors import refuses_regime
from ._library import CELLS, cuda_problem, torch_lacks_cuda
from ._modules import FusedGRU, FusedLSTM, FusedRNN
from ._selftest_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LARGE,
    SMALL,
    TF32,
    Call,
    Precision,
    Shape,
    asking_for,
    capturing,
    float32_products,
    same_bits,
)
from ._selftest_report import Check, Report, Timing

# In the plan's order of choice. The last one runs every layer on every GPU.
REGIMES = ("resident", "streamed", "per_step")
BENCHMARK = ((100, 1, 256, 256), (100, 32, 256, 256), (150, 32, 1024, 1024), (50, 128, 512, 512))
# The cycles that a stream sleeps, about 0.15 s: longer than the host needs to enqueue a small call.
SLEEP = 300_000_000


class Selftest:
    """Runs the sections on one device and collects the results in `report`.

    Args:
        device: the CPU or a GPU.
        quick: whether only small shapes are checked.
        regimes: the regimes of a GPU to check; ("",) on a device without regimes.
    """

    def __init__(
        self, device: torch.device, quick: bool = True, regimes: Sequence[str] = ("",)
    ) -> None:
        self.device = device
        self.quick = quick
        self.regimes = regimes
        self.report = Report(device, quick, regimes)

    @contextlib.contextmanager
    def check(self, section: str, name: str, may_refuse: bool = False) -> Iterator[Check]:
        """Records the block as a check, which fails if the block raises.

        If the block raises because the regime that was asked for cannot run, and `may_refuse` is
        set, the check counts as not run.
        """
        check = Check(section, name.rstrip(), "passed")
        try:
            yield check
            self.synchronize()
        except AssertionError as error:
            check.result, check.detail = "failed", str(error)
        except Exception as error:
            check.result = "failed"
            check.detail = "".join(traceback.format_exception_only(type(error), error)).strip()
            if refuses_regime(error):
                if may_refuse:
                    check.result, check.detail = "not run", str(error)
                else:
                    check.detail += " (--regime per_step checks that regime alone)"
        self.report.checks.append(check)
        if check.result == "failed":
            print(f"FAILED {section}: {check.name}: {check.detail}", flush=True)

    def not_run(self, section: str, name: str, why: str) -> None:
        """Records and prints that something cannot be checked here."""
        self.report.checks.append(Check(section, name, "not run", why))
        print(f"not run: {section}: {name}: {why}", flush=True)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def why_no_tf32(self) -> str:
        """The reason why float32 products cannot be computed in TF32; "" if they can."""
        if self.device.type != "cuda":
            return "the CPU computes float32 products in float32"
        major, minor = torch.cuda.get_device_capability(self.device)
        return "" if major >= 8 else f"sm_{major}{minor} has no TF32; sm_80 and later have it"

    def run(self, benchmark: bool) -> None:
        """Runs every section."""
        sections: list[Callable[[], None]] = [
            self.parity,
            self.determinism,
            self.modules,
            self.errors,
            self.memory,
        ]
        if self.device.type == "cuda":
            sections += [self.streams, self.graphs]
        if benchmark:
            sections.append(self.benchmark)
        # If only per_step is checked, it is also used where a section does not ask for a regime.
        only = "per_step" if tuple(self.regimes) == ("per_step",) else ""
        with asking_for(only), float32_products(tf32=False):
            for section in sections:
                begin = time.perf_counter()
                section()
                print(f"{section.__name__}: {time.perf_counter() - begin:.1f} s", flush=True)

    # --- Sections -------------------------------------------------------------------------------

    def parity(self) -> None:
        """Compares outputs and gradients with float64, for every cell, precision and regime."""
        why_no_tf32 = self.why_no_tf32()
        for cell in CELLS:
            for shape in SMALL if self.quick else SMALL + LARGE:
                call = Call(cell, shape)
                for precision in self.precisions(shape):
                    for regime in self.regimes:
                        self.compare(call, precision, regime)
        if why_no_tf32:
            self.not_run("parity", "tf32", why_no_tf32)
        else:
            self.tf32_is_used()

    def precisions(self, shape: Shape) -> list[Precision]:
        """The precisions for a shape. TF32 is left out if N < 8: tensor cores are not used then."""
        with_tf32 = shape.N >= 8 and not self.why_no_tf32()
        return [FLOAT32, FLOAT64, FLOAT16, BFLOAT16, *([TF32] if with_tf32 else [])]

    def compare(self, call: Call, precision: Precision, regime: str, choice: str = "") -> None:
        """Compares outputs and gradients of one call with float64.

        A plan that is asked for by `choice`, a text for FUSEDRNN_CUDA_PLAN, may be refused.
        """
        name = f"{call.cell} {precision.name} {call.shape} {regime} {choice}".rstrip()
        refusable = bool(choice) or may_refuse(call, precision, regime)
        with (
            self.check("parity", name, refusable) as check,
            asking_for(regime, choice),
            float32_products(precision.tf32),
        ):
            worst, where = call.error(self.device, precision)
            check.detail = f"{worst:.2f} eps in {where}"
            if not call.compares_gradients(precision):
                check.detail += ", outputs alone"
            assert worst <= precision.limit, f"{check.detail}, allowed {precision.limit:g}"

    def tf32_is_used(self) -> None:
        """Checks that our own products give other numbers with TF32 than without it.

        The products of the per-step regime are torch's.
        """
        for cell in CELLS:
            call = Call(cell, SMALL[2])
            for regime in ("resident", "streamed"):
                if regime in self.regimes and not has_no_kernel(call, TF32, regime):
                    self._uses_tf32(call, regime)

    def _uses_tf32(self, call: Call, regime: str) -> None:
        """Checks one cell in one regime."""
        x, h0, *_ = leaves = call.leaves(self.device, torch.float32)
        assert x is not None and h0 is not None
        # With x = 0, y depends only on the kernel's own product. So does the gradient of h0.
        x.detach().zero_()
        with self.check("parity", f"{call.cell} tf32 is used {regime}"), asking_for(regime):
            outputs = call.outputs(leaves)
            cotangents = call.cotangents(outputs)
            y: list[Tensor] = []
            d_h0: list[Tensor] = []
            for tf32 in (False, True):
                with float32_products(tf32):
                    y.append(call.outputs(leaves)[0])
                    d_h0 += torch.autograd.grad(outputs, h0, cotangents, retain_graph=True)
            assert not torch.equal(*y), "forward computes in float32"
            assert not torch.equal(*d_h0), "backward computes in float32"

    def determinism(self) -> None:
        """Checks that the same call gives the same bits, in every regime."""
        shape = SMALL[2] if self.quick else LARGE[0]
        precisions = [FLOAT32, BFLOAT16] + ([] if self.why_no_tf32() else [TF32])
        for cell in CELLS:
            call = Call(cell, shape)
            for precision in precisions:
                for regime in self.regimes:
                    name = f"{cell} {precision.name} {regime}"
                    with (
                        self.check("determinism", name, may_refuse(call, precision, regime)),
                        asking_for(regime),
                        float32_products(precision.tf32),
                    ):
                        leaves = call.leaves(self.device, precision.dtype)
                        first = call.results(leaves)
                        for _ in range(3):
                            assert same_bits(first, call.results(leaves)), "two runs differ"

    def modules(self) -> None:
        """Compares layers with torch.nn's on the same device; also runs autocast and gradcheck."""
        pairs = ((FusedLSTM, nn.LSTM), (FusedGRU, nn.GRU), (FusedRNN, nn.RNN))
        for ours_type, theirs_type in pairs:
            with self.check("modules", f"{ours_type.__name__} beside torch.nn"):
                ours, theirs = _pair(ours_type, theirs_type, self.device, 6, 9, num_layers=2)
                x = torch.randn(7, 3, 6, device=self.device)
                torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-3, atol=1e-4)
            with self.check("modules", f"{ours_type.__name__} under autocast"):
                layer = ours_type(6, 9, device=self.device)
                x = torch.randn(7, 3, 6, device=self.device)
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    y = layer(x)[0]
                assert y.dtype == torch.bfloat16, y.dtype
                torch.testing.assert_close(y.float(), layer(x)[0], rtol=0.1, atol=0.05)
        for module, width in ((FusedLSTM(2, 3), 2), (FusedLSTMCell(2, 3), 2)):
            with self.check("modules", f"gradcheck of {type(module).__name__}"):
                module.to(self.device, torch.float64)
                x = torch.randn(3, 2, width, dtype=torch.float64, device=self.device)
                x = (x if isinstance(module, FusedLSTM) else x[0]).requires_grad_()
                assert torch.autograd.gradcheck(lambda x, module=module: module(x)[0], (x,))

    def errors(self) -> None:
        """Checks that wrong arguments raise an exception."""
        with self.check("errors", "states of a wrong shape"):
            layer = FusedGRU(3, 4, device=self.device)
            x = torch.randn(5, 2, 3, device=self.device)
            _raises(RuntimeError, lambda: layer(x, torch.zeros(1, 1, 4, device=self.device)))
        if self.device.type != "cuda":
            return
        with self.check("errors", "input on the CPU, weights on the GPU"):
            _raises(RuntimeError, lambda: layer(x.cpu()))
        with self.check("errors", "the ops themselves on mixed devices"):
            weights = [p.detach() for p in layer.parameters()]
            arguments = (x, None, None, [weights[0].cpu(), *weights[1:]], None, None, 2)
            _raises(
                RuntimeError, lambda: torch.ops.fusedrnn.forward(*arguments, "gru", False, True)
            )
        with self.check("errors", "out of memory"):
            wide = torch.empty(1, 1, 3, device=self.device).expand(1 << 23, 1 << 12, 3)
            _raises(torch.OutOfMemoryError, lambda: layer(wide))

    def memory(self) -> None:
        """Checks that repeated training steps do not use more memory."""
        layer = FusedLSTM(32, 64, device=self.device)
        x = torch.randn(20, 8, 32, device=self.device)

        def held() -> int:
            if self.device.type == "cuda":
                self.synchronize()
                return torch.cuda.memory_allocated(self.device)
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

        def train(times: int) -> None:
            for _ in range(times):
                layer.zero_grad(set_to_none=True)
                layer(x)[0].sum().backward()

        with self.check("memory", "200 steps of training") as check:
            train(20)
            before = held()
            train(200)
            grown = held() - before
            check.detail = f"{grown} bytes more"
            # On the CPU the figure is that of the whole process, so it may grow a little.
            assert grown <= (0 if self.device.type == "cuda" else 16 << 20), check.detail

    def streams(self) -> None:
        """Checks that forward and backward run on the current stream."""
        for regime in self.regimes:
            with self.check("streams", f"a side stream {regime}"), asking_for(regime):
                self._on_a_side_stream(Call("lstm", SMALL[2]))

    def _on_a_side_stream(self, call: Call) -> None:
        """Runs a call after a long sleep and a copy of new inputs, all on one stream.

        Work on another stream would run during the sleep, and read the old inputs or results. The
        host must not wait during the sleep. It would wait for a copy from its own memory, for
        memory that this stream has not had before, and for the first launch of a kernel. So these
        happen before the sleep.
        """
        new = call.leaves(self.device, torch.float32)
        old = [None if t is None else (t.detach() / 2).requires_grad_() for t in new]
        cotangents = call.cotangents(call.outputs(new))
        expected = call.results(new, cotangents)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            warm = call.results(old, cotangents)
            side.synchronize()
            assert not same_bits(expected, warm), "other inputs give the same numbers"
            del warm
            sources = [t for t in new if t is not None]
            targets = [t for t in old if t is not None]
            # The copy runs once before the sleep, because a kernel is loaded at its first launch,
            # and that waits for running kernels.
            torch._foreach_copy_([torch.empty_like(t) for t in targets], sources)
            torch.cuda._sleep(SLEEP)
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)
            actual = call.results(old, cotangents)
            asleep = not side.query()
        side.synchronize()
        assert asleep, "the stream was done before all was enqueued, which shows nothing"
        assert same_bits(expected, actual), "the side stream gives other numbers"

    def graphs(self) -> None:
        """Checks that a CUDA graph of a call gives the results of the call, also for new inputs."""
        for cell in ("lstm", "gru_reset_before"):
            for regime in self.regimes:
                for shape in (SMALL[0], SMALL[2]):
                    name = f"{cell} {shape} {regime}"
                    with self.check("graphs", name), asking_for(regime):
                        self._capture(Call(cell, shape))

    def _capture(self, call: Call) -> None:
        leaves = call.leaves(self.device, torch.float32)
        cotangents = call.cotangents(call.outputs(leaves))
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            call.results(leaves, cotangents)  # loads the kernels before the capture
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self.device):
            captured = call.results(leaves, cotangents)
        for _ in range(2):
            with torch.no_grad():
                for t in leaves:
                    if t is not None:
                        t.copy_(torch.randn_like(t))
            expected = call.results(leaves, cotangents)
            graph.replay()
            self.synchronize()
            assert same_bits(expected, captured), "the replay differs"

    def benchmark(self) -> None:
        """Measures the median times of our layers and of torch.nn's."""
        cuda = self.device.type == "cuda"
        shapes = BENCHMARK[:1] if self.quick else BENCHMARK if cuda else BENCHMARK[:2]
        precisions = [FLOAT32, *([FLOAT16, BFLOAT16] if cuda else [])]
        for ours_type, theirs_type in ((FusedLSTM, nn.LSTM), (FusedGRU, nn.GRU)):
            for T, N, I, H in shapes:
                for precision in precisions:
                    ours, theirs = _pair(ours_type, theirs_type, self.device, I, H)
                    x = torch.randn(T, N, I, device=self.device).to(precision.dtype)
                    for kind in ("forward", "training"):
                        median, spread = self._time(ours.to(x.dtype), x, kind)
                        theirs_median, _ = self._time(theirs.to(x.dtype), x, kind)
                        row = (ours_type.__name__, precision.name, f"{T},{N},{I},{H}", kind)
                        self.report.timings.append(Timing(*row, median, theirs_median, spread))

    def _time(self, layer: nn.Module, x: Tensor, kind: str) -> tuple[float, float]:
        def once() -> None:
            if kind == "forward":
                with torch.no_grad():
                    layer(x)
            else:
                layer.zero_grad(set_to_none=True)
                layer(x)[0].sum().backward()

        for _ in range(3):
            once()
        times = []
        for _ in range(5 if self.quick else 20):
            self.synchronize()
            begin = time.perf_counter()
            once()
            self.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times), max(times) / min(times)


def has_no_kernel(call: Call, precision: Precision, regime: str) -> bool:
    """Whether a regime has no kernel for a call: float64 and projections cannot be resident."""
    return regime == "resident" and (CELLS[call.cell].projects or precision == FLOAT64)


def may_refuse(call: Call, precision: Precision, regime: str) -> bool:
    """Whether a regime may refuse a call; it runs small layers for which it has a kernel."""
    return has_no_kernel(call, precision, regime) or call.shape not in SMALL


def _raises(kind: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def _pair(ours: Any, theirs: Any, device: torch.device, *sizes: int, **options: Any) -> Any:
    """Returns our layer and torch.nn's with the same weights."""
    torch.manual_seed(0)
    left, right = (kind(*sizes, **options, device=device) for kind in (ours, theirs))
    left.load_state_dict(copy.deepcopy(right.state_dict()))
    return left, right


def _why_not_on(device: torch.device) -> str:
    """The reason why a GPU cannot run anything; "" if it can."""
    if lacks := torch_lacks_cuda():
        return lacks
    if not torch.cuda.is_available():
        return "torch finds no GPU: see whether `nvidia-smi` does"
    if device.index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, {device} is none of them"
    return cuda_problem(device.index)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 if nothing failed, 1 if a check did, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.selftest", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N; default: cuda")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="small shapes alone")
    parser.add_argument("--regime", choices=REGIMES, help="of a GPU, this one alone; default: all")
    parser.add_argument("--no-benchmark", action="store_true")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if not options.out.is_dir():
        parser.error(f"--out must be a folder, got {str(options.out)!r}")
    regimes: Sequence[str] = ("",)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if problem := _why_not_on(device):
            print(f"fusedrnn.selftest: cannot run on {options.device}: {problem}", file=sys.stderr)
            return 2
        regimes = [options.regime] if options.regime else REGIMES
    elif options.regime:
        parser.error(f"--regime is for a GPU, and --device is {options.device}")
    test = Selftest(device, options.quick, regimes)
    test.run(not options.no_benchmark)
    name = f"fusedrnn-selftest-{device.type}"
    (options.out / f"{name}.json").write_text(json.dumps(test.report.as_json(), indent=1) + "\n")
    (options.out / f"{name}.md").write_text(test.report.as_markdown())
    print(f"{test.report.summary()}; {options.out / name}.md and .json")
    return int(bool(test.report.with_result("failed")))


if __name__ == "__main__":
    _console.run(main)

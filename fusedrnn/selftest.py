"""Checks fusedrnn on the machine at hand and writes a report: `python -m fusedrnn.selftest`.

Every cell, dtype and regime against a float64 reference on the CPU, gradients included; whether the
same call gives the same bits; other streams, CUDA graphs and memory on a GPU; a small benchmark
against torch.nn (cuDNN on a GPU). The report says what ran where: Markdown to read and JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _reference, ops
from ._library import CELLS, CUDA, config, cuda_problem
from ._version import __version__
from .cells import FusedLSTMCell
from .modules import FusedGRU, FusedLSTM, FusedRNN

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# The largest error allowed, over the largest value of a tensor, in eps of the dtype.
EPS_ALLOWED = {torch.float32: 200, torch.float64: 1000, torch.float16: 8, torch.bfloat16: 8}
REGIME = "FUSEDRNN_CUDA_REGIME"


@dataclasses.dataclass
class Check:
    """One thing that was looked at: "passed", "failed", or why it was "not run"."""

    section: str
    name: str
    result: str
    detail: str = ""


@dataclasses.dataclass
class Timing:
    """Medians in microseconds, and the spread (largest over smallest) of our runs."""

    layer: str
    dtype: str
    shape: str  # T,N,I,H
    kind: str  # "forward" (inference) or "training" (forward and backward)
    ours: float
    theirs: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call, and the lengths of its sequences where they differ."""

    T: int
    N: int
    I: int
    H: int
    D: int = 1
    lengths: tuple[int, ...] = ()
    packed: bool = False

    def __str__(self) -> str:
        form = "packed" if self.packed else "lengths" if self.lengths else "plain"
        return f"{self.T},{self.N},{self.I},{self.H} D={self.D} {form}"


SMALL = (
    Shape(5, 3, 4, 7, D=2),
    Shape(1, 1, 3, 5),
    Shape(9, 12, 6, 17, D=2, lengths=(9, 2, 0, 5, 9, 1, 3, 3, 7, 9, 4, 6)),
    Shape(7, 9, 6, 16, D=2, lengths=(7, 7, 5, 4, 4, 3, 2, 1, 1), packed=True),
)
LARGE = (Shape(40, 32, 64, 256), Shape(50, 1, 128, 512), Shape(20, 64, 96, 300, D=2))
BENCHMARK = ((100, 1, 256, 256), (100, 32, 256, 256), (150, 32, 1024, 1024), (50, 128, 512, 512))


class Selftest:
    """Runs the sections on one device and keeps what came of them."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device = device
        self.quick = quick
        self.checks: list[Check] = []
        self.timings: list[Timing] = []

    @contextlib.contextmanager
    def check(self, section: str, name: str) -> Iterator[Check]:
        """Records a check: failed where the block raises, passed where it does not."""
        check = Check(section, name, "passed")
        try:
            yield check
            self.synchronize()
        except AssertionError as error:
            check.result, check.detail = "failed", str(error)
        except Exception as error:
            check.result = "failed"
            check.detail = "".join(traceback.format_exception_only(type(error), error)).strip()
        self.checks.append(check)
        if check.result == "failed":
            print(f"FAILED {section}: {name}: {check.detail}", flush=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.result == "failed"]

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
        for section in sections:
            begin = time.perf_counter()
            section()
            print(f"{section.__name__}: {time.perf_counter() - begin:.1f} s", flush=True)

    # --- Sections -------------------------------------------------------------------------------

    def parity(self) -> None:
        """Outputs and gradients against float64, every cell, dtype and regime."""
        regimes = ["resident", "per_step"] if self.device.type == "cuda" else ["the one"]
        shapes = SMALL if self.quick or self.device.type == "cpu" else SMALL + LARGE
        for cell in CELLS:
            for shape in shapes:
                call = _Call(cell, shape)
                for dtype in DTYPES:
                    for regime in regimes:
                        name = f"{cell} {_name(dtype)} {shape} {regime}"
                        with self.check("parity", name) as check, _environment(REGIME, regime):
                            try:
                                worst, where = call.error(self.device, dtype)
                            except ValueError as error:
                                if "resident regime was asked for" not in str(error):
                                    raise
                                check.result, check.detail = "not run", str(error)
                                continue
                            check.detail = f"{worst:.2f} eps in {where}"
                            allowed = EPS_ALLOWED[dtype]
                            assert worst <= allowed, f"{check.detail}, allowed {allowed}"

    def determinism(self) -> None:
        """The same call gives the same bits."""
        for cell in CELLS:
            call = _Call(cell, SMALL[2] if self.quick else Shape(40, 32, 64, 256))
            for dtype in (torch.float32, torch.bfloat16):
                with self.check("determinism", f"{cell} {_name(dtype)}"):
                    first = call.results(self.device, dtype)
                    for _ in range(3):
                        again = call.results(self.device, dtype)
                        assert _same_bits(first, again), "two runs differ"

    def modules(self) -> None:
        """Layers in place of torch.nn's, on the same device, autocast and gradcheck included."""
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
        """Mistakes end in an exception, and never in a result on another device."""
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
        """Training goes on without more memory."""
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
            # The CPU's figure is of the whole process.
            assert grown <= (0 if self.device.type == "cuda" else 16 << 20), check.detail

    def streams(self) -> None:
        """Work goes to the current stream."""
        call = _Call("lstm", SMALL[2])
        for regime in ("resident", "per_step"):
            name = f"a side stream, {regime}"
            with self.check("streams", name), _environment(REGIME, regime):
                expected = call.results(self.device, torch.float32)
                stream = torch.cuda.Stream(self.device)
                stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):
                    # What was enqueued before on this stream must have run first.
                    torch.cuda._sleep(10_000_000)
                    actual = call.results(self.device, torch.float32)
                self.synchronize()
                assert _same_bits(expected, actual), "the side stream gives other numbers"

    def graphs(self) -> None:
        """A CUDA graph of a call gives what the call gives, on new inputs too."""
        for cell in ("lstm", "gru_reset_before"):
            for regime in ("resident", "per_step"):
                for shape in (SMALL[0], SMALL[2]):
                    name = f"{cell} {shape} {regime}"
                    with self.check("graphs", name), _environment(REGIME, regime):
                        self._capture(cell, shape)

    def _capture(self, cell: str, shape: Shape) -> None:
        call = _Call(cell, shape)
        leaves = call.leaves(self.device, torch.float32)

        def run() -> list[Tensor]:
            outputs = call.outputs(leaves)
            loss = torch.stack([o.square().sum() for o in outputs]).sum()
            return [*outputs, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            run()  # kernels are loaded before a capture, not in it
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(2):
            with torch.no_grad():
                for t in leaves:
                    if t is not None:
                        t.copy_(torch.randn_like(t))
            expected = [t.detach().clone() for t in run()]
            graph.replay()
            self.synchronize()
            assert _same_bits(expected, [t.detach() for t in captured]), "the replay differs"

    def benchmark(self) -> None:
        """Medians beside torch.nn's."""
        cuda = self.device.type == "cuda"
        shapes = BENCHMARK[:1] if self.quick else BENCHMARK if cuda else BENCHMARK[:2]
        dtypes = [torch.float32, *([torch.float16, torch.bfloat16] if cuda else [])]
        for ours_type, theirs_type in ((FusedLSTM, nn.LSTM), (FusedGRU, nn.GRU)):
            for T, N, I, H in shapes:
                for dtype in dtypes:
                    ours, theirs = _pair(ours_type, theirs_type, self.device, I, H)
                    x = torch.randn(T, N, I, device=self.device).to(dtype)
                    for kind in ("forward", "training"):
                        median, spread = self._time(ours.to(dtype), x, kind)
                        theirs_median, _ = self._time(theirs.to(dtype), x, kind)
                        shape = f"{T},{N},{I},{H}"
                        row = (ours_type.__name__, _name(dtype), shape, kind)
                        self.timings.append(Timing(*row, median, theirs_median, spread))

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

    # --- Report ---------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "fusedrnn": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cuda_library": dataclasses.asdict(CUDA) | {"path": str(CUDA.path)},
            "python": platform.python_version(),
            "machine": platform.platform(),
            "device": self._device_name(),
            "quick": self.quick,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "timings": [dataclasses.asdict(timing) for timing in self.timings],
        }

    def as_markdown(self) -> str:
        """A summary for people."""
        lines = [
            f"# fusedrnn selftest: {self._device_name()}",
            "",
            f"{len(self.checks)} checks, {len(self.failed)} failed. {time.strftime('%Y-%m-%d')}, "
            f"{platform.platform()}",
            "",
            "```",
            config(),
            "```",
            "",
            "| section | passed | failed | not run |",
            "| :-- | --: | --: | --: |",
        ]
        for section in dict.fromkeys(check.section for check in self.checks):
            results = [check.result for check in self.checks if check.section == section]
            counts = [str(results.count(result)) for result in ("passed", "failed", "not run")]
            lines.append(f"| {section} | {' | '.join(counts)} |")
        for result in ("failed", "not run"):
            found = [check for check in self.checks if check.result == result]
            reasons = dict.fromkeys(check.detail for check in found)
            if not found:
                continue
            lines += ["", f"## {result.capitalize()}", ""]
            for reason in reasons:
                names = [f"{c.section}: {c.name}" for c in found if c.detail == reason]
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"- {'; '.join(names[:5])}{more}: {reason}")
        if self.timings:
            theirs = "torch.nn (cuDNN)" if self.device.type == "cuda" else "torch.nn"
            lines += [
                "",
                "## Medians in microseconds",
                "",
                f"| layer | dtype | T,N,I,H | | fusedrnn | {theirs} | ratio | spread |",
                "| :-- | :-- | :-- | :-- | --: | --: | --: | --: |",
            ]
            lines += [
                f"| {t.layer} | {t.dtype} | {t.shape} | {t.kind} | {t.ours:.0f} | {t.theirs:.0f} | "
                f"{t.theirs / t.ours:.2f} | {t.spread:.2f} |"
                for t in self.timings
            ]
        return "\n".join(lines) + "\n"

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            return f"{torch.cuda.get_device_name(self.device)} (sm_{major}{minor})"
        return f"CPU, {torch.get_num_threads()} threads"


class _Call:
    """Arguments of `ops.layer` for a cell and a shape, and what they should give."""

    def __init__(self, cell: str, shape: Shape) -> None:
        self.cell, self.shape = cell, shape
        spec = CELLS[cell]
        T, N, I, H, D = shape.T, shape.N, shape.I, shape.H, shape.D
        P = max(1, H // 2) if spec.projects else H
        rows = spec.gates * H
        generator = torch.Generator().manual_seed(T * 1000 + H)

        def randn(*sizes: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*sizes, dtype=torch.float64, generator=generator)

        S = (sum(shape.lengths), I) if shape.packed else (T, N, I)
        self.inputs: list[Tensor | None] = [
            randn(*S),
            randn(D, N, P),
            randn(D, N, H) if spec.has_c else None,
        ]
        for _ in range(D):
            self.inputs += [randn(rows, I, scale=I**-0.5), randn(rows, P, scale=H**-0.5)]
            self.inputs += [randn(rows), randn(rows)]
            self.inputs += [randn(P, H, scale=H**-0.5)] if spec.projects else []
        sizes = [sum(length > t for length in shape.lengths) for t in range(T)]
        self.options: dict[str, Any] = {
            "cell": cell,
            "bidirectional": D == 2,
            "batch_sizes": torch.tensor(sizes) if shape.packed else None,
            "lengths": torch.tensor(shape.lengths) if shape.lengths and not shape.packed else None,
        }

    def leaves(self, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
        """The inputs there, as leaves that require grad."""
        return [
            None if t is None else t.clone().to(device, dtype).requires_grad_() for t in self.inputs
        ]

    def outputs(self, leaves: Sequence[Tensor | None], layer: Any = ops.layer) -> list[Tensor]:
        """What a layer makes of them."""
        x, h0, c0, *weights = leaves
        return [t for t in layer(x, h0, c0, weights, **self.options) if t is not None]

    def _with_gradients(self, leaves: list[Tensor | None], layer: Any) -> dict[str, Tensor]:
        outputs = self.outputs(leaves, layer)
        generator = torch.Generator().manual_seed(1)
        grads = [
            torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o) for o in outputs
        ]
        torch.autograd.backward(outputs, grads)
        results = {f"output {k}": o.detach() for k, o in enumerate(outputs)}
        return results | {
            f"gradient {k}": t.grad
            for k, t in enumerate(leaves)
            if t is not None and t.grad is not None
        }

    def results(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and gradients."""
        return list(self._with_gradients(self.leaves(device, dtype), ops.layer).values())

    def error(self, device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
        """The largest error in eps of the dtype, and in which tensor."""
        leaves = self.leaves(device, dtype)
        # The reference starts from the same rounded numbers.
        exact = [None if t is None else t.detach().cpu().double().requires_grad_() for t in leaves]
        expected = self._with_gradients(exact, _reference.layer)
        actual = self._with_gradients(leaves, ops.layer)
        assert actual.keys() == expected.keys(), "other gradients than the reference has"
        errors = {}
        for name, wanted in expected.items():
            got = actual[name].cpu().double()
            assert got.isfinite().all(), f"{name} is not finite"
            scale = max(float(wanted.abs().max()), 1.0) if wanted.numel() else 1.0
            difference = float((got - wanted).abs().max()) if wanted.numel() else 0.0
            errors[name] = difference / scale / torch.finfo(dtype).eps
        where = max(errors, key=errors.__getitem__)
        return errors[where], where


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _raises(kind: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def _pair(ours: Any, theirs: Any, device: torch.device, *sizes: int, **options: Any) -> Any:
    """Our layer and torch.nn's with the same weights."""
    torch.manual_seed(0)
    left, right = (kind(*sizes, **options, device=device) for kind in (ours, theirs))
    left.load_state_dict(copy.deepcopy(right.state_dict()))
    return left, right


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable of the environment where the value is one for it."""
    before = os.environ.get(name)
    if value in ("resident", "per_step"):
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line: 0 if all passed, 1 if something failed, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.selftest", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N; default: cuda")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="small shapes alone")
    parser.add_argument("--no-benchmark", action="store_true")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type == "cuda":
        problem = ""
        if torch.version.cuda is None:
            problem = f"torch {torch.__version__} computes on the CPU only; install one with CUDA"
        elif not torch.cuda.is_available():
            problem = "torch finds no GPU: see whether `nvidia-smi` does"
        elif (device.index or 0) >= torch.cuda.device_count():
            problem = f"there are {torch.cuda.device_count()} GPUs, {device} is none of them"
        else:
            device = torch.device("cuda", device.index or 0)
            problem = cuda_problem(device.index)
        if problem:
            print(f"fusedrnn.selftest: cannot run on {device}: {problem}", file=sys.stderr)
            return 2
    test = Selftest(device, options.quick)
    if not options.out.is_dir():
        parser.error(f"--out must be a folder, got {str(options.out)!r}")
    test.run(not options.no_benchmark)
    name = f"fusedrnn-selftest-{device.type}"
    (options.out / f"{name}.json").write_text(json.dumps(test.as_json(), indent=1) + "\n")
    (options.out / f"{name}.md").write_text(test.as_markdown())
    print(
        f"{len(test.checks)} checks, {len(test.failed)} failed; {options.out / name}.md and .json"
    )
    return int(bool(test.failed))


if __name__ == "__main__":
    sys.exit(main())

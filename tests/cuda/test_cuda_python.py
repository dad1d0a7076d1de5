"""CUDA in the Python package: which GPUs the library fits, messages, shapes of fake tensors."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn
import setup_build
from fusedrnn import _checks, _library, _ops, _raw_ops, functional
from fusedrnn._errors import MEMORY_TAG, REGIME_TAG, refuses_regime
from fusedrnn._library import CudaLibrary
from fusedrnn._options import Batch, Options, StepOptions
from tests.kit.arguments import CELLS_AND_FORMS, make_arguments
from tests.kit.bindings import ptx
from tests.kit.torch_device import TorchDevice, using

HERE = _library.LIBRARY.path
RELEASE = CudaLibrary(HERE, "", (75, 80, 90, 100, 120), 120, "13.0")
CI = CudaLibrary(HERE, "", (80, 90), None, "13.0")


@pytest.mark.parametrize(
    ("library", "runs", "does_not"),
    [
        (RELEASE, (75, 80, 86, 89, 90, 100, 103, 120, 121, 130), (70, 72, 87, 101)),
        (CI, (80, 86, 89, 90), (75, 100, 120)),
        (CudaLibrary(HERE, "", (86,), None, ""), (86, 89), (75, 80, 87, 90)),
        (CudaLibrary(HERE, "", (87,), None, ""), (87,), (86, 89)),
        (CudaLibrary(HERE, "", (75,), 80, ""), (75, 80, 87, 101, 110), (72,)),
    ],
)
def test_which_gpus_a_library_fits(
    library: CudaLibrary, runs: tuple[int, ...], does_not: tuple[int, ...]
) -> None:
    assert [c for c in (*runs, *does_not) if library.runs_on(c)] == list(runs)


def use(
    monkeypatch: pytest.MonkeyPatch, library: CudaLibrary, capability: tuple[int, int] | None = None
) -> None:
    """Pretends that this library is loaded, and that there is a GPU of this capability or none.

    Fake tensors must be made before: torch 2.11 starts CUDA for them if there seems to be a GPU.
    """
    monkeypatch.setattr(_library, "CUDA", library)
    monkeypatch.setattr(_checks, "CUDA", library)
    monkeypatch.setattr(_checks, "_GPUS_THAT_FIT", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")


def on_gpu(shape: tuple[int, ...]) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, device="cuda:0")


@pytest.mark.parametrize(
    ("library", "capability", "message"),
    [
        (CI, (7, 5), r"Old GPU \(sm_75\), and .* compiled for sm_80, sm_90: .*CUDA_ARCH=75"),
        (CI, (7, 0), r"Old GPU \(sm_70\); fusedrnn needs sm_75 or later"),
        (CudaLibrary(None, "_cuda.so is not in x"), (8, 0), "is not loaded: _cuda.so is not in x"),
        (CudaLibrary(None, "_cuda.so is not in x"), None, "is not loaded: _cuda.so is not in x"),
    ],
)
def test_a_gpu_that_the_library_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    library: CudaLibrary,
    capability: tuple[int, int] | None,
    message: str,
) -> None:
    x = on_gpu((2, 3, 4))
    use(monkeypatch, library, capability)
    with pytest.raises(NotImplementedError, match=f"input is on cuda:0, but .*{message}"):
        _checks.check_kernels(x)


def test_a_gpu_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = on_gpu((2, 3, 4))
    use(monkeypatch, CI, (8, 6))
    _checks.check_kernels(x)
    assert {0} == _checks._GPUS_THAT_FIT


def test_devices_are_not_mixed() -> None:
    layer = fusedrnn.FusedGRU(4, 5)
    with pytest.raises(RuntimeError, match="input tensor at cuda:0 and parameter tensor weight_ih"):
        layer(on_gpu((2, 3, 4)))
    weights = [on_gpu(tuple(p.shape)) for p in layer.parameters()]
    with pytest.raises(RuntimeError, match="at cpu and parameter tensor weight_ih_l0 at cuda:0"):
        functional.gru(torch.empty(2, 3, 4), None, weights)


@pytest.mark.parametrize("kind", [fusedrnn.FusedLSTM, fusedrnn.FusedGRU])
def test_modules_on_fake_gpu_tensors(
    monkeypatch: pytest.MonkeyPatch, kind: type[torch.nn.Module]
) -> None:
    """Shapes, dtypes and devices are right, and no GPU is needed."""
    use(monkeypatch, CI)
    layer = kind(4, 5, num_layers=2, bidirectional=True)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(3, 2, 4, device="cuda")
        weights = {k: torch.empty(p.shape, device="cuda") for k, p in layer.named_parameters()}

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(layer, weights, (x,))[0]

        y = run(x)
        assert y.shape == (3, 2, 10) and y.dtype == torch.float32 and y.device.type == "cuda"
        # torch.autocast turns itself off if there is no GPU.
        torch.set_autocast_enabled("cuda", True)
        try:
            assert run(x).dtype == torch.get_autocast_dtype("cuda") == torch.float16
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


@pytest.mark.parametrize(("cell", "form"), CELLS_AND_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.skipif(setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled")
def test_fake_reserve_is_as_large_as_the_real_one(cell: str, form: str, dtype: torch.dtype) -> None:
    call = make_arguments(cell, form, T=3, N=3, H=5, dtype=dtype, requires_grad=False)
    x, h0, c0, weights, batch_sizes, lengths, *options = call.op_arguments()
    with using(TorchDevice(ptx(80))) as gpu:
        real = gpu["forward"](x, h0, c0, weights, batch_sizes, lengths, *options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(t: Any) -> Any:
            return None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")

        fakes = torch.ops.fusedrnn.forward(
            *(fake(x), fake(h0), fake(c0), [fake(w) for w in weights]),
            *(None if t is None else mode.from_tensor(t) for t in (batch_sizes, lengths)),
            *options,
        )
    for got, wanted in zip(fakes, real, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert got.device.type == "cuda"


def full(*_: Any) -> Any:
    raise RuntimeError(f"fusedrnn: CUDA out of memory. Tried to allocate 2.00 GiB{MEMORY_TAG}")


def test_lack_of_memory_raises_the_exception_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cell = fusedrnn.FusedRNN(3, 4), fusedrnn.FusedGRUCell(3, 4)
    weights, frozen = list(cell.parameters()), [p.detach() for p in cell.parameters()]
    x = torch.randn(2, 2, 3)
    y, h = layer(x)[0], cell(x[0])
    again = layer(x)[0].sum()
    for name in ("_forward_now", "_backward_now", "_backward", "_step_now", "_step_backward_now"):
        monkeypatch.setattr(_raw_ops, name, full)
    # Under torch.func.grad the op itself is called.
    monkeypatch.setattr(_raw_ops, "_forward", full)
    for call in (
        lambda: layer(x),
        lambda: layer.eval()(x.detach()),
        lambda: y.sum().backward(),
        lambda: torch.autograd.grad(again, layer.weight_ih_l0, create_graph=True),
        lambda: torch.func.grad(lambda x: layer(x)[0].sum())(x),
        lambda: _ops.step(x[0], None, None, weights, StepOptions(3, 4, "gru")),
        lambda: _ops.step(x[0], None, None, frozen, StepOptions(3, 4, "gru")),
        lambda: cell(x[0]),
        lambda: h.sum().backward(),
    ):
        with pytest.raises(torch.OutOfMemoryError, match=r"2.00 GiB. A smaller batch"):
            call()


def test_lack_of_memory_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled graph raises the op's own error, since none of our Python runs around the op."""
    compiled = torch.compile(fusedrnn.FusedRNN(3, 4), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 3)
    compiled(x)
    library = torch.library.Library("fusedrnn", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl("forward", full, "CPU", allow_override=True)
    try:
        with pytest.raises(RuntimeError, match="fusedrnn: CUDA out of memory"):
            compiled(x)
    finally:
        library._destroy()


def test_a_regime_that_cannot_run_is_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"fusedrnn: the resident regime cannot run{REGIME_TAG}")

    layer = fusedrnn.FusedRNN(3, 4)
    y, _ = layer(torch.randn(2, 2, 3))
    monkeypatch.setattr(_raw_ops, "_forward_now", refuse)
    monkeypatch.setattr(_raw_ops, "_backward_now", refuse)
    for call in (lambda: layer(torch.randn(2, 2, 3)), lambda: y.sum().backward()):
        with pytest.raises(RuntimeError, match=r"^fusedrnn: the resident regime cannot run$") as e:
            call()
        assert refuses_regime(e.value)


def test_tags_are_those_of_the_ops() -> None:
    header = setup_build.CSRC / "torch" / "error_tags.h"
    tags = dict(re.findall(r'constexpr const char\* (\w+) = "(.*)";', header.read_text()))
    assert tags == {"kRegimeTag": REGIME_TAG, "kMemoryTag": MEMORY_TAG}


@pytest.mark.parametrize(
    ("cuda", "hip", "message"),
    [
        ("13.0", None, ""),
        (None, None, "torch .* is built without CUDA; install a build that has it"),
        (None, "7.1", "torch .* is built for ROCm, and fusedrnn knows NVIDIA's GPUs alone"),
    ],
)
def test_builds_of_torch_without_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, hip: str | None, message: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert re.fullmatch(message, _library.torch_lacks_cuda())
    if message:
        assert _library._load_cuda() == CudaLibrary(None, _library.torch_lacks_cuda())
        assert _library._cuda_devices() == "none: this torch has no CUDA"


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="x must be"):
        _ops.layer(torch.randn(2), None, None, [], Batch(None, None, 1), Options("lstm"))


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({}, False),
        ({"precision": "high"}, True),
        ({"precision": "medium"}, True),
        ({"allow_tf32": True}, True),
        ({"allow_tf32": False}, False),
        ({"fp32_precision": "tf32"}, True),
        ({"fp32_precision": "ieee"}, False),
    ],
)
def test_tf32_by_each_setting_of_torch(change: dict[str, Any], allowed: bool) -> None:
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        if "precision" in change:
            torch.set_float32_matmul_precision(change["precision"])
        if "allow_tf32" in change:
            matmul.allow_tf32 = change["allow_tf32"]
        if "fp32_precision" in change:
            matmul.fp32_precision = change["fp32_precision"]
        assert torch.ops.fusedrnn._allow_tf32() == allowed
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)


def test_facts_of_the_driver_need_the_library_and_a_gpu() -> None:
    """With a GPU there are the keys of the plan, and a line for each kernel."""
    ops = torch.ops.fusedrnn
    if _library.CUDA.path is None:
        for call in (
            lambda: ops._device_facts(0),
            lambda: ops._occupancy("step_forward_f32", 0, 0),
        ):
            with pytest.raises(NotImplementedError, match="for schema fusedrnn::_"):
                call()
    elif not torch.cuda.is_available():
        for call in (
            lambda: ops._device_facts(0),
            lambda: ops._occupancy("step_forward_f32", 0, 0),
        ):
            with pytest.raises(RuntimeError, match="fusedrnn: there is no GPU: cudaError"):
                call()
    else:
        lines = [line.split() for line in ops._device_facts(0).splitlines()]
        believed = {line.split()[0] for line in ops._plan_device("sm_90").splitlines()}
        assert believed <= {words[0] for words in lines}
        kernels = [words[1] for words in lines if words[0] == "kernel"]
        assert "resident_forward_fma_f32" in kernels and "store_bf16" in kernels
        assert all(ops._occupancy(name, 0, 0) > 0 for name in kernels)


def test_config_describes_cuda() -> None:
    config = _library.config()
    assert "CUDA library" in config and "CUDA devices" in config

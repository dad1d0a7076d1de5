"""The CUDA ops without a GPU: the real bindings, on CPU tensors, with kernels in the interpreter.

They are compared with the CPU's ops. Launches of the CUDA runtime and cuBLAS need a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedrnn
import setup_build
from fusedrnn._library import CELLS
from tests.kit.arguments import FORMS, make_arguments, other_memory
from tests.kit.bindings import CSRC, binding, ptx
from tests.kit.build import compile_kernel, kernels_of
from tests.kit.device import Limits
from tests.kit.torch_device import TorchDevice, using

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
# Limits of errors, relative to the largest value of a tensor.
TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.float16: 6e-3,
    torch.bfloat16: 5e-2,
}


def flat(values: Any) -> list[Tensor]:
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]


def assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for k, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype, k
        if got.numel():
            error = (got.double() - wanted.double()).abs().max()
            assert error <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max())), (k, error)


def both_ways(forward: Any, backward: Any, call: Any, grads: list[Tensor]) -> tuple[Any, Any]:
    """The outputs but for the reserve, and all gradients."""
    x, h0, c0, weights, batch_sizes, lengths, *options, keep = call.op_arguments()
    y, h_n, c_n, reserve = forward(x, h0, c0, weights, batch_sizes, lengths, *options, keep)
    if not grads:
        grads += [torch.randn(t.shape, dtype=t.dtype) for t in (y, h_n, c_n)]
    d_y, d_h, d_c = grads
    *gradients, d_weights = backward(
        *(d_y, d_h, d_c if CELLS[call.options.cell].has_c else None),
        *(x, h0, c0, weights, reserve, batch_sizes, lengths, *options, True, True, True),
    )
    # The CPU engine returns gradients of weights in the dtype of their sums.
    return (y, h_n, c_n), (*gradients, [d.to(x.dtype) for d in d_weights])


def assert_same_as_cpu(gpu: dict[str, Any], call: Any, dtype: torch.dtype) -> None:
    grads: list[Tensor] = []
    cpu_ops = torch.ops.fusedrnn
    expected = both_ways(cpu_ops.forward, cpu_ops.backward, call, grads)
    actual = both_ways(gpu["forward"], gpu["backward"], call, grads)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_and_form(gpu: dict[str, Any], cell: str, form: str) -> None:
    call = make_arguments(cell, form, dtype=torch.float32, requires_grad=False)
    assert_same_as_cpu(gpu, call, torch.float32)


@pytest.mark.parametrize("form", ["packed", "lengths"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(gpu: dict[str, Any], dtype: torch.dtype, form: str) -> None:
    call = make_arguments("lstm", form, dtype=dtype, requires_grad=False)
    assert_same_as_cpu(gpu, call, dtype)
    call = make_arguments(
        "gru", form, D=1, bias=False, states=False, dtype=dtype, requires_grad=False
    )
    assert_same_as_cpu(gpu, call, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_c(gpu: dict[str, Any], dtype: torch.dtype, form: str) -> None:
    call = make_arguments("lstm", form, dtype=dtype, requires_grad=False)
    assert call.c0 is not None
    call.c0 = call.c0.float() + 1e-6  # 16 bits cannot hold this sum
    assert_same_as_cpu(gpu, call, dtype)
    assert gpu["forward"](*call.op_arguments())[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_with_a_float32_c(gpu: dict[str, Any], dtype: torch.dtype) -> None:
    x, h = torch.randn(3, 4).to(dtype), torch.randn(3, 6).to(dtype)
    c = torch.randn(3, 6)
    weights = [(torch.randn(*size) / 3).to(dtype) for size in ((24, 4), (24, 6), (24,), (24,))]
    grads = torch.randn(3, 6).to(dtype), torch.randn(3, 6)
    results = []
    for step, backward in (
        (torch.ops.fusedrnn._step, torch.ops.fusedrnn._step_backward),
        (gpu["_step"], gpu["_step_backward"]),
    ):
        h_n, c_n, reserve = step(x, h, c, weights, 4, 6, "lstm", True)
        assert (h_n.dtype, c_n.dtype) == (dtype, torch.float32)
        *d_x_h_c, d_weights = backward(*grads, x, weights, reserve, 4, 6, "lstm", True, True, True)
        results.append([h_n, c_n, *d_x_h_c, *(d.to(dtype) for d in d_weights)])
    assert results[1][4].dtype == torch.float32  # the gradient of c
    assert_close(results[1], results[0], dtype)


@pytest.mark.parametrize("regime", ["per_step", "resident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regimes(
    gpu: dict[str, Any],
    device: TorchDevice,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    regime: str,
) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", regime)
    assert_same_as_cpu(gpu, make_arguments("lstm", N=9, dtype=dtype, requires_grad=False), dtype)
    resident = [name for name in device.launches if name.startswith("resident")]
    assert bool(resident) == (regime == "resident")


@pytest.mark.parametrize(("precision", "kernel"), [("highest", "fma_f32"), ("high", "mma_tf32")])
def test_tf32_follows_the_setting_of_torch(
    gpu: dict[str, Any], device: TorchDevice, precision: str, kernel: str
) -> None:
    """The op reads the setting when it runs, so it holds in a compiled graph too."""
    call = make_arguments("lstm", N=9, dtype=torch.float32, requires_grad=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        gpu["forward"](*call.op_arguments())
    finally:
        torch.set_float32_matmul_precision(before)
    assert f"resident_forward_{kernel}" in device.launches


@pytest.mark.parametrize("form", FORMS)
def test_strided_arguments(gpu: dict[str, Any], form: str) -> None:
    call = make_arguments("lstm", form, dtype=torch.float32, requires_grad=False)

    def strided(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.stack([t, t], -1)[..., 1]

    call.x, call.h0, call.c0 = strided(call.x), strided(call.h0), strided(call.c0)
    call.weights = [strided(w) for w in call.weights]
    assert_same_as_cpu(gpu, call, torch.float32)


@pytest.mark.parametrize(("T", "N", "form"), [(1, 1, "plain"), (3, 0, "plain"), (3, 0, "lengths")])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_small_and_empty(gpu: dict[str, Any], cell: str, T: int, N: int, form: str) -> None:
    call = make_arguments(cell, form, T=T, N=N, dtype=torch.float32, requires_grad=False)
    assert_same_as_cpu(gpu, call, torch.float32)


def test_lengths_of_zero(gpu: dict[str, Any]) -> None:
    call = make_arguments("lstm", "lengths", dtype=torch.float32, requires_grad=False)
    for lengths in ([0, 5, 2], [0, 0, 0], [1, 0, 1]):
        call.batch = call.batch._replace(lengths=torch.tensor(lengths))
        assert_same_as_cpu(gpu, call, torch.float32)


def test_padding_is_never_read(gpu: dict[str, Any]) -> None:
    call = make_arguments("gru", "lengths", dtype=torch.float32, requires_grad=False)
    for n, length in enumerate(call.batch.lengths.tolist()):
        call.x[length:, n] = float("nan")
    y, h_n, *_ = gpu["forward"](*call.op_arguments())
    assert y.isfinite().all() and h_n.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"])
def test_step(gpu: dict[str, Any], cell: str, dtype: torch.dtype) -> None:
    N, I, H = 3, 4, 6
    G = CELLS[cell].gates
    x, h, d_h, d_c = (torch.randn(N, size).to(dtype) for size in (I, H, H, H))
    c = torch.randn(N, H).to(dtype) if CELLS[cell].has_c else None
    weights = [torch.randn(size).to(dtype) for size in ((G * H, I), (G * H, H), (G * H,), (G * H,))]
    results = []
    for forward, backward in (
        (torch.ops.fusedrnn._step, torch.ops.fusedrnn._step_backward),
        (gpu["_step"], gpu["_step_backward"]),
    ):
        *states, reserve = forward(x, h, c, weights, I, H, cell, True)
        *gradients, d_weights = backward(
            *(d_h, None if c is None else d_c, x, weights, reserve, I, H, cell, True, True, True)
        )
        # The CPU engine returns gradients of weights in the dtype in which it sums them.
        rounded = (d.to(dtype) for d in d_weights)
        results.append([*states, *(g for g in gradients if g is not None), *rounded])
    assert_close(results[1], results[0], dtype)


@pytest.fixture
def limit_products() -> Iterator[Any]:
    """A function that limits the scratch memory of a product for the rest of the test."""
    yield binding().limit_products
    binding().limit_products(binding().PRODUCT_BYTES)


def steps_both_ways(gpu: dict[str, Any], cell: str, dtype: torch.dtype) -> None:
    """A step of a cell, forward and backward."""
    N, I, H = 3, 4, 6
    spec = CELLS[cell]
    shapes = [p.shape(G=spec.gates, H=H, I=I, P=H) for p in spec.parameters_with(True)]
    x, h, c = (torch.randn(N, size).to(dtype) for size in (I, H, H))
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    only_c = c if spec.has_c else None
    *_, reserve = gpu["_step"](x, h, only_c, weights, I, H, cell, True)
    gpu["_step_backward"](h, only_c, x, weights, reserve, I, H, cell, True, True, True)


@pytest.mark.parametrize("regime", ["per_step", "resident"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_torch_have_float32_results(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, regime: str
) -> None:
    """With a result in 16 bits torch may add the parts of a long sum in 16 bits."""
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", regime)
    binding().calls()
    for cell, spec in CELLS.items():
        if spec.projects and regime == "resident":
            continue
        for form in FORMS:
            call = make_arguments(cell, form, dtype=dtype, D=2, requires_grad=False)
            both_ways(gpu["forward"], gpu["backward"], call, [])
        if not spec.projects:
            steps_both_ways(gpu, cell, dtype)
    factors = str(dtype).removeprefix("torch.")
    assert {(a, out) for _, a, out in binding().products()} == {(factors, "float32")}
    # Nothing of the bindings calls an op of torch by its name, so these are all products.
    calls = binding().calls()
    assert calls.keys() == {"allocate", "copy", "from_blob", "product"}
    assert calls["product"] == len(binding().products()) > 0


def test_torch_declares_its_c_functions_for_products_as_we_do() -> None:
    """The bindings look the functions up when they run, so no compiler compares the types."""
    folder = setup_build.torch_dir() / "include/torch/csrc/inductor/aoti_torch/generated"
    ours = (CSRC / "torch_cuda" / "torch_launcher.h").read_text()
    for name in ("mm_out", "mm_dtype_out", "addmm_out"):
        (theirs,) = re.findall(
            rf"AOTITorchError aoti_torch_cuda_{name}\(([^)]*)\)",
            (folder / "c_shim_cuda.h").read_text(),
        )
        (here,) = re.findall(rf"AOTITorchError \(\*{name}\)\(([^)]*)\)", ours)
        types = [[part.split()[0] for part in text.split(",")] for text in (here, theirs)]
        assert types[0] == types[1] and here.split()[1] == "out,", name


@pytest.mark.usefixtures("by_name")  # torch's own addmm would take no slices
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_slices(
    gpu: dict[str, Any], device: TorchDevice, limit_products: Any, dtype: torch.dtype
) -> None:
    """Products in slices of an odd number of rows, or of one row, have the same values."""
    call = make_arguments("lstm", T=7, N=5, I=3, H=6, D=2, dtype=dtype, requires_grad=False)
    grads: list[Tensor] = []
    whole = both_ways(gpu["forward"], gpu["backward"], call, grads)[1]
    stores = device.launches.count(f"store_{SHORT[dtype]}")
    for rows in (11, 1):
        limit_products(rows * 3 * max(4, dtype.itemsize))  # d_x has 35 rows of 3 values
        parts = both_ways(gpu["forward"], gpu["backward"], call, grads)[1]
        assert_close(parts, whole, dtype)
        assert device.launches.count(f"store_{SHORT[dtype]}") > 2 * stores
    # The slices have 9, 9, 9 and 8 rows. In 16 bits both directions are cut. Otherwise torch writes
    # the product of the first direction itself, and only the second is cut.
    rows_at_once = [rows for rows, *_ in binding().products()]
    assert rows_at_once.count(9) == 3 * (2 if dtype.itemsize == 2 else 1)


@pytest.mark.parametrize("seed", range(20))
def test_slices_cover_and_keep_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(500):
        M, N, limit = (int(2 ** rng.uniform(0, most)) for most in (30, 20, 27))
        size = int(rng.choice([4, 8]))
        rows = binding().slice_rows(M, N, size, limit)
        assert 1 <= rows <= M
        assert rows * N * size <= limit or rows == 1
        # With one slice fewer some slice would be too large.
        slices = -(-M // rows)
        if slices > 1:
            assert -(-M // (slices - 1)) * N * size > limit


def test_a_reserve_in_other_memory(gpu: dict[str, Any]) -> None:
    """Backward reads the values of the reserve from any memory."""
    call = make_arguments("lstm", dtype=torch.float32, requires_grad=False)
    x, h0, c0, weights, batch_sizes, lengths, *options, _ = call.op_arguments()
    y, _, _, reserve = gpu["forward"](*call.op_arguments())

    def backward(reserve: Tensor) -> list[Tensor]:
        arguments = (y, None, None, x, h0, c0, weights, reserve, batch_sizes, lengths, *options)
        return flat(gpu["backward"](*arguments, True, True, True))

    wanted = backward(reserve)
    for other in other_memory(reserve):
        pairs = zip(backward(other), wanted, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# With 3 sequences the plan chooses ordinary cores, with 9 tensor cores.
@pytest.mark.parametrize("N", [3, 9])
@pytest.mark.parametrize("regime", ["per_step", "resident"])
@pytest.mark.parametrize(
    ("dtype", "tf32"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]
)
def test_storage_offsets_change_no_bit(
    request: pytest.FixtureRequest,
    gpu: dict[str, Any],
    device: TorchDevice,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tf32: bool,
    regime: str,
    N: int,
) -> None:
    """The interpreter raises a fault for a load that is not aligned to its width."""
    if regime == "resident" and dtype == torch.float64:
        pytest.skip("float64 has no resident kernel")
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", regime)
    before = torch.get_float32_matmul_precision()
    request.addfinalizer(lambda: torch.set_float32_matmul_precision(before))
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    call = make_arguments("lstm", T=3, N=N, I=5, H=18, D=2, dtype=dtype, requires_grad=False)
    grads: list[Tensor] = []
    aligned = both_ways(gpu["forward"], gpu["backward"], call, grads)

    def moved(t: Tensor, by: int) -> Tensor:
        out = torch.empty(t.numel() + by, dtype=t.dtype)[by:].view(t.shape).copy_(t)
        assert out.storage_offset() == by
        return out

    for by in (1, 3):
        call.x, call.h0, call.c0 = moved(call.x, by), moved(call.h0, by), moved(call.c0, by)
        call.weights = [moved(w, by) for w in call.weights]
        there = both_ways(gpu["forward"], gpu["backward"], call, [moved(g, by) for g in grads])
        for got, wanted in zip(
            flat(there[0] + there[1]), flat(aligned[0] + aligned[1]), strict=True
        ):
            assert torch.equal(got, wanted)
    mma = regime == "resident" and N == 9 and (tf32 or dtype != torch.float32)
    assert any("_mma_" in name for name in device.launches) == mma


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_modules(cell: str) -> None:
    """Outputs and gradients of a bidirectional stack of layers equal those of torch.nn."""
    theirs = getattr(torch.nn, cell)(3, 5, num_layers=2, bidirectional=True)
    ours = getattr(fusedrnn, f"Fused{cell}")(3, 5, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(4, 2, 3, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    for layer, x in zip((theirs, ours), inputs, strict=True):
        layer(x)[0].square().sum().backward()
    assert_close([inputs[1].grad], [inputs[0].grad], torch.float32)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close([p.grad], [q.grad], torch.float32)


@pytest.mark.usefixtures("everywhere")
def test_gradcheck_and_cells() -> None:
    layer = fusedrnn.FusedGRU(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))
    cell = fusedrnn.FusedLSTMCell(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: cell(x[0])[0], (x,))


def test_order_of_threads_does_not_matter() -> None:
    call = make_arguments("lstm", "lengths", N=9, dtype=torch.float32, requires_grad=False)
    results = []
    for seed in (1, 2):
        with using(TorchDevice(ptx(80), seed)) as gpu:
            results.append(flat(both_ways(gpu["forward"], gpu["backward"], call, [])[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_device_too_small_runs_step_by_step() -> None:
    device = TorchDevice(ptx(80), limits=Limits(sms=1, shared_per_block=4096, shared_per_sm=8192))
    call = make_arguments("lstm", H=40, N=9, dtype=torch.float32, requires_grad=False)
    with using(device) as gpu:
        assert_same_as_cpu(gpu, call, torch.float32)
    assert "step_forward_f32" in device.launches


def test_table_of_kernels_is_complete() -> None:
    source = CSRC / "torch_cuda" / "copies.cu"
    listed = re.findall(r"FUSEDRNN_KERNEL\((\w+)\)", source.read_text())
    (text,) = (path.read_text() for path in ptx(80) if path.stem == "copies")
    assert sorted(listed) == sorted(re.findall(r"\.visible \.entry (\w+)\(", text))


@pytest.mark.parametrize("arch", [75, 120])
def test_kernels_of_the_bindings_compile(arch: int) -> None:
    """All of them compile for the oldest and the newest architecture, without spills."""
    source = CSRC / "torch_cuda" / "copies.cu"
    kernels = kernels_of(
        compile_kernel(source, Path("/dev/null"), f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v")
    )
    assert kernels.keys() == set(re.findall(r"FUSEDRNN_KERNEL\((\w+)\)", source.read_text()))
    for name, kernel in kernels.items():
        assert kernel.registers <= 64, (name, kernel)
        assert kernel.spills == kernel.stack == kernel.shared == 0, (name, kernel)


def test_output_of_ptxas_without_kernels_is_an_error() -> None:
    with pytest.raises(AssertionError, match="ptxas names no kernel"):
        kernels_of("")
    with pytest.raises(AssertionError, match="spill"):
        kernels_of(
            "Compiling entry function 'f' for 'sm_75'\n0 bytes stack frame\nUsed 8 registers"
        )


def test_lengths_and_offsets_may_need_several_launches() -> None:
    """There are more sequences than the arguments of one launch can hold."""
    device = TorchDevice(ptx(80))
    N = 500
    call = make_arguments(
        "rnn_tanh", "lengths", T=2, N=N, I=1, H=1, D=1, dtype=torch.float32, requires_grad=False
    )
    with using(device) as gpu:
        assert_same_as_cpu(gpu, call, torch.float32)
    assert device.launches.count("write_numbers") >= 4
    assert np.prod(call.x.shape) == 2 * N

"""What a call costs the host: allocations, memsets, launches, products, and other calls of torch.

The numbers are exact, so a change that makes a call more expensive fails here. docs/cuda.md ("What
the host does") says what they mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import setup_build
from tests.kit.arguments import LayerArguments, make_arguments
from tests.kit.bindings import ROOT, binding, ptx
from tests.kit.torch_device import TorchDevice, using

pytestmark = pytest.mark.skipif(
    setup_build.nvcc() is None, reason="no nvcc: kernels cannot be compiled"
)

TF32 = "fusedrnn::_allow_tf32"


class CountingDevice(TorchDevice):
    """Counts memsets. The bindings count their calls of torch, and `launches` has the kernels."""

    def __init__(self) -> None:
        super().__init__(ptx(80))
        self.memsets = 0

    def zero(self, address: int, size: int) -> None:
        self.memsets += 1
        super().zero(address, size)

    def counts(self) -> Counter[str]:
        """What was done since the last call of this method."""
        found = Counter(binding().calls())
        found["memset"] = self.memsets
        found.update(self.launches)
        self.memsets = 0
        self.launches.clear()
        return +found


def counts_of(
    call: LayerArguments, keep: bool = True, states: bool = False
) -> tuple[Counter[str], Counter[str]]:
    """What forward and backward do. With `states`, final states have gradients too."""
    device = CountingDevice()
    x, h0, c0, weights, batch_sizes, lengths, *options, _ = call.op_arguments()
    with using(device) as gpu:
        binding().calls()
        batch = (batch_sizes, lengths, *options)
        y, h_n, c_n, reserve = gpu["forward"](x, h0, c0, weights, *batch, keep)
        forward = device.counts()
        if not keep:
            return forward, Counter()
        d_h, d_c = (h_n, c_n if c0 is not None else None) if states else (None, None)
        gpu["backward"](y, d_h, d_c, x, h0, c0, weights, reserve, *batch, True, True, True)
    return forward, device.counts()


def arguments(cell: str, dtype: torch.dtype, form: str = "plain", **sizes: int) -> LayerArguments:
    sizes = {"T": 3, "N": 9, "I": 5, "H": 16, "D": 1} | sizes
    return make_arguments(cell, form, dtype=dtype, requires_grad=False, **sizes)


@pytest.fixture
def regime(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", name)


# Each forward allocates y, h_n, c_n (empty where a cell has no c), the reserve, and the scratch
# memory of the engine: 5. Each backward allocates the gradients of x, h_0, c_0 and of 4 weights for
# each direction, and the scratch memory: 4 + 4 D. States are copied, because the engine updates
# them in place. The memset of the resident regime is for the exchange; others are for gradients of
# states that are absent.
def test_a_resident_forward(regime: Callable[[str], None]) -> None:
    regime("resident")
    forward, _ = counts_of(arguments("lstm", torch.float32))
    resident = {"resident_forward_fma_f32": 1}
    calls = {"allocate": 5, "copy": 2, "memset": 1, "product": 1, "from_blob": 3, TF32: 1}
    wanted = calls | resident
    assert forward == wanted
    assert counts_of(arguments("lstm", torch.float32), keep=False)[0] == wanted
    forward, _ = counts_of(arguments("gru", torch.float32, D=2))
    # A GRU has no c to copy, and both directions have the same x.
    assert forward == wanted | {"copy": 1, "product": 2, "from_blob": 5}


def test_a_resident_backward(regime: Callable[[str], None]) -> None:
    regime("resident")
    for D in (1, 2):
        _, backward = counts_of(arguments("lstm", torch.float32, D=D), states=True)
        kernels = {"resident_backward_fma_f32": 1, "sum_rows_f32": 1}
        # The products are for x, W and U. The second direction adds its part of the gradient of x.
        wanted = {"allocate": 4 + 4 * D, "memset": 1, "product": 3 * D, TF32: 1, **kernels}
        assert backward == wanted | {"copy": 2, "from_blob": (8, 14)[D - 1]}
    _, backward = counts_of(arguments("lstm", torch.float32))
    assert backward["memset"] == 3  # the gradients of both states are zero
    # A GRU's two biases have different gradients, but one launch sums both.
    _, backward = counts_of(arguments("gru", torch.float32, D=2), states=True)
    assert backward["sum_rows_f32"] == 1
    assert (backward["product"], backward["from_blob"]) == (6, 18)


def test_resident_in_16_bits(regime: Callable[[str], None]) -> None:
    """States in float32 are extra tensors. Products share float32 memory until a kernel rounds
    them.
    """
    regime("resident")
    forward, backward = counts_of(arguments("lstm", torch.bfloat16), states=True)
    resident = {"resident_forward_mma_bf16": 1}
    calls = {"allocate": 7, "copy": 4, "memset": 1, "product": 1, "from_blob": 3}
    assert forward == calls | resident
    kernels = {"resident_backward_mma_bf16": 1, "sum_rows_bf16": 1, "store_bf16": 3}
    calls = {"allocate": 11, "copy": 4, "memset": 1, "product": 3, "from_blob": 8}
    assert backward == calls | kernels


def test_a_padded_batch(regime: Callable[[str], None]) -> None:
    """The order of the sequences and the offsets of the steps travel in one launch."""
    regime("resident")
    forward, backward = counts_of(arguments("lstm", torch.float32, "lengths"), states=True)
    moved = {"write_numbers": 1, "pack_rows_b32": 3, "unpack_rows_b32": 3}
    wanted = {"allocate": 10, "memset": 2, "product": 1, "from_blob": 3, TF32: 1}
    assert forward == wanted | {"resident_forward_fma_f32": 1} | moved
    moved["pack_rows_b32"] = 4  # x, and the gradients of y, h_n and c_n
    wanted = {"allocate": 14, "memset": 1, "product": 3, "from_blob": 8, TF32: 1}
    assert backward == wanted | {"resident_backward_fma_f32": 1, "sum_rows_f32": 1} | moved


def test_packed_rows_bring_only_their_offsets(regime: Callable[[str], None]) -> None:
    regime("resident")
    forward, _ = counts_of(arguments("lstm", torch.float32, "packed"))
    assert forward["write_numbers"] == 1 and forward["allocate"] == 5


@pytest.mark.parametrize(
    ("cell", "dtype", "stages", "added"),
    [
        ("lstm", torch.float32, 1, 0),
        ("gru", torch.float32, 1, 0),
        ("gru_reset_before", torch.float64, 2, 0),
        ("lstm_proj", torch.float32, 2, 0),
        ("lstm", torch.bfloat16, 1, 0),
        # Torch adds no product of 16-bit factors to float32, so a kernel does.
        ("gru", torch.bfloat16, 1, 1),
    ],
)
def test_a_step(
    regime: Callable[[str], None], cell: str, dtype: torch.dtype, stages: int, added: int
) -> None:
    """A step takes a product and a kernel for each stage. Most matrices are those of the step
    before, and need no new tensor. The exceptions are the emit that forward keeps for backward, and
    the deltas of each stage.
    """
    regime("per_step")
    few, many = (
        counts_of(arguments(cell, dtype, T=T, H=8), states=True)  # fewer rows than sum_rows cuts
        for T in (3, 7)
    )
    short = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}[dtype]
    forward, backward = (Counter(b) - Counter(a) for a, b in zip(few, many, strict=True))
    steps = 4 * stages
    wanted = {"product": steps, f"step_forward_{short}": steps}
    assert forward == wanted | ({"from_blob": 4} if stages == 2 else {})
    plain = [counts_of(arguments(cell, dtype, T=T, H=8), keep=False)[0] for T in (3, 7)]
    assert plain[1] - plain[0] == wanted
    wanted = {"product": steps, f"step_backward_{short}": steps, "from_blob": steps}
    assert backward == wanted | ({"store_f32": 4} if added else {})
    assert few[0]["allocate"] == (5 if dtype != torch.bfloat16 else 6 + (cell == "lstm"))


# The host's time for each of these in µs, as docs/cuda.md assumes it.
PRICES = {"allocate": 1, "copy": 4, "memset": 2, "kernel": 2.5, "product": 6, "from_blob": 0.5}
PRICE_OF_TF32 = 1.6


def row_of_table(name: str, counts: Counter[str]) -> str:
    """The row of docs/cuda.md for these counts."""
    others = {"allocate", "copy", "memset", "product", "from_blob", TF32}
    kernels = sum(count for what, count in counts.items() if what not in others)
    row = {what: counts[what] for what in PRICES} | {"kernel": kernels}
    time = sum(PRICES[what] * row[what] for what in PRICES) + PRICE_OF_TF32 * counts[TF32]
    shown = f"{time:.0f}" if time > 10 else f"{time:g}"
    return " | ".join([f"| {name}", *map(str, row.values()), f"{shown} |"])


def test_the_table_of_the_documents(regime: Callable[[str], None]) -> None:
    text = (ROOT / "docs" / "cuda.md").read_text()
    regime("resident")
    for name, form, dtype in (
        ("{}, float32", "plain", torch.float32),
        ("{}, bfloat16", "plain", torch.bfloat16),
        ("{} with `lengths`, float32", "lengths", torch.float32),
    ):
        both = counts_of(arguments("lstm", dtype, form), states=True)
        for way, counts in zip(("forward", "backward"), both, strict=True):
            assert row_of_table(name.format(f"resident {way}"), counts) in text
    regime("per_step")
    few, many = (counts_of(arguments("lstm", torch.float32, T=T), states=True) for T in (3, 4))
    for way, before, after in zip(("forward", "backward"), few, many, strict=True):
        assert row_of_table(f"a step, per step, {way}", after - before) in text


def test_sums_of_many_rows_take_one_more_memset(regime: Callable[[str], None]) -> None:
    """Where sum_rows cuts the rows into ranges, it needs counters that are zero."""
    regime("per_step")
    few, many = (counts_of(arguments("lstm", torch.float32, T=T), states=True)[1] for T in (7, 8))
    assert few["memset"] == 0 and many["memset"] == 1
    regime("resident")
    _, backward = counts_of(arguments("lstm", torch.float32, T=8), states=True)
    assert backward["memset"] == 1  # the same memset as for the exchange


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize("regime_name", ["resident", "per_step"])
def test_without_the_c_functions_ops_are_called_by_name(
    regime: Callable[[str], None], regime_name: str
) -> None:
    regime(regime_name)
    for found in counts_of(arguments("gru", torch.float32, D=2)):
        assert found["aten::mm.out"] == found["product"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", ["gru", "lstm_proj"])
def test_both_ways_to_products_agree(cell: str, dtype: torch.dtype) -> None:
    """Adding a product to a matrix rounds once in either way."""
    call = arguments(cell, dtype, D=2, H=6)
    x, h0, c0, weights, batch_sizes, lengths, *options, keep = call.op_arguments()
    results: list[list[Tensor]] = []
    for use in (True, False):
        binding().use_c_functions(use)
        try:
            with using(TorchDevice(ptx(80))) as gpu:
                y, h_n, c_n, reserve = gpu["forward"](*call.op_arguments())
                batch = (batch_sizes, lengths, *options)
                *grads, d_weights = gpu["backward"](
                    *(y, h_n, c_n if c0 is not None else None, x, h0, c0, weights, reserve),
                    *(*batch, True, True, True),
                )
            results.append([y, h_n, c_n, *grads, *d_weights])
        finally:
            binding().use_c_functions(True)
    assert keep
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=64 * torch.finfo(dtype).eps)

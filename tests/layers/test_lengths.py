"""`lengths=` with padded input: the results, and that padding is never read."""

from __future__ import annotations

import array
import collections
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from fusedrnn import _reference
from tests.kit.arguments import make_arguments
from tests.kit.layers import (
    BY_NAME,
    CELLS,
    Cell,
    assert_close,
    assert_same,
    flat,
    make_states,
    map_tensors,
    on,
    pad,
    ragged,
    randn,
    run,
)

NAN = float("nan")
f64 = torch.float64


def as_padded(y: Any, T: int) -> Tensor:
    y, _ = pad_packed_sequence(y, total_length=T)
    return y


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_as_a_packed_sequence(
    device: torch.device, cell: Cell, num_layers: int, batch_first: bool
) -> None:
    T, lengths = 7, [3, 6, 1, 6, 2]
    for bidirectional in (False, True):
        ours, theirs = cell.make(
            4,
            5,
            device=device,
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            dtype=f64,
        )
        sequences = ragged(lengths, 4)
        packed = pack_sequence(sequences, enforce_sorted=False)
        padded = pad(sequences, T, NAN, batch_first)
        for hx in (None, make_states(theirs, 5, f64)):
            y, states = theirs(packed, hx)
            for given in (lengths, tuple(lengths), torch.tensor(lengths)):
                got = ours(on(device, padded), on(device, hx), lengths=given)
                expected = as_padded(y, T)
                expected = expected.transpose(0, 1) if batch_first else expected
                for a, b in zip(flat(got), [expected, *flat(states)], strict=True):
                    assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradients_and_padding(device: torch.device, cell: Cell) -> None:
    """The values in the padding change no bit of the results. Gradients are 0 there."""
    T, lengths = 7, [3, 0, 7, 1, 0, 2]
    ours, theirs = cell.make(4, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    sequences = ragged(lengths, 4)
    hx = make_states(theirs, 6, f64)
    beyond = torch.arange(T).unsqueeze(1) >= torch.tensor(lengths)
    runs = []
    for fill in (NAN, float("inf"), 0.0, 1.5):
        result = run(ours, pad(sequences, T, fill), hx, lengths=lengths)
        assert (result["y"][beyond] == 0).all()
        assert (result["d_x"][beyond] == 0).all()
        runs.append(result)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])

    # The reference runs each sequence alone, without padding, with the same weights of the loss.
    total = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    cotangents = [randn(*runs[0][k].shape, seed=1000 + i) for i, k in enumerate(outputs(cell))]
    for n, L in enumerate(lengths):
        row = map_tensors(lambda t, n=n: t[:, n : n + 1], hx)  # type: ignore[misc]
        states = [t.requires_grad_() for t in flat(map_tensors(Tensor.clone, row))]
        if L == 0:
            for name, t, cotangent in zip(("h_n", "c_n"), states, cotangents[1:], strict=False):
                assert torch.equal(runs[0][name][:, n : n + 1], t)
                assert torch.equal(runs[0]["d_" + name[0] + "0"][:, n], cotangent[:, n])
            continue
        x = sequences[n].unsqueeze(1).requires_grad_()
        results = flat(theirs(x, tuple(states) if cell.has_c else states[0]))
        weights = [cotangents[0][:L, n : n + 1], *(c[:, n : n + 1] for c in cotangents[1:])]
        gradients = torch.autograd.grad(results, [x, *states, *theirs.parameters()], weights)
        assert_close(runs[0]["y"][:L, n : n + 1], results[0])
        assert_close(runs[0]["d_x"][:L, n : n + 1], gradients[0])
        for name, got, gradient in zip(("h", "c"), results[1:], gradients[1:], strict=False):
            assert_close(runs[0][f"{name}_n"][:, n : n + 1], got)
            assert_close(runs[0][f"d_{name}0"][:, n : n + 1], gradient)
        for name, gradient in zip(total, gradients[1 + len(states) :], strict=True):
            total[name] += gradient
    for name, gradient in total.items():
        assert_close(runs[0]["d_" + name], gradient)


def outputs(cell: Cell) -> list[str]:
    return ["y", "h_n", "c_n"] if cell.has_c else ["y", "h_n"]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_full_lengths_are_no_lengths(device: torch.device, cell: Cell) -> None:
    ours, _ = cell.make(4, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x, hx = randn(6, 3, 4), make_states(ours, 3, f64)
    assert_same(run(ours, x, hx, lengths=[6, 6, 6]), run(ours, x, hx))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_all_lengths_are_zero(device: torch.device, cell: Cell) -> None:
    ours, theirs = cell.make(4, 5, device=device, num_layers=2, bidirectional=True, dtype=f64)
    x, hx = torch.full((3, 2, 4), NAN, dtype=f64), make_states(theirs, 2, f64)
    result = run(ours, x, hx, lengths=[0, 0])
    assert (result["y"] == 0).all()
    assert (result["d_x"] == 0).all()
    assert torch.equal(result["h_n"], flat(hx)[0])
    for name, p in theirs.named_parameters():
        assert torch.equal(result["d_" + name], torch.zeros_like(p)), name


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_no_rows(device: torch.device, cell: Cell) -> None:
    ours, _ = cell.make(4, 5, device=device, dtype=f64)
    for lengths in ([], torch.zeros(0, dtype=torch.int64)):
        y, _ = ours(randn(3, 0, 4, device=device), lengths=lengths)
        assert y.shape == (3, 0, ours.proj_size or 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_lengths_in_other_dtypes(device: torch.device, cell: Cell, dtype: torch.dtype) -> None:
    lengths = [3, 0, 5, 2]
    ours, _ = cell.make(4, 9, device=device, bidirectional=True, dtype=dtype)
    sequences = ragged(lengths, 4, dtype, device=device)
    y, states = ours(pad(sequences, 5, NAN), lengths=lengths)
    assert y.dtype == dtype
    for n, L in enumerate(lengths):
        if L:
            alone, ends = ours(sequences[n].unsqueeze(1))
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(y[:L, n : n + 1], alone, rtol=tolerance, atol=tolerance)
            for a, b in zip(flat(states), flat(ends), strict=True):
                torch.testing.assert_close(a[:, n : n + 1], b, rtol=tolerance, atol=tolerance)


def test_lengths_are_positional_too(device: torch.device) -> None:
    ours, _ = BY_NAME["gru"].make(4, 5, device=device)
    x = torch.randn(3, 2, 4, device=device)
    assert torch.equal(ours(x, None, [1, 3])[0], ours(x, lengths=torch.tensor([1, 3]))[0])


def test_lengths_and_dropout(device: torch.device) -> None:
    """Dropout between layers applies to the padded output, in which padding stays zero."""
    ours, _ = BY_NAME["lstm"].make(4, 5, device=device, num_layers=2, dropout=0.5, dtype=f64)
    x = pad(ragged([2, 5, 3], 4), 5, NAN)
    first, second = run(ours, x, lengths=[2, 5, 3]), run(ours, x, lengths=[2, 5, 3], seed=1)
    assert not first["y"].isnan().any()
    assert not torch.equal(first["y"], second["y"])
    assert (first["y"][2:, 0] == 0).all()


class Index:
    """An object that Python accepts as an integer."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


DTYPES = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint64", "float32", "bfloat16")
# [5, 2, 3] in every form that pack_padded_sequence takes. The test calls it with each of them.
FORMS: dict[str, Any] = {
    "tuple": (5, 2, 3),
    "range": range(5, 2, -1),
    "torch.Size": torch.Size([5, 2, 3]),
    "deque": collections.deque([5, 2, 3]),
    "Python array": array.array("i", [5, 2, 3]),
    "floats": [5.0, 2.0, 3.0],
    "indices": [Index(5), Index(2), Index(3)],
    "numpy ints": [np.int64(5), np.int32(2), np.uint8(3)],
    "numpy float64s": [np.float64(5), np.float64(2), np.float64(3)],
    "0-d tensors": [torch.tensor(5), torch.tensor(2, dtype=torch.int32), torch.tensor([3])],
    "Parameter": torch.nn.Parameter(torch.tensor([5, 2, 3]), requires_grad=False),
    "requires_grad": torch.tensor([5.0, 2.0, 3.0], requires_grad=True),
    "strided": torch.tensor([5, 0, 2, 0, 3])[::2],
    **{f"torch.{d}": torch.tensor([5, 2, 3]).to(getattr(torch, d)) for d in DTYPES},
    **{f"numpy.{d}": np.array([5, 2, 3], dtype=d) for d in DTYPES if d != "bfloat16"},
}
# Forms that we take too. pack_padded_sequence refuses all of them but one, for which it warns.
MORE_FORMS: dict[str, Any] = {
    "other byte order": np.array([5, 2, 3], dtype=">i8"),
    "numpy backwards": np.array([3, 2, 5])[::-1],
    "numpy objects": np.array([5, 2, 3], dtype=object),
    "numpy read-only": np.frombuffer(np.array([5, 2, 3]).tobytes(), dtype=np.int64),
    "numpy floats": [np.float64(5), np.float32(2), np.float16(3)],
    "0-d numpy arrays": [np.array(5), np.array(2), np.array(3)],
    "0-d float tensors": [torch.tensor(5.0), torch.tensor(2.0), torch.tensor(3.0)],
}


@pytest.mark.parametrize("form", [*FORMS, *MORE_FORMS])
def test_forms_of_lengths(form: str) -> None:
    given = (FORMS | MORE_FORMS)[form]
    numbers = [5, 4, 3] if form == "range" else [5, 2, 3]
    gru, _ = BY_NAME["gru"].make(4, 6, bidirectional=True)
    x = torch.randn(5, 3, 4)
    packed = pack_padded_sequence(x, numbers, enforce_sorted=False)
    if form in FORMS:
        theirs = pack_padded_sequence(x, given, enforce_sorted=False)
        assert torch.equal(theirs.batch_sizes, packed.batch_sizes)
    expected, _ = pad_packed_sequence(gru(packed)[0])
    torch.testing.assert_close(gru(x, lengths=given)[0], expected)


def test_numpy_is_not_needed() -> None:
    """Uses lengths of every kind but numpy's in a process that cannot import numpy."""
    program = """
import sys
import torch
from fusedrnn import functional
sys.modules["numpy"] = None
weights = [torch.ones(18, 4), torch.ones(18, 6)]
for given in ([5, 2], (5, 2), range(5, 3, -1), torch.tensor([5, 2], dtype=torch.int32), [5.0, 2.0],
              [torch.tensor(5), torch.tensor(2)]):
    functional.gru(torch.ones(5, 2, 4), None, weights, bias=False, lengths=given)
print("computed")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "computed\n", done.stderr


# Defaults of torch for new tensors, which must not affect a call whose tensors exist.
DEFAULTS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),
    "dtype": lambda: default_dtype(torch.float64),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_defaults_of_torch_do_not_matter(cell: Cell, default: str) -> None:
    """They affect neither lengths, nor states, nor second derivatives."""
    ours, _ = cell.make(4, 5, num_layers=2, bidirectional=True, dtype=torch.float32)
    x = torch.randn(5, 3, 4, requires_grad=True)
    packed = pack_padded_sequence(x, [5, 2, 3], enforce_sorted=False)

    def everything(lengths: Any) -> list[Tensor]:
        results: list[Tensor] = []
        for args in ((x, None, lengths), (x,), (packed,)):
            y, states = ours(*args)
            y = y.data if args == (packed,) else y
            (d_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            dd = torch.autograd.grad(d_x.sin().sum(), list(ours.parameters()), allow_unused=True)
            results += [y, *flat(states), d_x, *(d for d in dd if d is not None)]
        return results

    for lengths in ([5, 2, 3], np.array([5, 2, 3]), torch.tensor([5, 2, 3], dtype=torch.int32)):
        expected = everything(lengths)
        with DEFAULTS[default]():
            actual = everything(lengths)
        for got, wanted in zip(actual, expected, strict=True):
            assert got.device == wanted.device
            assert torch.equal(got, wanted)


def test_the_reference_under_a_default_device() -> None:
    call = make_arguments("gru", "lengths")
    expected = call.run(_reference.layer)
    with torch.device("meta"):
        actual = call.run(_reference.layer)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_lengths_of_a_buffer_that_is_filled_again(
    cell: Cell, kind: Callable[[Any], Any], order: int
) -> None:
    ours, _ = cell.make(4, 5, num_layers=2, bidirectional=True, dtype=f64)
    x = randn(6, 3, 4).requires_grad_()
    weight = ours.weight_hh_l1

    def gradient(y: Tensor) -> Tensor:
        if order == 1:
            return torch.autograd.grad(y.sin().sum(), weight)[0]
        (d_x,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(d_x.sin().sum(), weight)[0]

    expected = gradient(ours(x, lengths=[6, 3, 2])[0])
    buffer = np.array([6, 3, 2])
    y, _ = ours(x, lengths=kind(buffer))
    buffer[:] = [1, 6, 6]  # the next batch of a loader; torch cannot see this write
    assert torch.equal(gradient(y), expected)


def test_lengths_changed_in_place() -> None:
    """No error is raised, and gradients are right, as with pack_padded_sequence, which copies."""
    gru, _ = BY_NAME["gru"].make(4, 5, dtype=f64)
    x, lengths = randn(6, 3, 4), torch.tensor([6, 3, 2])
    expected = torch.autograd.grad(gru(x, lengths=lengths)[0].sum(), gru.weight_hh_l0)
    y, _ = gru(x, lengths=lengths)
    lengths.fill_(1)
    assert torch.equal(torch.autograd.grad(y.sum(), gru.weight_hh_l0)[0], expected[0])


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_batch_sizes_that_are_filled_again(cell: Cell, transform: bool) -> None:
    """The result holds the caller's batch_sizes, as torch.nn's does. Backward has a copy."""
    ours, _ = cell.make(4, 5, num_layers=2, dtype=f64)
    x = randn(11, 4)

    def gradient(fill: bool) -> Tensor:
        buffer = np.array([3, 3, 2, 1, 1, 1])
        sizes = torch.from_numpy(buffer)

        def run(x: Tensor) -> Tensor:
            y, _ = ours(PackedSequence(x, sizes))
            assert y.batch_sizes is sizes
            if fill:
                buffer[:] = [6, 1, 1, 1, 1, 1]
            result: Tensor = y.data.sin().sum()
            return result

        if transform:
            return torch.func.grad(run)(x)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(run(leaf), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))

"""A mistake raises the exception type of torch.nn, with a message that says more."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

LAYERS = [
    (fusedrnn.FusedLSTM, nn.LSTM),
    (fusedrnn.FusedGRU, nn.GRU),
    (fusedrnn.FusedRNN, nn.RNN),
]
CELLS = [
    (fusedrnn.FusedLSTMCell, nn.LSTMCell),
    (fusedrnn.FusedGRUCell, nn.GRUCell),
    (fusedrnn.FusedRNNCell, nn.RNNCell),
]
R = torch.randn


def states(m: Any, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """hx of this shape for a class or module, (h, c) for an LSTM."""
    h = torch.ones(shape, dtype=dtype, device=device)
    name = m.__name__ if isinstance(m, type) else type(m).__name__
    return (h, h.clone()) if "LSTM" in name else h


def packed(data: Tensor, sizes: Any, **indices: Any) -> PackedSequence:
    return PackedSequence(data, torch.as_tensor(sizes), **indices)


def with_weight(m: Any, name: str, change: Callable[[Tensor], Tensor]) -> Any:
    setattr(m, name, nn.Parameter(change(getattr(m, name).detach())))
    return m


def compare(
    call: Callable[[Any], Any], ours: Any, theirs: Any, message: str, differs: type | None = None
) -> None:
    """Both calls raise the same type, or ours the given type. Ours has the given message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            call(theirs)
        with pytest.raises(Exception, match=message) as got:
            call(ours)
    assert got.type is (differs or wanted.type), f"{wanted.type}: {wanted.value}"


CONSTRUCTOR: dict[str, tuple[dict[str, Any], str]] = {
    "input_size < 0": ({"input_size": -1}, "input_size must be greater than zero, got -1"),
    "input_size 0": ({"input_size": 0}, "input_size must be greater than zero, got 0"),
    "input_size str": ({"input_size": "4"}, "input_size should be of type int, got: str"),
    "hidden_size 0": ({"hidden_size": 0}, "hidden_size must be greater than zero, got 0"),
    "hidden_size float": ({"hidden_size": 2.0}, "hidden_size should be of type int, got: float"),
    "num_layers 0": ({"num_layers": 0}, "num_layers must be greater than zero, got 0"),
    "num_layers float": ({"num_layers": 1.5}, "num_layers should be of type int, got: float"),
    "num_layers str": ({"num_layers": "2"}, "num_layers should be of type int, got: str"),
    "bias int": ({"bias": 1}, "bias should be of type bool, got: int"),
    "bias None": ({"bias": None}, "bias should be of type bool, got: NoneType"),
    "batch_first int": ({"batch_first": 1}, "batch_first should be of type bool, got: int"),
    "dropout 2": ({"dropout": 2}, r"dropout should be a number in range \[0, 1\].*got 2"),
    "dropout < 0": ({"dropout": -0.1}, r"dropout should be a number.*got -0.1"),
    "dropout bool": ({"dropout": True}, "dropout should be a number.*got True"),
    "dropout nan": ({"dropout": float("nan")}, "dropout should be a number.*got nan"),
    "dropout word": ({"dropout": "a"}, "dropout should be a number.*got 'a'"),
    "dropout str": ({"dropout": "0.5"}, "dropout should be a number.*got '0.5'"),
    "dropout list": ({"dropout": [0.1]}, r"dropout should be a number.*got \[0.1\]"),
    "dropout None": ({"dropout": None}, "dropout should be a number.*got None"),
    "proj_size < 0": ({"proj_size": -1}, "proj_size"),
    "proj_size = H": ({"proj_size": 6}, "proj_size"),
    "proj_size float": ({"proj_size": 2.0}, "proj_size"),
    "proj_size None": ({"proj_size": None}, "proj_size"),
    "unknown keyword": ({"sizes": 1}, "unexpected keyword argument 'sizes'"),
    "nonlinearity": ({"nonlinearity": "selu"}, "nonlinearity"),
    "device": ({"device": "nowhere"}, "device"),
    "dtype": ({"dtype": torch.int64}, "floating point"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
@pytest.mark.parametrize(("ours", "theirs"), LAYERS, ids=["LSTM", "GRU", "RNN"])
def test_constructor(ours: Any, theirs: Any, name: str) -> None:
    kwargs, message = CONSTRUCTOR[name]
    compare(lambda m: m(**{"input_size": 4, "hidden_size": 6, **kwargs}), ours, theirs, message)


@pytest.mark.parametrize(("ours", "theirs"), LAYERS, ids=["LSTM", "GRU", "RNN"])
def test_missing_sizes_and_proj_size_of_other_layers(ours: Any, theirs: Any) -> None:
    compare(lambda m: m(), ours, theirs, "'input_size' and 'hidden_size'")
    compare(lambda m: m(4), ours, theirs, "'hidden_size'")
    if theirs is not nn.LSTM:
        message = "proj_size argument is only supported for LSTM, not RNN or GRU"
        compare(lambda m: m(4, 6, proj_size=2), ours, theirs, message)
        compare(lambda m: m(4, 6, proj_size=0), ours, theirs, message)
    else:
        message = "proj_size has to be smaller than hidden_size = 6, got 6"
        compare(lambda m: m(4, 6, proj_size=6), ours, theirs, message)
        message = "proj_size should be a positive integer or zero.*got -1"
        compare(lambda m: m(4, 6, proj_size=-1), ours, theirs, message)


@pytest.mark.parametrize(("ours", "theirs"), LAYERS, ids=["LSTM", "GRU", "RNN"])
def test_dropout_of_one_layer_warns(ours: Any, theirs: Any) -> None:
    messages = []
    for m in (ours, theirs):
        with pytest.warns(UserWarning, match="non-zero dropout expects num_layers") as caught:
            m(4, 6, dropout=0.5)
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1]


x = R(5, 3, 4)
FORWARD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda m: m([1, 2]), "input must be a Tensor or a PackedSequence, got list"),
    "None": (lambda m: m(None), "input must be a Tensor or a PackedSequence, got NoneType"),
    "a tuple": (lambda m: m((x,)), "got tuple"),
    "0-D": (lambda m: m(R(())), "Expected input to be 2D or 3D, got 0D"),
    "1-D": (lambda m: m(R(4)), "Expected input to be 2D or 3D, got 1D"),
    "4-D": (lambda m: m(R(2, 2, 2, 4)), "Expected input to be 2D or 3D, got 4D"),
    "input size": (
        lambda m: m(R(5, 3, 7)),
        r"input.size\(-1\) must be equal to input_size. Expected 4, got 7",
    ),
    "input size unbatched": (lambda m: m(R(5, 7)), "Expected 4, got 7"),
    "float64 input": (
        lambda m: m(x.double()),
        r"input dtype \(torch.float64\) does not match weight dtype \(torch.float32\)",
    ),
    "int input": (lambda m: m(x.long()), r"input dtype \(torch.int64\) does not match"),
    "bfloat16 model": (lambda m: m.bfloat16()(x), r"\(torch.float32\) does not match weight"),
    "T = 0": (lambda m: m(R(0, 3, 4)), "Expected sequence length to be larger than 0"),
    "T = 0, N = 0": (lambda m: m(R(0, 0, 4)), "Expected sequence length to be larger than 0"),
    "T = 0 unbatched": (lambda m: m(R(0, 4)), "Expected sequence length to be larger than 0"),
    "hx batch": (lambda m: m(x, states(m, 1, 4, 6)), r"size \(1, 3, 6\), got \[1, 4, 6\]"),
    "hx size": (lambda m: m(x, states(m, 1, 3, 7)), r"size \(1, 3, 6\), got \[1, 3, 7\]"),
    "hx layers": (lambda m: m(x, states(m, 2, 3, 6)), r"size \(1, 3, 6\), got \[2, 3, 6\]"),
    "hx 2-D": (lambda m: m(x, states(m, 3, 6)), "For batched 3-D input, hx.*should also be 3-D"),
    "hx 4-D": (lambda m: m(x, states(m, 1, 1, 3, 6)), "For batched 3-D input.*4-D"),
    "hx 3-D unbatched": (lambda m: m(x[:, 0], states(m, 1, 3, 6)), "For unbatched 2-D input.*3-D"),
    "hx size unbatched": (lambda m: m(x[:, 0], states(m, 1, 7)), r"\(1, 1, 6\), got \[1, 1, 7\]"),
    "hx float64": (
        lambda m: m(x, states(m, 1, 3, 6, dtype=torch.float64)),
        "hidden.* must have the dtype of the input, torch.float32, got torch.float64",
    ),
    "hx bfloat16": (lambda m: m(x, states(m, 1, 3, 6, dtype=torch.bfloat16)), "torch.bfloat16"),
    "hx int": (lambda m: m(x, states(m, 1, 3, 6, dtype=torch.int64)), "torch.int64"),
    "hx device": (
        lambda m: m(x, states(m, 1, 3, 6, device="meta")),
        "found input tensor at cpu and hidden tensor .* at meta",
    ),
    "input device": (
        lambda m: m(x.to("meta")),
        "found input tensor at meta and parameter tensor weight_ih_l0 at cpu",
    ),
    "weight device": (
        lambda m: with_weight(m, "weight_hh_l0", lambda w: w.to("meta"))(x),
        "found input tensor at cpu and parameter tensor weight_hh_l0 at meta",
    ),
    "bias shape": (
        lambda m: with_weight(m, "bias_hh_l0", lambda w: w[:3])(x),
        r"bias_hh_l0 must be \[\d?H\] = \[\d+\], got \[3\]",
    ),
    "weight_hh dtype": (
        lambda m: with_weight(m, "weight_hh_l0", Tensor.double)(x),
        "weight_hh_l0 must have the dtype of the input, torch.float32, got torch.float64",
    ),
    "bias dtype": (lambda m: with_weight(m, "bias_ih_l0", Tensor.double)(x), "bias_ih_l0 must"),
    "weight_ih dtype": (
        lambda m: with_weight(m, "weight_ih_l0", Tensor.double)(x),
        r"input dtype \(torch.float32\) does not match weight dtype \(torch.float64\)",
    ),
    "packed rows": (lambda m: m(packed(R(5, 4), [4, 3])), "must sum to the number of rows.*5, got"),
    "packed growing": (lambda m: m(packed(R(5, 4), [2, 3])), r"never grow, got \[2, 3\]"),
    "packed negative": (lambda m: m(packed(R(5, 4), [3, 3, -1])), "at least 1 and never grow"),
    "packed nothing": (lambda m: m(packed(R(0, 4), torch.tensor([]).long())), "at least one step"),
    "packed int32": (
        lambda m: m(packed(R(5, 4), torch.tensor([3, 2], dtype=torch.int32))),
        "batch_sizes must be a 1-D int64 tensor on the CPU, got 1-D torch.int32",
    ),
    "packed input size": (lambda m: m(packed(R(5, 7), [3, 2])), "Expected 4, got 7"),
    "packed 3-D": (lambda m: m(packed(R(5, 1, 4), [3, 2])), "input must have 2 dimensions, got 3"),
    "packed indices": (
        lambda m: m(
            packed(
                R(5, 4),
                [3, 2],
                sorted_indices=torch.tensor([0, 1, 5]),
                unsorted_indices=torch.tensor([0, 1, 5]),
            ),
            states(m, 1, 3, 6),
        ),
        "out of DATA bounds",
    ),
    "packed hx batch": (
        lambda m: m(packed(R(5, 4), [3, 2]), states(m, 1, 4, 6)),
        r"size \(1, 3, 6\), got \[1, 4, 6\]",
    ),
    "packed hx size": (
        lambda m: m(packed(R(5, 4), [3, 2]), states(m, 1, 3, 7)),
        r"size \(1, 3, 6\), got \[1, 3, 7\]",
    ),
    "packed hx layers": (lambda m: m(packed(R(5, 4), [3, 2]), states(m, 2, 3, 6)), "got"),
    "packed hx dtype": (
        lambda m: m(packed(R(5, 4), [3, 2]), states(m, 1, 3, 6, dtype=torch.float64)),
        "must have the dtype of the input",
    ),
}


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize(("ours", "theirs"), LAYERS, ids=["LSTM", "GRU", "RNN"])
def test_forward(ours: Any, theirs: Any, name: str) -> None:
    call, message = FORWARD[name]
    compare(call, ours(4, 6), theirs(4, 6), message)


h = torch.ones(1, 3, 6)
# Values of hx that an LSTM does not take.
LSTM_HX: dict[str, tuple[Any, str]] = {
    "four dimensions": (torch.ones(2, 1, 3, 6), r"must be a tuple \(h_0, c_0\).*got Tensor"),
    "a number": (0.5, r"must be a tuple \(h_0, c_0\) of tensors, got float"),
    "nothing in it": ((), r"two hidden states \(h_0, c_0\) in hx, got 0"),
    "h alone": ((h,), "two hidden states .* got 1"),
    "three": ((h, h, h), "two hidden states .* got 3"),
    "None for c": ((h, None), "got NoneType in it"),
    "two None": ((None, None), "got NoneType in it"),
    "c of another size": ((h, torch.ones(1, 3, 7)), r"Expected hidden\[1\] size \(1, 3, 6\), got"),
    "c of another rank": ((h, torch.ones(3, 6)), r"but got \(3-D, 2-D\) tensors"),
    "c of another dtype": ((h, h.double()), r"hidden\[1\] must have the dtype"),
}


@pytest.mark.parametrize("name", LSTM_HX)
def test_states_of_an_lstm(name: str) -> None:
    hx, message = LSTM_HX[name]
    compare(lambda m: m(x, hx), fusedrnn.FusedLSTM(4, 6), nn.LSTM(4, 6), message)


@pytest.mark.parametrize("hx", [(h, h), [h], (h,), 0.5, "abc"], ids=repr)
@pytest.mark.parametrize(("ours", "theirs"), LAYERS[1:], ids=["GRU", "RNN"])
def test_states_of_the_others(ours: Any, theirs: Any, hx: Any) -> None:
    message = f"hx must be a Tensor, got {type(hx).__name__}"
    compare(lambda m: m(x, hx), ours(4, 6), theirs(4, 6), message)


@pytest.mark.parametrize(("ours", "theirs"), LAYERS[1:], ids=["GRU", "RNN"])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_shapes_of_weights(ours: Any, theirs: Any, name: str) -> None:
    for change in (lambda w: w[:, :3], lambda w: w[:4], lambda w: w.repeat(2, 1)):
        compare(
            lambda m, change=change: with_weight(m, name, change)(x),  # type: ignore[misc]
            ours(4, 6),
            theirs(4, 6),
            rf"{name} must be \[\d?H, [IH]\] = \[\d+, \d\], got \[\d+, \d\]",
        )


class TestDeliberateDifferences:
    """torch.nn accepts these mistakes, or its exception type depends on where it fails."""

    def test_shapes_of_an_lstms_weights(self) -> None:
        # torch.nn does not check, and oneDNN reads beyond the end of the weights.
        for name in ("weight_ih_l0", "weight_hh_l0"):
            m = with_weight(fusedrnn.FusedLSTM(4, 6), name, lambda w: w[:, :3])
            with pytest.raises(RuntimeError, match=rf"{name} must be \[4H, [IH]\] = \[24, \d\]"):
                m(x)

    def test_a_deleted_weight(self) -> None:
        # torch.nn still computes with the deleted tensor.
        m = fusedrnn.FusedGRU(4, 6)
        del m.weight_hh_l0
        with pytest.raises(AttributeError, match="weight_hh_l0"):
            m(x)

    def test_none_as_a_weight(self) -> None:
        m = fusedrnn.FusedGRU(4, 6)
        m.weight_hh_l0 = None
        with pytest.raises(TypeError, match="weight_hh_l0 must be a Tensor, got NoneType"):
            m(x)

    @pytest.mark.parametrize("sizes", [[3, 1], [3, 2, 0]])
    def test_batch_sizes_that_do_not_cover_the_rows(self, sizes: list[int]) -> None:
        with pytest.raises(RuntimeError, match="batch_sizes must"):
            fusedrnn.FusedGRU(4, 6)(packed(R(5, 4), sizes))

    def test_batch_sizes_2d_or_float(self) -> None:
        for sizes in (torch.tensor([[3], [2]]), torch.tensor([3.0, 2.0])):
            with pytest.raises(RuntimeError, match="batch_sizes must be a 1-D int64 tensor"):
                fusedrnn.FusedGRU(4, 6)(packed(R(5, 4), sizes))

    def test_dtype_of_a_packed_lstm_input(self) -> None:
        # torch.nn.LSTM raises RuntimeError, and torch.nn's GRU and RNN raise ValueError.
        with pytest.raises(ValueError, match="input dtype"):
            fusedrnn.FusedLSTM(4, 6)(packed(R(5, 4).double(), [3, 2]))

    def test_one_tensor_for_an_lstms_states(self) -> None:
        # torch.nn raises IndexError or RuntimeError, depending on the shape.
        for hx in (h, torch.ones(2, 3, 6), "ab"):
            with pytest.raises(TypeError, match=r"hx must be a tuple \(h_0, c_0\)"):
                fusedrnn.FusedLSTM(4, 6)(x, hx)

    def test_two_dimensional_states_of_a_packed_lstm(self) -> None:
        with pytest.raises(RuntimeError, match="should also be 3-D"):
            fusedrnn.FusedLSTM(4, 6)(packed(R(5, 4), [3, 2]), (h[0], h[0]))

    def test_states_of_more_rows_than_a_packed_batch(self) -> None:
        # torch.nn's index_select silently drops the fourth row.
        data = nn.utils.rnn.pack_sequence([R(1, 4), R(3, 4), R(2, 4)], enforce_sorted=False)
        with pytest.raises(RuntimeError, match=r"\(1, 3, 6\), got \[1, 4, 6\]"):
            fusedrnn.FusedGRU(4, 6)(data, torch.ones(1, 4, 6))

    def test_complex(self) -> None:
        with pytest.raises(NotImplementedError, match=r"got torch\.complex64"):
            fusedrnn.FusedRNN(4, 6, dtype=torch.complex64)(x.to(torch.complex64))


def test_lengths_where_they_cannot_be() -> None:
    m = fusedrnn.FusedGRU(4, 6)
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence"):
        m(packed(R(5, 4), [3, 2]), lengths=[1, 2, 2])
    with pytest.raises(ValueError, match="lengths must be None for unbatched 2-D input"):
        m(R(5, 4), lengths=[5])
    with pytest.raises(RuntimeError, match=r"lengths\[2\] must be in \[0, T\] = \[0, 5\], got 6"):
        m(x, lengths=[5, 5, 6])
    m = fusedrnn.FusedGRU(4, 6, batch_first=True)
    with pytest.raises(RuntimeError, match=r"lengths must be \[N\] = \[5\], got \[3\]"):
        m(x, lengths=[1, 2, 3])


def test_reset_after_must_be_bool() -> None:
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        fusedrnn.FusedGRU(4, 6, reset_after=1)  # type: ignore[arg-type]
    weights = list(fusedrnn.FusedGRU(4, 6).parameters())
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        fusedrnn.functional.gru(x, None, weights, reset_after=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        fusedrnn.FusedGRU(4, 6, 1, True, False, 0.0, False, None, None, False)  # type: ignore[misc]


CELL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda m: m([1.0]), "input must be a Tensor, got list"),
    "0-D": (lambda m: m(R(())), "Cell: Expected input to be 1D or 2D, got 0D instead"),
    "3-D": (lambda m: m(R(5, 3, 4)), "Cell: Expected input to be 1D or 2D, got 3D instead"),
    "input size": (lambda m: m(R(3, 7)), "inconsistent input_size: got 7 expected 4"),
    "input size 1-D": (lambda m: m(R(7)), "inconsistent input_size: got 7 expected 4"),
    "hx 3-D": (lambda m: m(x[0], states(m, 1, 3, 6)), "to be 1D or 2D, got 3D instead"),
    "hx 2-D for 1-D": (lambda m: m(R(4), states(m, 1, 6)), r"must be 1-D as the input is, \[6\]"),
    "hx 1-D for 2-D": (lambda m: m(x[0], states(m, 6)), r"must be 2-D as the input is, \[3, 6\]"),
    "hx batch": (
        lambda m: m(x[0], states(m, 4, 6)),
        "Input batch size 3 doesn't match hidden0 batch size 4",
    ),
    "hx size": (lambda m: m(x[0], states(m, 3, 7)), "inconsistent hidden_size: got 7, expected 6"),
    "input size and dtype": (
        lambda m: m(R(3, 7).double()),
        "inconsistent input_size: got 7 expected 4",
    ),
    "hx size and dtype": (
        lambda m: m(x[0].double(), states(m, 3, 7)),
        "inconsistent hidden_size: got 7, expected 6",
    ),
    "hx batch and dtype": (
        lambda m: m(x[0].double(), states(m, 4, 6)),
        "Input batch size 3 doesn't match hidden0 batch size 4",
    ),
    "float64 input": (lambda m: m(x[0].double()), r"input dtype \(torch.float64\) does not match"),
    "int input": (lambda m: m(x[0].long()), r"input dtype \(torch.int64\) does not match"),
    "hx float64": (
        lambda m: m(x[0], states(m, 3, 6, dtype=torch.float64)),
        "hidden0 must have the dtype of the input, torch.float32, got torch.float64",
    ),
    "hx device": (
        lambda m: m(x[0], states(m, 3, 6, device="meta")),
        "found input tensor at cpu and hidden tensor .hidden0. at meta",
    ),
    "weight_hh rows": (
        lambda m: with_weight(m, "weight_hh", lambda w: w[:4])(x[0]),
        r"weight_hh must be \[\d?H, H\] = \[\d+, 6\], got \[4, 6\]",
    ),
    "weight_ih columns": (
        lambda m: with_weight(m, "weight_ih", lambda w: w[:, :3])(x[0]),
        r"weight_ih must be \[\d?H, I\] = \[\d+, 4\], got \[\d+, 3\]",
    ),
    "bias shape": (
        lambda m: with_weight(m, "bias_hh", lambda w: w[:3])(x[0]),
        r"bias_hh must be \[\d?H\] = \[\d+\], got \[3\]",
    ),
    "weight dtype": (
        lambda m: with_weight(m, "weight_hh", Tensor.double)(x[0]),
        "weight_hh must have the dtype of the input, torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("name", CELL)
@pytest.mark.parametrize(("ours", "theirs"), CELLS, ids=["LSTM", "GRU", "RNN"])
def test_cells(ours: Any, theirs: Any, name: str) -> None:
    call, message = CELL[name]
    compare(call, ours(4, 6), theirs(4, 6), message)


@pytest.mark.parametrize(("ours", "theirs"), CELLS, ids=["LSTM", "GRU", "RNN"])
def test_constructors_of_cells(ours: Any, theirs: Any) -> None:
    compare(lambda m: m(4), ours, theirs, "hidden_size")
    compare(lambda m: m(-4, 6), ours, theirs, "negative dimension")
    compare(lambda m: m(4, 6.0), ours, theirs, "int")
    compare(lambda m: m(4, 6, proj_size=2), ours, theirs, "unexpected keyword argument 'proj_size'")


def test_states_of_cells() -> None:
    h = torch.ones(3, 6)
    for hx in ((h,), (h, h, h), (h, None), torch.ones(2, 3, 6), h, (h, h[:, :5]), (h, h[:2])):
        compare(lambda m, hx=hx: m(x[0], hx), fusedrnn.FusedLSTMCell(4, 6), nn.LSTMCell(4, 6), "")  # type: ignore[misc]
    for ours, theirs in CELLS[1:]:
        for hx in ((h, h), [h], (h,), 0.5):
            message = f"hidden must be a Tensor, got {type(hx).__name__}"
            compare(lambda m, hx=hx: m(x[0], hx), ours(4, 6), theirs(4, 6), message)  # type: ignore[misc]
    message = "Unknown nonlinearity: selu"
    compare(
        lambda m: m(4, 6, nonlinearity="selu")(x[0]), fusedrnn.FusedRNNCell, nn.RNNCell, message
    )


def test_deleted_weight_of_a_cell() -> None:
    for pair in CELLS:
        modules = [m(4, 6) for m in pair]
        for m in modules:
            del m.weight_hh
        compare(lambda m: m(x[0]), *modules, "weight_hh")

"""Shapes and options that hypothesis draws, compared with torch.nn in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from tests.kit.layers import (
    CELLS,
    TORCH_CELLS,
    Cell,
    assert_same,
    error,
    flat,
    make_states,
    pad,
    ragged,
    randn,
    run,
)

f64 = torch.float64
SIZES = st.one_of(st.integers(1, 9), st.sampled_from([13, 16, 17, 31, 33, 64, 65]))
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@st.composite
def modules(draw: Any) -> tuple[Cell, int, dict[str, Any]]:
    """A cell, I and the options of a constructor. Weights come from a seed that is drawn too."""
    cell = draw(st.sampled_from(CELLS))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    return cell, draw(SIZES), options


def make(drawn: tuple[Cell, int, dict[str, Any]], H: int, **more: Any) -> tuple[Any, Any]:
    cell, I, options = drawn
    return cell.make(I, H + cell.projects, dtype=f64, **options, **more)


@given(modules(), SIZES, st.integers(1, 8), st.integers(0, 9), st.booleans(), st.booleans())
def test_plain(drawn: Any, H: int, T: int, N: int, batch_first: bool, states: bool) -> None:
    ours, theirs = make(drawn, H, batch_first=batch_first)
    x = randn(*((N, T) if batch_first else (T, N)), drawn[1])
    hx = make_states(ours, N, f64) if states else None
    if drawn[0] not in TORCH_CELLS and N == 0:
        assert ours(x, hx)[0].shape == (*x.shape[:2], ours.hidden_size * (1 + ours.bidirectional))
        return
    assert_same(run(ours, x, hx), run(theirs, x, hx), 1e-11)


@given(modules(), SIZES, LENGTHS, st.booleans())
def test_packed(drawn: Any, H: int, lengths: list[int], states: bool) -> None:
    ours, theirs = make(drawn, H)
    x = pack_sequence(ragged(lengths, drawn[1]), enforce_sorted=False)
    hx = make_states(ours, len(lengths), f64) if states else None
    assert_same(run(ours, x, hx), run(theirs, x, hx), 1e-11)


@given(modules(), SIZES, st.lists(st.integers(0, 7), min_size=1, max_size=9), st.integers(0, 3))
def test_lengths(drawn: Any, H: int, lengths: list[int], extra: int) -> None:
    """Sequences of length 0 return their state. The others compute the same as a packed batch."""
    ours, theirs = make(drawn, H)
    T = max(1, max(lengths) + extra)
    sequences = ragged(lengths, drawn[1])
    hx = make_states(ours, len(lengths), f64)
    result = run(ours, pad(sequences, T, float("nan")), hx, lengths=lengths)
    assert not any(t.isnan().any() for t in result.values())
    live = [n for n, L in enumerate(lengths) if L > 0]
    for n in set(range(len(lengths))) - set(live):
        for name, state in zip(("h_n", "c_n"), flat(hx), strict=False):
            assert torch.equal(result[name][:, n], state[:, n])
    if not live:
        return
    rows = [t[:, live] for t in flat(hx)]
    expected = run(
        theirs,
        pack_sequence([sequences[n] for n in live], enforce_sorted=False),
        tuple(rows) if drawn[0].has_c else rows[0],
    )
    for name in ("h_n", "c_n"):
        if name in expected:
            assert error(result[name][:, live], expected[name]) < 1e-11


@given(
    modules(),
    SIZES,
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_other_dtypes(drawn: Any, H: int, T: int, N: int, dtype: torch.dtype) -> None:
    """Results are near float64. The limit is no error budget; it finds wrong strides and lanes."""
    ours, _ = make(drawn, H)
    ours = ours.to(dtype)
    x, hx = randn(T, N, drawn[1], dtype=dtype), make_states(ours, N, dtype)
    result = run(ours, x, hx)
    ours.double()
    wide: list[Tensor] = [t.double() for t in flat(hx)]
    expected = run(ours, x.double(), tuple(wide) if drawn[0].has_c else wide[0])
    for name, value in expected.items():
        assert result[name].dtype == dtype
        if drawn[0].name == "rnn_relu" and name.startswith("d_"):
            continue  # rounding may cross the kink and change a gradient by any amount
        # The terms of a gradient are about 1, and may cancel.
        scale = max(1.0, value.abs().max().item())
        difference = (result[name].double() - value).abs().max().item()
        assert difference < 30 * torch.finfo(dtype).eps * scale, name

"""tools.plans reads plans, and tools.cuda_estimates writes them into a table."""

from __future__ import annotations

import re

import pytest

from fusedrnn._cards import CARDS
from fusedrnn.selftest import REGIMES
from tools import cuda_estimates
from tools.gpu import tasks
from tools.plans import plan_of, regime_of, word_of

LSTM = ("lstm", "bf16", [100, 32, 1024, 1024, 1024, 1], "H100", False)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_regime_that_was_asked_for_is_read(regime: str) -> None:
    plan = plan_of(*LSTM, regime=regime)
    assert plan.regime == regime
    assert plan.limit and 0 < plan.step < plan.total
    assert plan.short.startswith(word_of(regime))
    assert plan.short == word_of(regime) or plan.short.endswith(" x 1")


def test_both_lists_have_the_same_regimes() -> None:
    assert set(REGIMES) == set(tasks.REGIMES)


@pytest.mark.parametrize(
    ("H", "N", "regime"), [(1024, 32, "resident"), (2048, 1, "streamed"), (2048, 256, "per_step")]
)
def test_the_regime_that_the_plan_chooses_is_read(H: int, N: int, regime: str) -> None:
    plan = plan_of("lstm", "bf16", [100, N, H, H, H, 1], "H100", False)
    assert plan.regime == regime
    assert bool(plan.streamed_bytes) == (regime == "streamed")


def test_a_refusal_has_no_regime() -> None:
    plan = plan_of("lstm", "f64", [9, 1, 4, 5, 5, 1], "H100", False, regime="resident")
    assert (plan.regime, plan.limit) == ("", "")
    assert plan.words == "resident: cannot run, float64 has no resident kernel"


def test_words_that_are_no_plan_are_named() -> None:
    for words in ("", "residents, FMA: 1", "estimate: 1.0 us a step"):
        with pytest.raises(ValueError, match=f"must begin with its regime, got '{words}'"):
            regime_of(words)


@pytest.mark.parametrize("card", [card.name for card in CARDS])
def test_a_field_of_the_tables(card: str) -> None:
    found = set()
    for N in cuda_estimates.BATCHES:
        for H in cuda_estimates.HIDDEN:
            field = cuda_estimates.cell_of(card, "lstm", "f32", N, H, False, beside=True)
            match = re.fullmatch(
                r"\d+\.\d \((resident|streamed|per step), [a-zA-Z2 ]+(; per step \d+\.\d)?\)", field
            )
            assert match, field
            assert bool(match[2]) == (match[1] != "per step"), field
            found.add(match[1])
            plain = cuda_estimates.cell_of(card, "lstm", "f32", N, H, False)
            assert plain == re.sub(r"; per step [\d.]+\)", ")", field)
    assert "per step" in found and len(found) > 1


def test_the_tables_have_both_dtypes_of_the_first_card() -> None:
    text = "\n".join(cuda_estimates.tables())
    for title in ("LSTM, bf16, forward, H100", "GRU, f32, backward, H100", "GRU, bf16, forward, A"):
        assert f"\n**{title}" in text

"""examples/sine.py, which forecasts sines and sunspots: its data, its forecasts, a short run."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from tests.examples import programs

sine = programs.load("sine")
common = programs.load("common")
TINY = ["--length", "30", "--future", "5", "--hidden", "4", "--steps", "1", "--sunspot-steps", "2"]


@pytest.mark.parametrize("kind", common.KINDS)
def test_cells_and_layers_forecast_the_same(kind: str) -> None:
    x = torch.randn(9, 4, dtype=torch.float64)
    forecasts = []
    for by in ("cells", "layers"):
        torch.manual_seed(3)
        forecasts.append(sine.Forecaster(kind, by, 5).double()(x, future=6))
    assert forecasts[0].shape == (15, 4)
    torch.testing.assert_close(*forecasts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["cells", "layers"])
def test_the_future_is_computed_from_the_models_own_outputs(by: str) -> None:
    model = sine.Forecaster("fused", by, 5).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    free = model(x, future=3)
    fed = x
    for _ in range(4):
        answers = model(fed)
        fed = torch.cat([fed, answers[-1:]])
    torch.testing.assert_close(free, answers, rtol=1e-12, atol=1e-12)


def test_waves() -> None:
    torch.manual_seed(0)
    waves = sine.make_waves(300, 5)
    # This recurrence holds for a sine of this period, and not for one of another period.
    twice = 2 * math.cos(2 * math.pi / sine.PERIOD)
    torch.testing.assert_close(waves[2:] + waves[:-2], twice * waves[1:-1])
    assert (waves.abs().amax(0) > 0.999).all()
    assert len(set(waves[0].tolist())) == 5
    torch.manual_seed(0)
    assert torch.equal(sine.make_waves(300, 5), waves)


def test_sunspots_are_those_of_the_years() -> None:
    series = sine.load_sunspots()
    assert series.years == [*range(1700, 2009)]
    known = dict(zip(series.years, series.values.tolist(), strict=True))
    # The year of most sunspots, and the first and last year.
    assert max(known, key=known.__getitem__) == 1957
    assert (known[1700], known[1957], known[2008]) == pytest.approx((5.0, 190.2, 2.9))
    torch.testing.assert_close(series.unscale(series.scaled), series.values, rtol=1e-4, atol=1e-4)


def test_windows_end_where_they_should() -> None:
    years = [*range(1700, 2009)]
    series = sine.Sunspots(years, torch.tensor(years, dtype=torch.float64) ** 2)
    given, wanted = (series.unscale(part).sqrt().round() for part in series.windows(1900, 1949))
    assert given.shape == wanted.shape == (sine.WINDOW, 50)
    assert wanted[-1].tolist() == [*range(1900, 1950)]
    assert torch.equal(given[1:], wanted[:-1])
    assert given[0, 0] == 1900 - sine.WINDOW
    with pytest.raises(ValueError, match="first must be 1760 or later, got 1759"):
        series.windows(1759, 1800)


def test_forecasts_do_not_use_later_years() -> None:
    """Other values after 1980 change neither the training nor the forecasts made until 1980."""
    options = sine.parse(TINY)
    series = sine.load_sunspots()
    changed = series.values.clone()
    since = series.years.index(1981)
    changed[since:] = 500.0
    runs = [
        sine.train_sunspots("fused", sine.Sunspots(series.years, values), options)
        for values in (series.values, changed)
    ]
    assert runs[0].losses == runs[1].losses
    made_before = 1980 - sine.VALIDATED + 1  # the columns of forecasts made in 1949 to 1980
    first, second = (run.forecasts for run in runs)
    assert first.shape == (sine.CYCLE, 2008 - sine.VALIDATED)
    torch.testing.assert_close(first[:, :made_before], second[:, :made_before])
    assert not torch.equal(first[:, made_before:], second[:, made_before:])


def test_the_best_weights_are_kept() -> None:
    series = sine.load_sunspots()
    options = sine.parse(["--short", "--sunspot-steps", "1"])
    once = sine.train_sunspots("fused", series, options)
    # A second step that makes the error larger does not change the forecasts.
    real, calls = sine.take_step, 0

    def take_step(model: torch.nn.Module, *rest: object, **named: object) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(model, *rest, **named)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9.0)
        return [0.0]

    options.sunspot_steps = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sine, "take_step", take_step)
        twice = sine.train_sunspots("fused", series, options)
    assert calls == 2
    assert torch.equal(once.forecasts, twice.forecasts)


@pytest.mark.parametrize("horizon", [1, 4, 11])
def test_forecasts_and_naive_ones_are_of_the_same_years(horizon: int) -> None:
    series = sine.load_sunspots()
    at = dict(zip(series.years, series.values.tolist(), strict=True))
    years = [*range(sine.VALIDATED + horizon, 2009)]
    assert series.truth(horizon).tolist() == [at[year] for year in years]
    naive = series.naive(horizon)
    assert naive["last value"].tolist() == [at[year - horizon] for year in years]
    assert naive["11 years before"].tolist() == [at[year - 11] for year in years]
    # The forecasts of a perfect network: row h - 1 has the values h years after each origin.
    run = sine.Run("fused", None)
    run.forecasts = torch.full((sine.CYCLE, 2008 - sine.VALIDATED), math.nan)
    for h in range(1, sine.CYCLE + 1):
        for column, origin in enumerate(range(sine.VALIDATED, 2008)):
            run.forecasts[h - 1, column] = at.get(origin + h, math.nan)
    assert torch.equal(sine.ahead(run, horizon), series.truth(horizon))


def test_errors() -> None:
    mae, rmse = sine.errors(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 4.0, 4.0]))
    assert mae == pytest.approx(1.0)
    assert rmse == pytest.approx(math.sqrt(5 / 3))


@pytest.mark.parametrize("good", [True, False])
def test_the_exit_status_is_that_of_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bool
) -> None:
    given = []

    def agree(first: list[float], second: list[float]) -> bool:
        given.append((first, second))
        return good or len(given) > 1  # one of the two parts fails, which is enough

    monkeypatch.setattr(common, "agree", agree)
    assert sine.main([*TINY, "--by", "layers", "--out", str(tmp_path)]) == (0 if good else 1)
    assert len(given) == 2


def test_short_run(tmp_path: Path) -> None:
    done = programs.run("sine", "--short", folder=tmp_path / "new")
    out = done.stdout
    waves, spots = out.split("sunspots, 1950 to 2008")
    rows = dict(re.findall(r"^  (\S+(?: \S+)*?) {2,}([\d. ]+)", waves, re.M))
    assert [float(n) for n in rows["torch.nn"].split()[:2]] == pytest.approx(
        [float(n) for n in rows["fusedrnn"].split()[:2]], abs=1e-3
    )
    rows = dict(re.findall(r"^  (\S+(?: \S+)*?) {2,}([\d. ]+)", spots, re.M))
    assert rows["last value"].split() == ["25.5", "33.2", "88.9", "98.6"]
    assert rows["11 years before"].split() == ["27.4", "37.4", "28.6", "38.6"]
    assert rows["torch.nn"].split()[:4] == rows["fusedrnn"].split()[:4]
    assert len(re.findall(r"ok +first \d+ losses differ by at most", out)) == 2
    assert "FAILED" not in out
    picture = tmp_path / "new" / "sine.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stderr.count("100%") >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "21"], "--length must be at least 22, got 21"),
        (["--sunspot-steps", "0"], "--sunspot-steps must be at least 1, got 0"),
        (["--by", "hand"], "invalid choice"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in programs.parse_fails(sine, arguments, capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = programs.help_of(sine, capsys)
    for option in ("--rnn", "--by", "--future", "--length", "--steps", "--sunspot-steps", "--seed"):
        assert option in text

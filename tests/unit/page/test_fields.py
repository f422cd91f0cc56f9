"""Figures of the searched fields: what was measured at the end is in color, what was stopped early is gray."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from planted import SPACE, plant

from orchestrator.analysis.importance import find_importances
from orchestrator.analysis.sweep_data import SweepData, read_data
from orchestrator.page.figures import draw
from orchestrator.page.style import BLUE, GRAY, log_ticks
from orchestrator.record import TrialState, read_sweep, write_record


@pytest.fixture
def data(tmp_path: Path) -> SweepData:
    return read_data(read_sweep(plant(tmp_path / "s", 12).root))


def values_of(data: SweepData, state: TrialState) -> list[float]:
    return sorted(trial.best.value for trial in data.trials if trial.best and trial.state == state)


def test_stopped_trials_are_gray_points_at_measured_values_without_error_bars(data: SweepData) -> None:
    figure = draw("effects", data, find_importances(data))
    for trace in figure.data:
        assert trace.error_y.array is None
        drawn = list(zip(trace.marker.color, trace.marker.symbol, trace.y, trace.text, strict=True))
        gray = [each for each in drawn if each[0] == GRAY]
        blue = [each for each in drawn if each[0] == BLUE]
        assert sorted(y for _, _, y, _ in gray) == values_of(data, TrialState.STOPPED)
        assert sorted(y for _, _, y, _ in blue) == values_of(data, TrialState.COMPLETE)
        assert {symbol for _, symbol, _, _ in gray} == {"circle-open"}
        assert all(text.endswith("not trained to its end (step 60)") for _, _, _, text in gray)
        assert not any("step" in text for _, _, _, text in blue)


def test_stopped_trials_are_gray_lines_at_measured_values(data: SweepData) -> None:
    (trace,) = draw("parallel", data, find_importances(data)).data
    drawn = [(color, 10**y) for color, y in zip(trace.line.color, trace.dimensions[-1]["values"], strict=True)]
    assert sorted(y for color, y in drawn if color == -1) == pytest.approx(values_of(data, TrialState.STOPPED))
    ended = sorted((y, color) for color, y in drawn if color >= 0)
    assert [y for y, _ in ended] == pytest.approx(values_of(data, TrialState.COMPLETE))
    assert [ended[0][1], ended[-1][1]] == [0, 1]
    assert [color for _, color in ended] == sorted(color for _, color in ended)
    scale = dict(trace.line.colorscale)
    assert scale[0.0] == GRAY
    assert scale[0.5] == BLUE
    assert (trace.line.cmin, trace.line.cmax) == (-1, 1)


def test_a_sweep_in_which_nothing_has_ended_is_drawn_in_gray(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6)
    for trial in read_sweep(paths.root).trials():
        write_record(paths.trial(trial.trial_id).result, trial.model_copy(update={"state": TrialState.STOPPED}))
    data = read_data(read_sweep(paths.root))
    found = find_importances(data)
    (trace,) = draw("parallel", data, found).data
    assert set(trace.line.color) == {-1}
    assert {each for panel in draw("effects", data, found).data for each in panel.marker.color} == {GRAY}


def test_listed_values_that_no_trial_has_tried_have_their_place(tmp_path: Path) -> None:
    space = SPACE | {"lora.rank": {"choice": [4, 8, 16, 32]}}
    paths = plant(tmp_path / "s", 6, space=space)
    for trial in read_sweep(paths.root).trials():
        values = trial.config.varied | {"lora.rank": 32}
        config = read_sweep(paths.root).info.spec.trial_config(values)
        write_record(paths.trial(trial.trial_id).result, trial.model_copy(update={"config": config}))
    data = read_data(read_sweep(paths.root))
    layout = draw("effects", data, find_importances(data)).layout
    axis = next(each for each in (layout.xaxis, layout.xaxis2, layout.xaxis3) if each.type == "category")
    assert list(axis.categoryarray) == ["4", "8", "16", "32"]
    assert list(axis.range) == [-0.5, 3.5]


def test_importances_name_the_fields_that_move_along(tmp_path: Path) -> None:
    data = read_data(read_sweep(plant(tmp_path / "s", 12, tied={"lora.alpha": "2 * lora.rank"}).root))
    (trace,) = draw("importances", data, find_importances(data)).data
    assert set(trace.y) == {"training.learning_rate", "lora.rank (with lora.alpha)", "lora.dropout"}


def test_a_narrow_logarithmic_axis_has_ticks_to_read_values_by() -> None:
    """A loss from 4.1 to 11 had ticks at 5 and 10 alone."""
    for low, high in ((4.1, 11.0), (4.1, 4.9), (1.2, 3.0), (1e-4, 1e-1)):
        places, texts = log_ticks(low, high)
        assert 4 <= len(places) <= 10, (low, high)
        apart = [(after - before) / math.log10(high / low) for before, after in pairwise(places)]
        assert min(apart) > 0.09, "texts of ticks would overlap"
        assert places == sorted(places)
        assert len(set(texts)) == len(texts)
    assert log_ticks(2.0, 2.0)[1] == ["2"]


def test_fields_beyond_the_most_panels_are_named(data: SweepData, monkeypatch: pytest.MonkeyPatch) -> None:
    def notes() -> list[str]:
        return [str(each.text) for each in draw("effects", data, find_importances(data)).layout.annotations]

    assert not any("not drawn" in text for text in notes())
    monkeypatch.setattr("orchestrator.page.fields._MOST_PANELS", 2)
    assert "The first 2 fields; not drawn: lora.dropout" in notes()

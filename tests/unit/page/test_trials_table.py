"""The table of trials: the winner is marked, means over seeds are shown, and no difference contradicts them."""

from pathlib import Path
from statistics import fmean

import pytest
from planted import plant, plant_repeats

from orchestrator.analysis.sweep_data import SweepData, read_data
from orchestrator.analysis.verdict import find_verdict
from orchestrator.page.report import html_page, markdown_page
from orchestrator.page.trials_table import how_chosen, legend, trials_table
from orchestrator.record import read_sweep


@pytest.fixture
def repeated(tmp_path: Path) -> SweepData:
    """A sweep whose first trial loses over seeds."""
    paths = plant(tmp_path / "s", 4, stops=False, effect=0.0)
    plant_repeats(paths, 4, read_sweep(paths.root).trials()[0].trial_id, effect=0.0)
    return read_data(read_sweep(paths.root))


def test_the_winner_over_seeds_is_marked_and_its_choice_is_explained(repeated: SweepData) -> None:
    leader = repeated.leader
    assert leader is not None
    assert leader.trial_id != repeated.trials[0].trial_id
    shown = trials_table(repeated)
    assert shown.marked is not None
    assert shown.marked > 0
    assert shown.rows[shown.marked][1].text == f"{leader.trial_id} (winner)"
    assert sum("winner" in row[1].text for row in shown.rows) == 1
    sentence = how_chosen(repeated)
    assert sentence.startswith(
        f"The winner, {leader.trial_id}, has the best mean of eval/loss over seeds among the 4 finalists that ran again"
    )
    headline = find_verdict(repeated).headline
    values = repeated.over_seeds[leader.trial_id]
    assert headline == (
        f"{leader.trial_id} is the best of 4 trials: eval/loss {fmean(values):.4g}, mean over 2 seeds "
        f"({values[0]:.4g} with the first)."
    )
    page = html_page([repeated])
    assert sentence in page
    assert page.count("<tr class=winner>") == 1
    assert sentence[:30] in markdown_page([repeated])


def test_differences_agree_with_the_means_that_are_shown(repeated: SweepData) -> None:
    shown, seeds = trials_table(repeated), repeated.over_seeds
    mean_at, difference_at = (shown.columns.index(name) for name in ("mean over seeds", "difference from winner"))
    assert shown.marked is not None
    leader = shown.rows[shown.marked]
    assert leader[difference_at].text == "0"
    for row in shown.rows:
        values = seeds[str(row[1].key)]
        assert row[mean_at].text == f"{fmean(values):.4g} (2)"
        if row is not leader:
            assert float(row[mean_at].key) >= float(leader[mean_at].key)
            assert float(row[difference_at].key) == pytest.approx(float(row[mean_at].key) - float(leader[mean_at].key))
            assert row[difference_at].text.startswith("+")
            assert row[difference_at].text.endswith((" tied", " worse"))


def test_without_repeats_there_is_no_column_of_means(tmp_path: Path) -> None:
    data = read_data(read_sweep(plant(tmp_path / "s", 6).root))
    shown = trials_table(data)
    assert "mean over seeds" not in shown.columns
    assert how_chosen(data).endswith("has the best eval/loss among the trials that have finished.")
    assert "95% interval" in legend(data)
    assert how_chosen(read_data(read_sweep(plant(tmp_path / "one", 1).root))) == ""


def test_trials_that_were_not_compared_say_so(tmp_path: Path) -> None:
    paths = plant(tmp_path / "s", 6, failed=1)
    last = [trial for trial in read_sweep(paths.root).trials() if trial.best][-1]
    (read_sweep(paths.root).adapter_path(last) / "held_out.json").unlink()
    data = read_data(read_sweep(paths.root))
    shown = trials_table(data)
    at = shown.columns.index("difference from winner")
    texts = {str(row[1].key): row[at].text for row in shown.rows}
    assert texts.pop(last.trial_id) == "not compared"
    assert texts.pop("t005") == ""
    assert sorted(text.rpartition(" ")[2] for text in texts.values())[0] == "0"
    assert all(text == "0" or text.endswith((" tied", " worse")) for text in texts.values())
    assert "Not compared: no interval was computed, so whether the trial is worse cannot be said." in legend(data)


def test_searched_values_come_before_what_describes_the_run(tmp_path: Path) -> None:
    shown = trials_table(read_data(read_sweep(plant(tmp_path / "s", 6).root)))
    assert shown.columns[:8] == [
        "#", "trial", "state", "eval/loss", "difference from winner",
        "training.learning_rate", "lora.rank", "lora.dropout",
    ]  # fmt: skip


def test_standard_errors_of_metrics_are_not_listed_among_them(tmp_path: Path) -> None:
    data = read_data(read_sweep(plant(tmp_path / "s", 4, stops=False).root))
    assert data.leader is not None
    for trial in (*data.trials, data.leader):
        assert trial.best is not None
        trial.best.values.update({"eval/score": 0.5, "eval/score_stderr": 0.1})
    assert [name for name in trials_table(data).columns if "score" in name] == ["eval/score"]
    page = html_page([data])
    assert "eval/score 0.5" in page
    assert "score_stderr" not in page

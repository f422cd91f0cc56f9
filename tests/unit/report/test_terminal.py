"""Tables and the live view in real terminals of several sizes."""

from pathlib import Path

import pytest

from tests.unit.report.made_up import made_up_spec, made_up_trials
from tests.unit.report.terminal import SIZES, screens

MADE_UP = str(Path(__file__).with_name("made_up.py"))
SIX = ["64", "0.125", "0.000316", "0.01", "0.3", "0.03"]


def has_whole_summary(screen: list[str]) -> bool:
    """Return whether a frame is drawn to its end, and the pace was known when it was."""
    summary = "".join(screen).partition("trials ended")[2]
    return " left" in summary and "tokens/s" in summary


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_leaders_running_trials_and_the_summary_stay_if_there_are_more_trials_than_lines(
    columns: int, lines: int
) -> None:
    seen = screens([MADE_UP, "live", "96", "6"], columns, lines)
    (*_, shown) = [screen for screen in seen if has_whole_summary(screen)]  # others are half drawn
    text = "\n".join(shown)
    states = [trial.state for trial in made_up_trials(made_up_spec(), 96)]
    in_rows = [line for line in shown if line.startswith("5a91c_") and "FAILED at" not in line]
    assert in_rows[0].startswith("5a91c_00000")
    assert in_rows[1].startswith("5a91c_00001")
    num_running = sum(" RUNNING " in line for line in in_rows)
    assert num_running == min(states.count("RUNNING"), len(in_rows) - -(-len(in_rows) // 3))
    assert "64 of 100" not in text
    assert f"{96 - 16} of 100 trials ended (8 failed), 16 running, " in text
    assert " left" in text
    assert "best eval/loss 0.401 at step 1000 (5a91c_00000), train/loss 0.512, " in text
    assert " tokens/s" in text
    assert f"and {96 - len(in_rows)} more: " in text
    assert "…" not in text
    assert all(line == "" or len(line) <= columns for line in shown)


@pytest.mark.parametrize(("columns", "lines"), SIZES)
@pytest.mark.parametrize("num_axes", [0, 3, 6])
def test_no_metric_step_or_searched_value_is_cut(columns: int, lines: int, num_axes: int) -> None:
    shown = screens([MADE_UP, "table", "5", str(num_axes)], columns, lines)[-1]
    rows = [line.split() for line in shown if line.startswith("5a91c_")]
    assert len(rows) == 5
    for index, row in enumerate(rows):
        assert row[:3] == [f"5a91c_{index:05d}", "COMPLETE", f"{1500 + index}/2000"]
        assert row[3] == f"{0.4012 + index / 1000:.3g}"
        assert row[len(row) - num_axes :] == SIX[:num_axes]
    assert "…" not in "\n".join(shown)


def test_searched_values_follow_each_trial_on_lines_of_their_own_in_a_narrow_terminal() -> None:
    shown = screens([MADE_UP, "table", "2", "6"], 60, 24)[-1]
    first = next(index for index, line in enumerate(shown) if line.startswith("5a91c_00000"))
    assert shown[first].split()[2:5] == ["1500/2000", "0.401", "1000"]
    assert shown[first + 1 : first + 3] == [
        "  rank 64, dropout 0.125, learning_rate 0.000316,",
        "  weight_decay 0.01, max_grad_norm 0.3, warmup 0.03",
    ]
    assert shown[first + 3].startswith("5a91c_00001")


def test_an_interrupted_sweep_leaves_its_last_table_on_the_screen() -> None:
    shown = screens([MADE_UP, "interrupted", "5", "3"], 80, 24, code=130)[-1]
    assert [line[:11] for line in shown if line.startswith("5a91c_")] == [f"5a91c_{index:05d}" for index in range(5)]
    assert any("5 of 100 trials ended" in line for line in shown)
    ended = screens([MADE_UP, "live", "5", "3"], 80, 24)[-1]  # the command prints the final table itself
    assert [line for line in ended if line.startswith("5a91c_")] == []


def test_a_dumb_terminal_has_lines_with_times_instead_of_a_table() -> None:
    text = "\n".join(screens([MADE_UP, "live", "5", "3"], 160, 50, term="dumb")[-1])
    assert "trial  " not in text
    for index in range(5):
        assert f" 5a91c_{index:05d} COMPLETE step " in text
    times = [line[:8] for line in text.splitlines() if line]
    assert all(time[2] == time[5] == ":" and time.replace(":", "").isdigit() for time in times), text

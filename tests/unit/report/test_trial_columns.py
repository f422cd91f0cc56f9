"""The columns of trials: their order, and which of many trials are shown."""

from orchestrator.record import TrialState
from orchestrator.report.tables import axes_of, chosen
from orchestrator.report.trial_columns import lay_out, searched_names
from tests.unit.report.made_up import made_up_spec, made_up_trials


def test_the_columns_are_in_the_experiments_order_whatever_the_first_trial_has() -> None:
    spec = made_up_spec(3)
    first, second = made_up_trials(spec, 2)
    config = first.config.model_copy(update={"varied": {"training.learning_rate": 0.001}})
    without = first.model_copy(update={"config": config})
    for trials in ([without, second], [second, without]):
        heads = lay_out(trials, 200, axes_of(spec)).head[0].plain.split()
        assert heads[-3:] == ["rank", "dropout", "learning_rate"]
        assert [len(row) for row in lay_out(trials, 200, axes_of(spec)).rows] == [1, 1]


def test_two_axes_with_the_same_last_name_have_their_whole_names() -> None:
    (trial,) = made_up_trials(made_up_spec(3), 1)
    config = trial.config.model_copy(update={"varied": {"lora.rank": 1, "lora.patterns.q.rank": 2, "training.seed": 3}})
    names = searched_names([trial.model_copy(update={"config": config})], [])
    assert names == {"lora.rank": "rank", "lora.patterns.q.rank": "patterns.q.rank", "training.seed": "seed"}


def test_running_trials_take_the_rows_that_leaders_leave_and_leaders_those_that_they_leave() -> None:
    trials = made_up_trials(made_up_spec(), 30)
    running = [index for index, trial in enumerate(trials) if trial.state == TrialState.RUNNING]
    assert running == [18, 19, 20, 21]
    assert chosen(trials, 3) == {0, 18, 19}
    assert chosen(trials, 9) == {0, 1, 2, 18, 19, 20, 21, 3, 4}
    assert chosen(trials, 30) == set(range(30))

"""A signal during the generation of answers ends the trial at the next token, and nothing is lost."""

import signal
from collections.abc import Callable
from signal import Signals
from typing import Any

import pytest
from tiny import Witness

from orchestrator.record import SweepPaths, TrialState, read_metrics, read_sweep
from orchestrator.signals import Signalled
from orchestrator.spec import SweepSpec
from orchestrator.training.attempt import attempt
from orchestrator.training.local import resume_local_trial, run_local_trial
from orchestrator.training.questions import Questions

pytestmark = pytest.mark.slow

POLLS = 3
"""The signal arrives when a trial asks for the third time whether it is to end."""


class At(Witness):
    """Knows the last step."""

    step = 0

    def on_step(self, step: int, total_steps: int) -> bool:
        self.step = step
        return True


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[At, int], list[int]]:
    """Return a function that sends a signal during the answers of a step. It returns the steps of all polls."""

    def begin(witness: At, step: int) -> list[int]:
        polls: list[int] = []

        class Interrupted(Questions):
            def __init__(self, *values: Any) -> None:
                *others, is_stopping = values
                super().__init__(*others, lambda: self._poll(is_stopping))

            def _poll(self, is_stopping: Callable[[], bool]) -> bool:
                polls.append(witness.step)
                if polls.count(step) == POLLS:
                    signal.raise_signal(Signals.SIGTERM)
                return is_stopping()

        monkeypatch.setattr(attempt, "Questions", Interrupted)
        return polls

    return begin


@pytest.mark.parametrize("engine", ["fast", "trl"])
def test_a_signal_during_answers_ends_them_and_the_evaluation_is_made_after_the_resume(
    tiny: Callable[..., SweepSpec], folder: SweepPaths, engine: str, interrupt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric of the search needs answers at each evaluation: at step 4, at the last step; after training none."""
    common = [
        f"training.engine={engine}", "training.save_steps=null", "evaluation={metrics: [exact_match], rows: 8}",
        "evaluation.max_new_tokens=24", "training.steps=8", "lora.dropout=0.1", "data.max_rows=80",
    ]  # fmt: skip
    for metric, step in (("eval/exact_match", 4), ("eval/exact_match", 8), ("eval/loss", 8)):
        spec = tiny(*common, f"search.metric={metric}")
        name = f"{metric.rpartition('/')[2]}-{step}"
        whole, broken = (SweepPaths(folder.root.parent / f"{name}-{kind}") for kind in ("whole", "broken"))
        undisturbed = run_local_trial(spec, whole, Witness())
        assert undisturbed is not None
        witness = At()
        polls = interrupt(witness, step)
        with pytest.raises(Signalled):
            run_local_trial(spec, broken, witness)
        monkeypatch.setattr(attempt, "Questions", Questions)
        assert POLLS <= polls.count(step) <= POLLS + 3, "no token is generated after the signal"
        record = read_sweep(broken.root)
        (interrupted,) = record.trials()
        assert (interrupted.state, interrupted.step) == (TrialState.RUNNING, step)
        assert interrupted.checkpoint == f"checkpoints/checkpoint-{step}"
        assert interrupted.lacks_evaluation is (metric != "eval/loss")
        resumed = resume_local_trial(record, Witness())
        assert resumed is not None
        assert (resumed.state, resumed.lacks_evaluation) == (TrialState.COMPLETE, False)
        assert (resumed.best, resumed.tokens) == (undisturbed.best, undisturbed.tokens)
        curves = [
            [
                (each.step, each.values)
                for each in read_metrics(paths.trial(trial.trial_id))
                if "eval/loss" in each.values
            ]
            for paths, trial in ((whole, undisturbed), (broken, resumed))
        ]
        assert curves[0] == curves[1]

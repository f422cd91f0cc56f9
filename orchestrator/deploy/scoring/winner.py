"""Measure a sweep's winner on test rows, which no decision has seen."""

from orchestrator.data.prepare import load_test
from orchestrator.deploy.dtypes import DTYPES, default_dtype
from orchestrator.deploy.finished import FinishedSweep
from orchestrator.deploy.scoring.forms import open_form
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.record import SweepRecord, TestScore, write_record


def score_winner(record: SweepRecord) -> TestScore:
    """Score the recommended adapter on the rows of `data.test`, and write the result into the sweep's folder.

    Raises:
        RecordError: no trial has finished with an adapter, or the choice is in doubt.
        DataError: the sweep has no test rows.
        RequestError: the base cannot be loaded.
    """
    best = FinishedSweep(record).best()
    adapter, point = best.adapter_ref(), best.trial.best
    assert adapter.config is not None
    assert point is not None
    rows = load_test(record.paths.data)
    with open_form(adapter, "adapter", DTYPES[default_dtype(adapter.base)]) as opened:
        scores = score_rows(opened.model, rows, adapter.config.training.eval_batch_size)
    score = TestScore(trial_id=best.trial.trial_id, step=point.step, scores=scores, held_out=point.values)
    write_record(record.paths.test, score)
    return score

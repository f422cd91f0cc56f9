"""Row scores saved with the best adapter, and the choice of an adapter by them."""

import errno
import os
import shutil
from collections.abc import Callable

import pytest
from tiny import Witness

from orchestrator.adapters.bundle import read_scores, verify
from orchestrator.data import load
from orchestrator.deploy import open_sweep
from orchestrator.deploy.chat import open_chat
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.spec import SweepSpec
from orchestrator.training.local import run_local_trial

pytestmark = pytest.mark.slow

Tiny = Callable[..., SweepSpec]


@pytest.mark.parametrize("engine", ["fast", "trl"])
def test_the_best_adapter_contains_the_scores_of_each_row(tiny: Tiny, folder: SweepPaths, engine: str) -> None:
    """The scores equal those of plain transformers, in the order of the held-out rows, for any order of evaluation."""
    spec = tiny(
        f"training.engine={engine}",
        "training.group_by_length=true",  # changes the order of trl's evaluation
        "training.eval_batch_size=3",
        "search.metric=eval/exact_match",
        "evaluation.metrics=[exact_match]",
        "evaluation.rows=7",
        "evaluation.max_new_tokens=4",
        "base.compute_dtype=float32",
    )
    run_local_trial(spec, folder, Witness())
    best = open_sweep(folder.root).best()
    kept = read_scores(best.adapter)
    assert kept is not None
    held_out = load(folder.data).held_out
    plain = score_rows(open_chat(best.adapter_ref()).model, held_out, batch_size=8)
    assert kept.losses == pytest.approx(plain.losses, rel=1e-4, abs=1e-4)
    assert (kept.hits, kept.tokens) == (plain.hits, plain.tokens)
    assert len(set(plain.tokens)) > 1, "another order would show"
    assert best.trial.best is not None
    assert kept.loss == best.trial.best.values["eval/loss"]
    assert len(kept.metrics["exact_match"]) == 7
    assert sum(kept.metrics["exact_match"]) / 7 == best.trial.best.value


def test_answers_generated_after_training_are_saved_with_the_best_adapter(tiny: Tiny, folder: SweepPaths) -> None:
    """Record, row scores, manifest and card agree, and adapters are compared by these answers row by row."""
    run_local_trial(tiny("evaluation={metrics: [exact_match], rows: 12, max_new_tokens: 4}"), folder, Witness())
    best = open_sweep(folder.root).best("eval/exact_match")
    assert best.recommendation.why_not_compared is None
    assert best.trial.best is not None
    kept = read_scores(best.adapter)
    assert kept is not None
    assert len(kept.metrics["exact_match"]) == 12
    assert kept.values() == best.trial.best.values == verify(best.adapter).facts.metrics
    assert "name: eval/exact_match" in (best.adapter / "README.md").read_text()


def test_a_trial_whose_answers_cannot_be_saved_is_still_complete(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is on disk, and the record has the metric. (A full disk interrupts the trial: test_full_disk.)"""

    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    for module, operation in ((os, "link"), (shutil, "copy2")):
        monkeypatch.setattr(module, operation, fail)
    run_local_trial(tiny("evaluation={metrics: [exact_match], rows: 12, max_new_tokens: 4}"), folder, Witness())
    (trial,) = read_sweep(folder.root).trials()
    assert (trial.state, trial.error) == ("COMPLETE", None)
    (warning,) = trial.warnings
    assert "cannot be rewritten: [Errno 1] Operation not permitted" in warning
    assert trial.best is not None
    assert "eval/exact_match" in trial.best.values
    assert verify(folder.trial(trial.trial_id).root / trial.best.adapter).facts.metrics.keys() == {
        "eval/loss",
        "eval/token_accuracy",
    }

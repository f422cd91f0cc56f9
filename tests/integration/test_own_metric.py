"""Trials and sweeps that are compared by a user's own metric of generated answers."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from one_trial import curve
from tiny import DEMO, TINY, Witness

from orchestrator.adapters.bundle import read_scores
from orchestrator.deploy import FinishedSweep
from orchestrator.errors import RequestError, TrialError
from orchestrator.record import SweepPaths, TrialState, read_sweep
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.sweep import run_sweep
from orchestrator.training.local import resume_local_trial, run_local_trial

pytestmark = pytest.mark.slow

Tiny = Callable[..., SweepSpec]

DISTANCE = """
def distance(prompts, answers, references):
    assert all(prompts)
    return [abs(len(answer) - len(reference)) + (answer != reference) for answer, reference in zip(answers, references)]
"""
ASKED = [
    "evaluation.rows=12",
    "evaluation.max_new_tokens=6",
    "base.compute_dtype=float32",
    "search.mode=min",
    "lora.dropout=0",
]


@pytest.fixture
def metric(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(DISTANCE)
    return tmp_path / "own.py"


def asks(metric: Path) -> list[str]:
    return [f"evaluation.metrics=[exact_match, {metric}:distance]", "search.metric=eval/distance", *ASKED]


def test_both_engines_measure_the_same_at_each_evaluation_and_after_a_resume(
    tiny: Tiny, metric: Path, tmp_path: Path
) -> None:
    """The resumed trial scores its answers without the file: the sweep has its text."""
    fast, trl, resumed = (SweepPaths(tmp_path / name) for name in ("fast", "trl", "resumed"))
    for folder, engine in ((fast, "fast"), (trl, "trl")):
        run_local_trial(tiny(*asks(metric), f"training.engine={engine}"), folder, Witness())
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(tiny(*asks(metric), "training.engine=fast"), resumed, Witness(die_at=6))
    metric.unlink()
    assert resume_local_trial(read_sweep(resumed.root), Witness())
    names = ("eval/distance", "eval/distance_stderr", "eval/exact_match", "eval/exact_match_stderr")
    by_fast, by_trl, by_resumed = (
        [[values[name] for name in names] for _, values in curve(folder) if "eval/loss" in values]
        for folder in (fast, trl, resumed)
    )
    assert len(by_fast) == 3
    assert by_fast == by_trl == by_resumed
    assert len({values[0] for values in by_fast}) > 1, "the answers must change"
    (one,), (other,) = (read_sweep(folder.root).trials() for folder in (fast, resumed))
    assert one.best == other.best
    assert one.best is not None
    assert one.best.value == min(values[0] for values in by_fast)
    assert one.generated_tokens == other.generated_tokens
    assert 3 * 12 <= one.generated_tokens <= 3 * 12 * 6
    assert 0 < one.generation_s < one.seconds
    scores = read_scores(fast.trial(one.trial_id).root / one.best.adapter)
    assert scores is not None
    assert sum(scores.metrics["distance"]) / 12 == one.best.value


def test_a_sweep_searches_and_chooses_by_it(metric: Path, tmp_path: Path) -> None:
    overrides = [
        *(each for each in TINY if not each.startswith("evaluation.metrics")),
        *asks(metric),
        "search.algorithm=random",
        "search.num_trials=4",
        "search.space={training.learning_rate: {loguniform: [1e-5, 5e-3]}}",
        "scheduler={kind: median}",
        "resources.max_concurrent=2",
    ]
    record = run_sweep(load_spec(DEMO, overrides), SweepPaths(tmp_path / "sweep"), lambda _: None)
    (own,) = record.info.spec.evaluation.own
    assert own.sha256 == sha256(DISTANCE.encode()).hexdigest()
    assert (record.paths.metrics / "distance.py").read_text() == DISTANCE
    trials = record.trials()
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.STOPPED}
    best = FinishedSweep(record).best()
    choice = best.recommendation
    assert (choice.metric, choice.mode, choice.why_not_compared) == ("eval/distance", "min", None)
    assert choice.leader.value("eval/distance") == min(trial.best.value for trial in trials if trial.best)
    assert len(choice.rivals) == 3, "each is compared with the leader by the rows"


def test_a_metric_that_fails_on_an_answer_fails_the_trial_with_the_row(tiny: Tiny, tmp_path: Path) -> None:
    source = (
        "def strict(prompts, answers, references):\n    return [1 / (a == r) for a, r in zip(answers, references)]\n"
    )
    (tmp_path / "own.py").write_text(source)
    paths = SweepPaths(tmp_path / "run")
    settings = [f"evaluation.metrics=[{tmp_path / 'own.py'}:strict]", "search.metric=eval/strict", *ASKED]
    with pytest.raises(TrialError, match=r"strict of .*own\.py failed on row \d+ \(answer .*ZeroDivisionError.*line 2"):
        run_local_trial(tiny(*settings), paths, Witness())
    (trial,) = read_sweep(paths.root).trials()
    assert trial.failure == "infrastructure"


def test_a_metric_that_fails_on_a_right_answer_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def wrong(prompts, answers, references):\n    return answers\n")
    paths = SweepPaths(tmp_path / "run")
    with pytest.raises(RequestError, match=r"wrong of .* returned '.*' for row 0 .*, not a finite number \(tried"):
        run_local_trial(tiny(f"evaluation.metrics=[{tmp_path / 'own.py'}:wrong]", *ASKED[:2]), paths, Witness())
    assert not paths.root.exists()

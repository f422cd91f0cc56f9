"""Train one trial and read its curve, for tests of trials."""

from collections.abc import Callable

from tiny import Witness

from orchestrator.record import SweepPaths, TrialResult, read_metrics
from orchestrator.spec import SweepSpec
from orchestrator.training.local import run_local_trial

Tiny = Callable[..., SweepSpec]
"""The fixture `tiny`."""

ENGINES = ["fast", "trl"]


def run(spec: SweepSpec, folder: SweepPaths, witness: Witness | None = None) -> TrialResult:
    """Train the trial of an experiment to its end."""
    result = run_local_trial(spec, folder, witness or Witness())
    assert result is not None
    return result


def curve(folder: SweepPaths) -> list[tuple[int, dict[str, float]]]:
    """Return the recorded points of the only trial of a sweep: step, values."""
    (trial_id,) = folder.trial_ids()
    return [(point.step, point.values) for point in read_metrics(folder.trial(trial_id))]

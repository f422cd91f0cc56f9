"""The one owner of every path that a sweep leaves."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrialPaths:
    """Where one trial writes."""

    sweep: Path
    trial_id: str

    @property
    def root(self) -> Path:
        return self.sweep / "trials" / self.trial_id

    @property
    def config(self) -> Path:
        """TrialConfig: all that is needed to run this trial again."""
        return self.root / "trial.json"

    @property
    def metrics(self) -> Path:
        """One MetricPoint a line."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """TrialResult so far, rewritten at each evaluation and checkpoint."""
        return self.root / "progress.json"

    @property
    def result(self) -> Path:
        """TrialResult; exists when the trial has ended for good."""
        return self.root / "result.json"

    @property
    def log(self) -> Path:
        """What the libraries said."""
        return self.root / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """Trainer checkpoints to resume from; gone once there is a result."""
        return self.root / "checkpoints"

    @property
    def exploit_checkpoints(self) -> Path:
        """Checkpoints that Tune has saved, for other trials to go on from (PBT); gone when the sweep has ended."""
        return self.root / "exploit_checkpoints"

    @property
    def lease(self) -> Path:
        """Name of the lease by which a worker of a sweep trains it; whoever holds another one keeps off."""
        return self.root / ".lease"

    @property
    def paused(self) -> Path:
        """There while the scheduler has the trial wait for others: it holds no slot then."""
        return self.root / ".paused"

    @property
    def adapters(self) -> Path:
        """PEFT adapters."""
        return self.root / "adapters"

    def adapter(self, step: int) -> Path:
        """The one of a step; only the best is kept."""
        return self.adapters / f"step-{step}"

    @property
    def tensorboard(self) -> Path:
        return self.sweep / "tensorboard" / self.trial_id

    @property
    def mlflow(self) -> Path:
        """MLflow's store, of all trials of the sweep."""
        return self.sweep / "mlflow"

    @property
    def trackio(self) -> Path:
        """trackio's files, of all trials of the sweep."""
        return self.sweep / "trackio"


@dataclass(frozen=True)
class SweepPaths:
    """Where one sweep writes."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def sweep(self) -> Path:
        """SweepInfo: the resolved spec, versions, git commit, data fingerprint."""
        return self.root / "sweep.json"

    @property
    def data(self) -> Path:
        """Tokenised rows, shared by all trials."""
        return self.root / "data"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def tune(self) -> Path:
        """Ray Tune's own state, for `resume`; absent for a single trial."""
        return self.root / "tune"

    @property
    def tune_snapshot(self) -> Path:
        """The last whole state of Ray Tune: trials, searcher and scheduler."""
        return self.root / "tune-snapshot.zip"

    @property
    def decisions(self) -> Path:
        """One Decision of the scheduler a line."""
        return self.root / "decisions.jsonl"

    @property
    def budget(self) -> Path:
        """BudgetSpent; exists once the sweep has spent its budget."""
        return self.root / "budget.json"

    @property
    def first_step(self) -> Path:
        """Empty file; exists once a trial has made a step under the present driver."""
        return self.root / ".first-step"

    @property
    def workers(self) -> Path:
        """What the libraries said in a sweep's workers, a file for each process."""
        return self.root / "workers"

    @property
    def evaluations(self) -> Path:
        """Reports of `evaluate`, a file for each time."""
        return self.root / "evaluations"

    def trial(self, trial_id: str) -> TrialPaths:
        return TrialPaths(self.root, trial_id)

    def trial_ids(self) -> list[str]:
        """Trials that have a configuration on disk, oldest first."""
        found = (self.root / "trials").glob("*/trial.json")
        return [
            path.parent.name for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
        ]

"""Every path in a sweep's folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrialPaths:
    """Paths of one trial."""

    sweep: Path
    trial_id: str

    @property
    def root(self) -> Path:
        return self.sweep / "trials" / self.trial_id

    @property
    def config(self) -> Path:
        """TrialConfig: everything that is needed to run this trial again."""
        return self.root / "trial.json"

    @property
    def metrics(self) -> Path:
        """One MetricPoint per line."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """TrialResult so far, rewritten at each evaluation and checkpoint."""
        return self.root / "progress.json"

    @property
    def step(self) -> Path:
        """Steps made by now, rewritten every few seconds while no point is added to the metrics. Views read it."""
        return self.root / ".step"

    @property
    def result(self) -> Path:
        """Final TrialResult; exists once the trial has ended."""
        return self.root / "result.json"

    @property
    def log(self) -> Path:
        """Output of the libraries."""
        return self.root / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """Trainer checkpoints to resume from; removed once there is a result."""
        return self.root / "checkpoints"

    @property
    def exploit_checkpoints(self) -> Path:
        """Checkpoints saved by Tune, from which other trials may continue (PBT); removed at the end of the sweep."""
        return self.root / "exploit_checkpoints"

    @property
    def lease(self) -> Path:
        """Name of the lease under which a worker trains this trial; a worker with another lease must not write."""
        return self.root / ".lease"

    @property
    def paused(self) -> Path:
        """Exists while the scheduler lets the trial wait for others; the trial holds no slot then."""
        return self.root / ".paused"

    @property
    def pausing(self) -> Path:
        """Exists while somebody waits for the trial to pause: its next evaluation writes a checkpoint."""
        return self.root / ".pausing"

    @property
    def held(self) -> Path:
        """Exists while the trial is paused by request, from the pause until it goes on or ends."""
        return self.root / ".held"

    @property
    def added(self) -> Path:
        """AddedTrial; exists if the trial was added by a request."""
        return self.root / "added.json"

    @property
    def initial_adapter(self) -> Path:
        """The adapter with which a warm clone begins; absent for other trials."""
        return self.root / "initial_adapter"

    @property
    def adapters(self) -> Path:
        """PEFT adapters."""
        return self.root / "adapters"

    def adapter(self, step: int) -> Path:
        """The adapter of one step; only the best one is kept."""
        return self.adapters / f"step-{step}"

    @property
    def tensorboard(self) -> Path:
        return self.sweep / "tensorboard" / self.trial_id

    @property
    def mlflow(self) -> Path:
        """MLflow's store for all trials of the sweep."""
        return self.sweep / "mlflow"

    @property
    def trackio(self) -> Path:
        """trackio's files for all trials of the sweep."""
        return self.sweep / "trackio"


@dataclass(frozen=True)
class SweepPaths:
    """Paths of one sweep."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def sweep(self) -> Path:
        """SweepInfo: the resolved spec, versions, git commit, data fingerprint."""
        return self.root / "sweep.json"

    @property
    def sweep_copy(self) -> Path:
        """A copy of `sweep`, which is read if that is damaged."""
        return self.root / "sweep-copy.json"

    @property
    def data(self) -> Path:
        """Tokenized rows, shared by all trials."""
        return self.root / "data"

    @property
    def metrics(self) -> Path:
        """Copies of the files of the user's own metrics, to read; trials use the text in the spec."""
        return self.root / "metrics"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def tune(self) -> Path:
        """Ray Tune's own state, for `resume`; absent for a single trial."""
        return self.root / "tune"

    @property
    def tune_snapshot(self) -> Path:
        """The last complete state of Ray Tune: trials, searcher and scheduler."""
        return self.root / "tune-snapshot.zip"

    @property
    def tune_snapshot_before(self) -> Path:
        """The state before the last one, which is restored if that is damaged."""
        return self.root / "tune-snapshot-before.zip"

    @property
    def decisions(self) -> Path:
        """One Decision of the scheduler per line."""
        return self.root / "decisions.jsonl"

    @property
    def faults(self) -> Path:
        """One Fault per line: trials and workers that were lost or ended, and why."""
        return self.root / "faults.jsonl"

    @property
    def requests(self) -> Path:
        """Requests of people to the driver, and its answers, one file for each."""
        return self.root / "requests"

    @property
    def budget(self) -> Path:
        """BudgetSpent; exists once the sweep has spent its budget."""
        return self.root / "budget.json"

    @property
    def search_ended(self) -> Path:
        """SearchEnded; exists once the sweep has ended itself (`search.stop`)."""
        return self.root / "search-ended.json"

    @property
    def absent(self) -> Path:
        """AbsentAdapters; exists once `orchestrator clean` has removed an adapter."""
        return self.root / "absent.json"

    @property
    def pulled(self) -> Path:
        """Pulled; exists in a copy that was pulled from an object store."""
        return self.root / ".pulled.json"

    @property
    def first_step(self) -> Path:
        """Empty file; exists once a trial has made a step under the present driver."""
        return self.root / ".first-step"

    @property
    def driver(self) -> Path:
        """DriverInfo; exists while a driver runs, which touches it every few seconds."""
        return self.root / ".driver.json"

    @property
    def driver_lock(self) -> Path:
        """Locked by the driver. Whoever can lock it is the only driver."""
        return self.root / ".driver.lock"

    @property
    def workers(self) -> Path:
        """Output of the libraries in the sweep's workers, one file for each process."""
        return self.root / "workers"

    @property
    def test(self) -> Path:
        """TestScore of the winner; exists once it was measured on the rows of `data.test`."""
        return self.root / "test.json"

    @property
    def answers(self) -> Path:
        """Answers of the base and of the recommended adapter to the same held-out prompts, if they were recorded."""
        return self.root / "answers.json"

    @property
    def evaluations(self) -> Path:
        """Reports of `evaluate`, one file for each run."""
        return self.root / "evaluations"

    @property
    def repeats(self) -> Path:
        """Folder of a sweep of its own: the finalists with other seeds (`search.repeats`)."""
        return self.root / "repeats"

    @property
    def audits(self) -> Path:
        """Folders of sweeps of their own: stopped trials that ran to their end (`orchestrator audit`)."""
        return self.root / "audit"

    def trial(self, trial_id: str) -> TrialPaths:
        return TrialPaths(self.root, trial_id)

    def trial_ids(self) -> list[str]:
        """Return the trials that have a configuration on disk, oldest first."""
        found = (self.root / "trials").glob("*/trial.json")
        return [
            path.parent.name for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
        ]

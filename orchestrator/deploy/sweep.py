"""A sweep as those see it who want its adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import RecordError
from orchestrator.record import SweepRecord, TrialResult, read_sweep


@dataclass(frozen=True)
class Best:
    """The trial that was chosen, and where its adapter lies."""

    record: SweepRecord
    trial: TrialResult
    adapter: Path
    num_compared: int
    """Finished trials it was compared with, itself included."""

    def as_dict(self) -> dict[str, Any]:
        """The answer to "which adapter, and why", as plain JSON values; `config` has dotted fields."""
        trial, best = self.trial, self.trial.best
        assert best is not None
        return {
            "sweep": self.record.paths.name,
            "trial_id": trial.trial_id,
            "state": trial.state,
            "metric": trial.metric,
            "mode": trial.mode,
            "value": best.value,
            "step": best.step,
            "values": best.values,
            "num_compared": self.num_compared,
            "config": trial.config.dotted(),
            "varied": trial.config.varied,
            "adapter": str(self.adapter),
            "base": trial.config.base.model,
            "data_fingerprint": trial.data_fingerprint,
        }


@dataclass(frozen=True)
class Sweep:
    """A sweep and what came of it."""

    record: SweepRecord

    def trials(self) -> list[TrialResult]:
        """All trials, best first; those without an evaluation last."""
        return self.record.trials()

    def best(self) -> Best:
        """The finished trial (COMPLETE or STOPPED) with the best evaluation, and the adapter of that step.

        Raises:
            RecordError: no trial has finished with an adapter.
        """
        root, finished = self.record.paths.root, self.record.finished()
        if not finished:
            raise RecordError(
                f"{root}: no trial has finished with an evaluation yet",
                f"`orchestrator status {root}` shows where the trials are.",
            )
        return Best(self.record, finished[0], self.record.adapter(finished[0]), len(finished))


def open_sweep(sweep: str | Path, output: str | Path = "runs") -> Sweep:
    """Open a sweep by its folder, or by its name under `output`.

    Raises:
        RecordError: there is no such sweep, or its record cannot be read.
    """
    return Sweep(read_sweep(sweep, output))

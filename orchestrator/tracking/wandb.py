"""Weights & Biases: group = sweep, id = trial, so that a resumed trial goes on in its own run."""

import os

import wandb

from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.tracking.protocol import TrialIdentity


class WandbTracker:
    """One run a trial, online or offline. Never asks a question."""

    name = "W&B"

    def __init__(self, identity: TrialIdentity) -> None:
        section = identity.tracking.wandb
        mode = section.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            group=identity.group,
            id=identity.paths.trial_id,
            name=identity.paths.trial_id,
            config=identity.config.dotted(),
            dir=str(identity.paths.sweep),
            mode=mode,
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def log(self, point: MetricPoint) -> None:
        self._run.log({**point.values, "progress/tokens": point.tokens, "progress/step": point.step}, step=point.step)

    def finish(self, result: TrialResult) -> None:
        summary = result.model_dump(
            mode="json", include={"state", "tokens_per_second", "gpu_seconds", "peak_memory_gib"}
        )
        if result.best:
            summary |= {f"best/{name}": value for name, value in result.best.values.items()}
            summary["best/step"] = result.best.step
        self._run.summary.update(summary)
        self._run.finish(exit_code=1 if result.state == TrialState.FAILED else 0)

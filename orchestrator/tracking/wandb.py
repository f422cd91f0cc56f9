"""Weights & Biases tracker. A sweep is a group, and a run's id is the trial's id; a resumed trial continues its run."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import wandb

from orchestrator.errors import RequestError
from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.spec.sections.records import WandbSection
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.tracking.secrets import hide_secrets, reason

_ANSWER_S = 10
"""Seconds to wait for the server's answer before the first trial."""

_INIT_S = 15.0
_FINISH_S = 30.0
"""Seconds that a run may take to start and to be sent at its end. W&B's defaults are 90 and no limit."""

_END_S = 5.0
"""Seconds to wait for W&B's service to end once nothing is left to be sent."""


class WandbTracker:
    """Records a trial as a run, online or offline. Never prompts the user."""

    name = "W&B"

    def __init__(self, identity: TrialIdentity) -> None:
        section, trial_id = identity.tracking.wandb, identity.paths.trial_id
        self._is_online = is_online(section)
        self._has_offline_runs = any(identity.paths.sweep.glob(f"wandb/offline-run-*-{trial_id}*"))
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            init_timeout=_INIT_S,
            finish_timeout=_FINISH_S,
            finish_timeout_raises=True,
        )
        with _leaving_no_run():
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                group=identity.group,
                id=trial_id,
                name=trial_id,
                config=identity.config.dotted(),
                dir=str(identity.paths.sweep),
                mode="online" if self._is_online else "offline",
                resume="allow",
                reinit="finish_previous",
                settings=settings,
            )

    def replay(self, points: Sequence[MetricPoint]) -> None:
        if not self._is_online and self._has_offline_runs:  # an earlier attempt has written these points
            return
        for point in points:
            if point.step >= self._run.starting_step:  # the server has the earlier points
                self.log(point)

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
        with _leaving_no_run():
            self._run.finish(exit_code=1 if result.state == TrialState.FAILED else 0)


@contextmanager
def _leaving_no_run() -> Iterator[None]:
    """End W&B's service in this process on an error. Otherwise it would refuse to start the same run id again."""
    try:
        yield
    except Exception:
        _end_service()
        raise


def _end_service() -> None:
    """End W&B's service in this process.

    `wandb.teardown` waits without a limit for the service, and the service waits for its last request. With wandb
    0.31.0 and a server that accepts connections but never answers, this sometimes never ends. The service is then
    killed; no run needs it any more.
    """
    connection = wandb.setup()._connection
    service = connection._proc if connection else None  # also None if another process has started the service
    if service is None:
        wandb.teardown()
        return
    timer = threading.Timer(_END_S, service._process.kill)
    timer.start()
    try:
        with suppress(SystemExit):  # raised if the service ended with an error
            wandb.teardown()
    finally:
        timer.cancel()


def is_online(section: WandbSection) -> bool:
    """Return whether runs are sent to a server. Mode `auto` sends them if there is a key."""
    return section.mode == "online" or (section.mode == "auto" and bool(os.environ.get("WANDB_API_KEY")))


def wandb_fault() -> RequestError | None:
    """Return why W&B's server cannot be used, or None if it can."""
    offline = "set tracking.wandb.mode: offline and upload the runs later with `wandb sync`"
    server = hide_secrets(str(wandb.setup().settings.base_url))
    try:
        wandb.Api(timeout=_ANSWER_S)
    except wandb.errors.UsageError:
        return RequestError(
            "tracking.wandb.mode: online needs an API key, and there is none",
            f"Set WANDB_API_KEY or run `wandb login`; or {offline}.",
        )
    except wandb.errors.Error as error:
        if "did not respond in time" in str(error):  # the service's message for a server that it cannot reach
            return RequestError(
                f"tracking.wandb: {server} does not answer within {_ANSWER_S} s",
                f"Try again later; or {offline}.",
            )
        return RequestError(
            f"tracking.wandb: {server} rejects the API key: {reason(error)}",
            f"Set another one in WANDB_API_KEY or run `wandb login --relogin`; or {offline}.",
        )
    finally:
        _end_service()  # otherwise processes of trials inherit this service, and failed runs would stay open in it
    return None

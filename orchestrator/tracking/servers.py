"""Check before the first trial that the trackers' servers can be reached and accept the credentials."""

from orchestrator.errors import RequestError
from orchestrator.spec.sections import TrackingSection


def require_servers(tracking: TrackingSection) -> None:
    """Check the servers of the requested trackers.

    Raises:
        RequestError: a server does not answer or rejects the credentials.
    """
    for fault in server_faults(tracking):
        raise fault


def server_faults(tracking: TrackingSection) -> list[RequestError]:
    """Return why servers of the requested trackers cannot be used, as errors with a remedy each.

    The check takes at most a few seconds for each server. A tracker without a server is not checked.
    """
    faults: list[RequestError | None] = []
    if tracking.wandb.mode in ("auto", "online"):
        from orchestrator.tracking.wandb import is_online, wandb_fault

        faults.append(wandb_fault() if is_online(tracking.wandb) else None)
    if tracking.mlflow:
        from orchestrator.tracking.mlflow import mlflow_fault

        faults.append(mlflow_fault())
    if tracking.trackio:
        from orchestrator.tracking.trackio import trackio_fault

        faults.append(trackio_fault())
    return [fault for fault in faults if fault is not None]

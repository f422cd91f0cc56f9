"""Ask the trackers' servers, once and before the first trial, whether they answer and take the key."""

from orchestrator.errors import RequestError
from orchestrator.spec.sections import TrackingSection


def require_servers(tracking: TrackingSection) -> None:
    """Ask the servers of the wanted trackers.

    Raises:
        RequestError: one of them does not answer, or does not take the key.
    """
    for fault in server_faults(tracking):
        raise fault


def server_faults(tracking: TrackingSection) -> list[RequestError]:
    """What keeps the wanted trackers' servers from taking this sweep, each fault with its remedy.

    Takes a few seconds at most for each server. A tracker without a server is not asked.
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

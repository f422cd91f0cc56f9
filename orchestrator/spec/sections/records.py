"""The tracking and output sections: where records and their views go."""

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.spec.sections.section import NAME_PATTERN, Section


class WandbSection(Section):
    """Weights & Biases: group = sweep, one run a trial."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where WANDB_API_KEY is set, else offline."""
    project: str = "orchestrator"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""


class TrackingSection(Section):
    """Views of the records. The records themselves are always written."""

    tensorboard: bool = True
    """Write TensorBoard event files with hparams."""
    wandb: WandbSection = WandbSection()
    """Weights & Biases."""
    mlflow: bool = False
    """Write to MLflow: the server in MLFLOW_TRACKING_URI, else a store in the sweep's folder (extra mlflow)."""
    trackio: bool = False
    """Write to trackio: files in TRACKIO_DIR, else in the sweep's folder (extra trackio)."""


class OutputSection(Section):
    """Where the sweep's folder goes."""

    folder: Annotated[str, Field(min_length=1)] = "runs"
    """Holds one folder a sweep; on a cluster, shared by all nodes. `--output` overrides it."""
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Folder of this sweep; default the file's name and the time. `--name` overrides it."""

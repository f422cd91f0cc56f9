"""The tracking and output sections: trackers, and the folder of the sweep."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from orchestrator.spec.output_uri import is_uri, uri_fault
from orchestrator.spec.sections.section import NAME_PATTERN, Section


class WandbSection(Section):
    """Weights & Biases: one group for the sweep, one run for each trial."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online if WANDB_API_KEY is set, and offline otherwise."""
    project: str = "orchestrator"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""


class TrackingSection(Section):
    """Trackers that show the sweep's records. The records themselves are always written."""

    tensorboard: bool = True
    """Write TensorBoard event files with hparams."""
    wandb: WandbSection = WandbSection()
    """Weights & Biases."""
    mlflow: bool = False
    """Write to MLflow: to the server in MLFLOW_TRACKING_URI, or to a store in the sweep's folder (extra mlflow)."""
    trackio: bool = False
    """Write to trackio: to files in TRACKIO_DIR, or in the sweep's folder (extra trackio)."""


def _checked_folder(folder: str) -> str:
    """Check that an output is a folder or a URI that is supported."""
    if is_uri(folder) and (fault := uri_fault(folder)):
        raise ValueError(fault)
    return folder


class OutputSection(Section):
    """The folder of the sweep."""

    folder: Annotated[str, Field(min_length=1), AfterValidator(_checked_folder)] = "runs"
    """Folder that holds one folder for each sweep, or a URI: s3://, gs:// or az://, then BUCKET/FOLDER. On a cluster,
    all nodes must share the folder. `--output` overrides it."""
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Name of this sweep's folder. Default: the experiment file's name and the time. `--name` overrides it."""

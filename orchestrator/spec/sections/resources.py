"""The resources section: what trials take of the cluster."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section


class ResourcesSection(Section):
    """What trials take of the cluster. They train in workers: processes that hold the base, one a GPU."""

    gpus_per_trial: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs of a worker; auto is one where the cluster has any, else none. A trial may have several."""
    cpus_per_trial: PositiveInt = 1
    """CPU cores of a worker, and its threads where it has no GPU."""
    trials_per_gpu: PositiveInt | Literal["auto"] = "auto"
    """Trials that train together in a worker; auto is what memory allows where there are more trials than workers."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; default as many as fit."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of a trial whose worker died; each goes on from the last checkpoint."""

    @model_validator(mode="after")
    def _whole_gpus_are_not_shared(self) -> Self:
        if self.gpus_per_trial not in ("auto", 0, 1) and self.trials_per_gpu not in ("auto", 1):
            raise ValueError(
                f"trials_per_gpu={self.trials_per_gpu} shares one GPU, but gpus_per_trial={self.gpus_per_trial}"
            )
        return self

"""The resources section: what trials use of the cluster."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section


class ResourcesSection(Section):
    """What trials use of the cluster. They train in workers: processes that hold the base, one for each GPU."""

    gpus_per_trial: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs of a worker. auto is one if the cluster has any, else none. A trial may use several."""
    cpus_per_trial: PositiveInt = 1
    """CPU cores of a worker; also its number of threads if it has no GPU."""
    trials_per_gpu: PositiveInt | Literal["auto"] = "auto"
    """Trials that train together in one worker. auto: as many as memory allows, if there are more trials than
    workers."""
    max_concurrent: PositiveInt | None = None
    """Maximum number of trials at a time. Default: as many as fit."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of a trial whose worker died; each continues from the last checkpoint."""

    @model_validator(mode="after")
    def _whole_gpus_are_not_shared(self) -> Self:
        if self.gpus_per_trial not in ("auto", 0, 1) and self.trials_per_gpu not in ("auto", 1):
            raise ValueError(
                f"trials_per_gpu={self.trials_per_gpu} shares one GPU, but gpus_per_trial={self.gpus_per_trial}"
            )
        return self

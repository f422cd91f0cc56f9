"""The resources section: what trials use of the cluster."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section


class ResourcesSection(Section):
    """What trials use of the cluster. They train in workers: processes that hold the base, one for each GPU."""

    gpus_per_trial: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs over which a base is spread. auto is one if the cluster has any, else none. With several,
    strategy says how they share it."""
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    """Kind of GPU by Ray's name, such as H100 or A100-80G (`ray.util.accelerators`); no other kind is used. Default:
    any kind that the cluster has."""
    strategy: Literal["auto", "shard", "pipeline"] = "auto"
    """How several GPUs share a base. shard: each GPU holds a piece of every layer and trains its own trials; layers
    are gathered when they are used. It needs the fast engine. pipeline: each GPU holds some of the layers, and a
    trial goes through them, so one GPU works at a time; trl only. auto: shard if training.engine is fast, else
    pipeline."""
    cpus_per_trial: PositiveInt = 1
    """CPU cores of a worker; also its number of threads if it has no GPU."""
    trials_per_gpu: PositiveInt | Literal["auto"] = "auto"
    """Trials that train together in one worker. auto: as many as memory allows, if there are more trials than
    workers. Under shard, each GPU has a worker."""
    max_concurrent: PositiveInt | None = None
    """Maximum number of trials at a time. Default: as many as fit."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of a trial after an error of its training without a new checkpoint since the last one. Each restart
    continues from the last checkpoint."""
    max_restarts: Annotated[int, Field(ge=0)] = 8
    """Restarts in a row of a trial without a new checkpoint, or of a worker without a step, after faults of the
    infrastructure: a lost process or node, short host memory. They do not count as failures."""
    hang_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Minutes without a step, a pass of an evaluation or a token of an answer after which a worker is ended and its
    trials continue elsewhere; at least 30 before its first step. auto: 20 times the longest pause so far, at least 10
    minutes, and 30 before its first evaluation."""

    @property
    def has_several_gpus(self) -> bool:
        """Whether a base is spread over more than one GPU."""
        return self.gpus_per_trial not in ("auto", 0, 1)

    @model_validator(mode="after")
    def _accelerator_fits(self) -> Self:
        if self.accelerator is not None and self.gpus_per_trial == 0:
            raise ValueError(f"accelerator={self.accelerator} names a kind of GPU, but gpus_per_trial=0")
        return self

    @model_validator(mode="after")
    def _strategy_fits(self) -> Self:
        if self.strategy != "auto" and not self.has_several_gpus:
            raise ValueError(
                f"strategy={self.strategy} says how several GPUs share a base, but gpus_per_trial={self.gpus_per_trial}"
            )
        if self.has_several_gpus and self.strategy != "shard" and self.trials_per_gpu not in ("auto", 1):
            raise ValueError(
                f"trials_per_gpu={self.trials_per_gpu} shares one GPU, but gpus_per_trial={self.gpus_per_trial}; "
                "with strategy=shard each GPU can hold several trials"
            )
        return self

"""The scheduler section: who is stopped early."""

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.spec.sections.section import PositiveInt, Section


class SchedulerSection(Section):
    """Which trials are stopped early. Time is counted in optimizer steps."""

    kind: Literal["none", "asha", "median"] = "none"
    """asha (arXiv 1810.05934), the median stopping rule (Vizier, KDD 2017), or none."""
    grace_steps: PositiveInt | None = None
    """No trial is stopped before this step, which is also asha's first rung; default eval_steps."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha: one in so many trials passes a rung; rungs lie at grace_steps times its powers."""
    min_trials: PositiveInt = 3
    """median: trials to compare with before any is stopped."""

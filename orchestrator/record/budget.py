"""A sweep's budget, once it is spent."""

from typing import Literal

from orchestrator.record.models import Record


class BudgetSpent(Record):
    """Which limit was reached first."""

    limit: Literal["wall_clock_hours", "gpu_hours", "tokens"]
    """Field of search.budget."""
    allowed: float
    """Its value."""
    spent: float
    """When it was seen to be reached."""

    def __str__(self) -> str:
        unit = {"wall_clock_hours": "hours", "gpu_hours": "GPU-hours", "tokens": "tokens"}[self.limit]
        spent, allowed = (f"{x:,.0f}" if self.limit == "tokens" else f"{x:.4g}" for x in (self.spent, self.allowed))
        return f"the budget is spent: {spent} of {allowed} {unit}"

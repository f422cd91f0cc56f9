"""The record of a budget that is spent."""

from typing import Literal

from orchestrator.record.models import Record


class BudgetSpent(Record):
    """The limit of search.budget that was reached first."""

    limit: Literal["wall_clock_hours", "gpu_hours", "tokens"]
    """Name of the limit."""
    allowed: float
    """Value of the limit."""
    spent: float
    """Amount that was spent when the limit was found to be reached."""

    def __str__(self) -> str:
        unit = {"wall_clock_hours": "hours", "gpu_hours": "GPU-hours", "tokens": "tokens"}[self.limit]
        spent, allowed = (f"{x:,.0f}" if self.limit == "tokens" else f"{x:.4g}" for x in (self.spent, self.allowed))
        return f"the budget is spent: {spent} of {allowed} {unit}"

"""Properties of each kind of scheduler: whether trials take turns, and whether their reports need an order.

A new kind of scheduler must be added to both functions; mypy reports a missing one.
"""

from typing import assert_never

from orchestrator.spec.sections.scheduler import (
    AshaScheduler,
    BohbScheduler,
    ForecastScheduler,
    HyperBandScheduler,
    MedianScheduler,
    NoScheduler,
    Pb2Scheduler,
    PbtScheduler,
    SchedulerSection,
)


def trials_take_turns(scheduler: SchedulerSection) -> bool:
    """Return whether trials pause and resume, so that more trials are active than there are slots."""
    match scheduler:
        case HyperBandScheduler() | BohbScheduler() | PbtScheduler() | Pb2Scheduler():
            return True
        case NoScheduler() | AshaScheduler() | MedianScheduler() | ForecastScheduler():
            return False
        case _:
            assert_never(scheduler)


def reports_need_order(scheduler: SchedulerSection) -> bool:
    """Return whether the scheduler compares a report with earlier ones, so that their order changes its decisions."""
    match scheduler:
        case AshaScheduler() | MedianScheduler() | ForecastScheduler():
            return True
        case NoScheduler() | HyperBandScheduler() | BohbScheduler() | PbtScheduler() | Pb2Scheduler():
            return False
        case _:
            assert_never(scheduler)

"""Points that are dropped before their trial begins, because they cannot fit into memory (`search.skip_unfit`)."""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import SweepError
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.sweep.search.space import Point
from orchestrator.words import counted

MAX_DROPPED = 100
"""Points that may be dropped one after another before the sweep gives up."""


@dataclass(frozen=True)
class Dropped:
    """A point that was drawn and dropped."""

    trial_id: str
    """Name that its trial would have had."""
    why: str


def point_check(spec: SweepSpec, unfit_reason: Callable[[TrialConfig], str | None]) -> Callable[[Point], str | None]:
    """Return a function that returns why a point cannot fit into memory, with its values; None where it may fit.

    Args:
        spec: the experiment.
        unfit_reason: the same for a trial's configuration.
    """

    def check(point: Point) -> str | None:
        config = spec.trial_config(point)
        reason = unfit_reason(config)
        values = ", ".join(f"{path} {value}" for path, value in config.varied.items())
        return None if reason is None else f"{values}: {reason}"

    return check


def nothing_fits(number: int, last: str) -> SweepError:
    """Return the error of a search that finds no point that fits.

    Args:
        number: of points that were dropped.
        last: why the last one was.
    """
    return SweepError(
        f"search.skip_unfit: {counted(number, 'point')} cannot fit into GPU memory, and no other was found; the last "
        f"one: {last}",
        "Take large values out of search, lower data.max_length, or use a larger GPU.",
    )

"""The figures of a sweep, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from orchestrator.analysis.importance import Importances
from orchestrator.analysis.sweep_data import SweepData
from orchestrator.errors import RequestError
from orchestrator.page import curves, fields, machines

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Drawn:
    """A figure of the page."""

    name: str
    title: str
    note: str
    """How to read it, in one or two sentences."""
    draw: "Callable[[SweepData, Importances], Figure | str]"
    """Returns the figure, or why there is nothing to draw."""


FIGURES: Final = (
    Drawn(
        "curves",
        "Learning curves",
        "The best trials in color, all others in gray; a dot marks the best evaluation.",
        lambda data, _: curves.learning_curves(data),
    ),
    Drawn(
        "rungs",
        "Who went on, and who was stopped",
        "The value of each trial at each evaluation where trials were compared. Hover over a point for the reason.",
        lambda data, _: curves.rungs(data),
    ),
    Drawn(
        "parallel",
        "All values together",
        "One line for each trial. In color: trained to the end, blue is best. In gray: stopped early or not ended, at "
        "the best value until then. Drag along an axis to keep only the lines that cross there.",
        lambda data, found: fields.parallel(data, found.outcomes),
    ),
    Drawn(
        "importances",
        "How much each field mattered",
        "Share of the importance (PED-ANOVA) with its 95% bootstrap interval. A full bar is an effect that chance does "
        "not explain; a pale one could be chance.",
        lambda data, found: fields.importances(data, found),
    ),
    Drawn(
        "effects",
        "Each field against the outcome",
        "Filled, blue: trained to the end. Hollow, gray: stopped early or not ended, at the best value until then, "
        "which does not show what the end would have been.",
        lambda data, found: fields.effects(data, found),
    ),
    Drawn(
        "timeline",
        "What ran when, and where",
        "One row for each trial that a worker process trains at a time; each bar is a trial. Hatched (repeat): a "
        "finalist again, with another seed.",
        lambda data, _: machines.timeline(data),
    ),
    Drawn(
        "machines",
        "Throughput and memory",
        "Tokens trained per second, and peak memory, of each trial.",
        lambda data, _: machines.throughput_and_memory(data),
    ),
)


def draw(name: str, data: SweepData, found: Importances) -> "Figure":
    """Return a figure by its name.

    Raises:
        RequestError: there is no such figure, or the sweep has nothing to draw in it.
    """
    figure = next((each for each in FIGURES if each.name == name), None)
    if figure is None:
        names = ", ".join(each.name for each in FIGURES)
        raise RequestError(f"figure {name!r}: is unknown; choose from {names}")
    drawn = figure.draw(data, found)
    if isinstance(drawn, str):
        raise RequestError(f"figure {name}: there is nothing to draw: {drawn}")
    drawn.update_layout(title=figure.title, height=figure_height(drawn))
    return drawn


def figure_height(figure: "Figure") -> int:
    """Return the height of a figure, in pixels."""
    return int(figure.layout.height or 420)

"""Figures of the searched fields: parallel coordinates, importances, and each field against the outcome."""

import math
import textwrap
from typing import TYPE_CHECKING, Any, Final

from orchestrator.analysis.coverage import moves_with
from orchestrator.analysis.effects import coordinate_of
from orchestrator.analysis.importance import Importances
from orchestrator.analysis.outcomes import Outcome, Outcomes
from orchestrator.analysis.sweep_data import SweepData, value_of
from orchestrator.analysis.wording import say_effect, say_short
from orchestrator.page.style import BLUE, GRAY, SCALE, log_axis, log_ticks, plain
from orchestrator.record import TrialState
from orchestrator.spec.search import LOSS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST_PANELS: Final = 12


def parallel(data: SweepData, outcomes: Outcomes) -> "Figure | str":
    """Return parallel coordinates: one axis for each searched field and one for the outcome."""
    import plotly.graph_objects as go

    fields, known = data.fields(), outcomes.known
    if not fields:
        return "no field was searched"
    if len(known) < 2:
        return f"{len(known)} of the trials have a value"
    dimensions = [_dimension(data, name, known) for name in fields]
    values = [measured(each) for each in known]
    is_log = data.metric == LOSS and min(values) > 0
    shown = [math.log10(value) if is_log else value for value in values]
    last: dict[str, Any] = {"label": plain(data.metric), "values": shown}
    if is_log:
        last["tickvals"], last["ticktext"] = log_ticks(min(values), max(values))
    figure = go.Figure(
        go.Parcoords(
            dimensions=[*dimensions, last],
            line=_line_colors([data.sign * each for each in shown], [is_at_end(each) for each in known]),
            labelangle=-12 if len(fields) > 4 else 0,
        )
    )
    figure.update_layout(height=440, margin={"l": 70, "r": 70, "t": 90, "b": 30})
    return figure


def is_at_end(outcome: Outcome) -> bool:
    """Return whether the trial has made all its steps, so that its value is that of its end."""
    return outcome.trial.state == TrialState.COMPLETE


def measured(outcome: Outcome) -> float:
    """Return the best value that the trial itself has reached, never a forecast."""
    value = value_of(outcome.trial)
    return outcome.value if value is None else value


def _line_colors(costs: list[float], at_end: list[bool]) -> dict[str, Any]:
    """Return colors of lines: from the best value at an end (0) to the worst (1), and gray (-1) for all others."""
    ends = [cost for cost, is_end in zip(costs, at_end, strict=True) if is_end]
    low, width = min(ends, default=0.0), (max(ends) - min(ends) if ends else 0.0) or 1.0
    color = [(cost - low) / width if is_end else -1.0 for cost, is_end in zip(costs, at_end, strict=True)]
    scale = [(0.0, GRAY), (0.45, GRAY), *((0.5 + place / 2, each) for place, each in SCALE)]
    return {"color": color, "colorscale": scale, "cmin": -1, "cmax": 1}


def _dimension(data: SweepData, name: str, known: list[Outcome]) -> dict[str, Any]:
    """Return an axis: logarithmic for a logarithmic range, places for listed values, one more place for none."""
    axis = data.info.spec.search.space[name]
    coordinate = coordinate_of(axis)
    given = [each.trial.config.varied.get(name) for each in known]
    exists = [name in each.trial.config.varied for each in known]
    label = plain(name)
    if coordinate.values:
        texts = [plain(say_short(value)) for value in coordinate.values]
        places = {repr(value): place for place, value in enumerate(coordinate.values)}
        at = [places.get(repr(v), -1) if has else -1 for v, has in zip(given, exists, strict=True)]
        first = min([0, *at])
        ticks = list(range(first, len(texts)))
        return {"label": label, "values": at, "tickvals": ticks, "ticktext": (["none"] if first else []) + texts,
                "range": [first, max(len(texts) - 1, first + 1)]}  # fmt: skip
    low, high = (float(value) for value in axis.probes())
    numbers = [float(value) if has and value is not None else low for value, has in zip(given, exists, strict=True)]
    if not coordinate.is_log:
        return {"label": label, "values": numbers, "range": [low, high]}
    powers, texts = log_ticks(low, high)
    inside = [math.log10(low), math.log10(high)]
    return {"label": label, "values": [math.log10(x) for x in numbers], "tickvals": powers, "ticktext": texts,
            "range": inside}  # fmt: skip


def importances(data: SweepData, found: Importances) -> "Figure | str":
    """Return the share of each field, with its interval; tied fields are named with the field that they follow."""
    import plotly.graph_objects as go

    if found.why_none:
        return found.why_none
    shown = found.fields[::-1]
    shares = [each.share for each in shown]
    figure = go.Figure(
        go.Bar(
            x=shares,
            y=[_with_tied(data, each.field) for each in shown],
            orientation="h",
            marker={"color": BLUE, "opacity": [1.0 if each.matters else 0.35 for each in shown]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(each.share_high - each.share, 0.0) for each in shown],
                "arrayminus": [max(each.share - each.share_low, 0.0) for each in shown],
                "color": "#8a9099",
            },
            text=[plain(say_effect(each.effect, "the metric", found.is_log)) for each in shown],
            textposition="none",
            hovertemplate="%{y}: %{x:.0%}<br>%{text}<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"tickformat": ".0%", "range": [0, 1.02]},
        yaxis={"automargin": True, "type": "category"},
        height=110 + 42 * len(shown),
        margin={"t": 20},
    )
    return figure


def _with_tied(data: SweepData, field: str) -> str:
    tied = moves_with(data, field)
    return plain(f"{field} (with {', '.join(tied)})" if tied else field)


def effects(data: SweepData, found: Importances) -> "Figure | str":
    """Return a panel for each searched field: its values against the outcomes."""
    from plotly.subplots import make_subplots

    known, fields = found.outcomes.known, data.fields()[:_MOST_PANELS]
    if not fields:
        return "no field was searched"
    if len(known) < 2:
        return f"{len(known)} of the trials have a value"
    columns = min(3, len(fields))
    rows = -(-len(fields) // columns)
    titles = [plain(name) for name in fields]
    figure = make_subplots(rows, columns, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    is_log = data.metric == LOSS and all(measured(each) > 0 for each in known)
    for place, name in enumerate(fields):
        row, column = place // columns + 1, place % columns + 1
        figure.add_trace(_panel(data, name, known), row, column)
        coordinate = coordinate_of(data.info.spec.search.space[name])
        if coordinate.values:
            order = [plain(say_short(value)) for value in coordinate.values]
            shown = {"categoryarray": order, "range": [-0.5, len(order) - 0.5]}  # also values that no trial has tried
            figure.update_xaxes(type="category", categoryorder="array", **shown, row=row, col=column)
        elif coordinate.is_log:
            low, high = (float(value) for value in data.info.spec.search.space[name].probes())
            figure.update_xaxes(**log_axis([low, high]), row=row, col=column)
        if is_log:
            values = [measured(each) for each in known]
            span = [math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15]
            figure.update_yaxes(**log_axis(values), range=span, row=row, col=column)
        if column == 1:
            figure.update_yaxes(title=plain(data.metric), row=row, col=column)
    figure.update_annotations(font_size=13)
    if left_out := data.fields()[_MOST_PANELS:]:
        sentence = f"The first {_MOST_PANELS} fields; not drawn: {', '.join(left_out)}"
        text = "<br>".join(plain(line) for line in textwrap.wrap(sentence, 100))
        figure.add_annotation(
            text=text, xref="paper", yref="paper", x=0, y=0, yshift=-35, yanchor="top", align="left", showarrow=False
        )
    figure.update_layout(showlegend=False, height=90 + 250 * rows, margin={"t": 50, "b": 80})
    return figure


def _panel(data: SweepData, name: str, known: list[Outcome]) -> Any:
    import plotly.graph_objects as go

    shown = [each for each in known if name in each.trial.config.varied]
    coordinate = coordinate_of(data.info.spec.search.space[name])
    values = [each.trial.config.varied[name] for each in shown]
    at_end = [is_at_end(each) for each in shown]
    return go.Scatter(
        x=[plain(say_short(value)) for value in values] if coordinate.values else values,
        y=[measured(each) for each in shown],
        text=[
            f"{plain(each.trial.trial_id)}{'' if end else _until(each)}"
            for each, end in zip(shown, at_end, strict=True)
        ],
        mode="markers",
        marker={
            "color": [BLUE if end else GRAY for end in at_end],
            "size": 8,
            "symbol": ["circle" if end else "circle-open" for end in at_end],
        },
        hovertemplate="%{text}<br>%{x}: %{y:.4g}<extra></extra>",
    )


def _until(outcome: Outcome) -> str:
    return f", not trained to its end (step {outcome.trial.step})"

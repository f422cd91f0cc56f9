"""Figures of the metric over time: learning curves, and where trials were compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from orchestrator.analysis.sweep_data import SweepData
from orchestrator.analysis.wording import say_short
from orchestrator.page.style import GRAY, GREEN, LEADERS, ORANGE, PURPLE, RED, log_axis, plain
from orchestrator.record import MetricPoint, TrialResult, TrialState
from orchestrator.spec.search import LOSS
from orchestrator.spec.sections.scheduler import Rungs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST_COMPARED: Final = 24
"""Columns of the rung diagram."""


def learning_curves(data: SweepData) -> "Figure | str":
    """Return the curves of the metric, with buttons for steps, tokens and time."""
    shown = [trial for trial in data.trials if data.evaluations(trial.trial_id, data.metric)]
    if not shown:
        return "no trial has an evaluation"
    has_gpu = any(trial.gpu_seconds for trial in shown)
    leaders, others = shown[: len(LEADERS)], shown[len(LEADERS) :]
    traces = [_gray(data, others, has_gpu)] if others else []
    traces += [_curve(data, trial, color, has_gpu) for trial, color in zip(leaders, LEADERS, strict=False)][::-1]
    return _by_unit(traces, has_gpu, {"title": plain(data.metric)} | _value_axis([data]))


def leaders_compared(sweeps: Sequence[SweepData]) -> "Figure | str":
    """Return the curve of each sweep's leader, with buttons for steps, tokens and time."""
    if len({data.metric for data in sweeps}) > 1:
        return "the sweeps have different metrics"
    found = [(data, data.leader) for data in sweeps]
    led = [(data, leader) for data, leader in found if leader and data.evaluations(leader.trial_id, data.metric)]
    if not led:
        return "no sweep has a trial that has finished"
    has_gpu = all(leader.gpu_seconds for _, leader in led)
    traces = []
    for place, (data, leader) in enumerate(led):
        trace = _curve(data, leader, LEADERS[place % len(LEADERS)], has_gpu)
        trace["of"]["name"] = f"{plain(data.name)}: {plain(leader.trial_id)}"
        traces.append(trace)
    return _by_unit(traces, has_gpu, {"title": plain(led[0][0].metric)} | _value_axis([data for data, _ in led]))


def _by_unit(traces: Sequence[dict[str, Any]], has_gpu: bool, y_axis: dict[str, Any]) -> "Figure":
    """Return a figure of curves with buttons that change the unit of the x axis."""
    import plotly.graph_objects as go

    units = {"step": "optimizer steps", "tokens": "tokens", "time": "GPU seconds" if has_gpu else "seconds of work"}
    figure = go.Figure([go.Scatter(x=trace["x"]["step"], **trace["of"]) for trace in traces])
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [{"x": [t["x"][unit] for t in traces]}, {"xaxis.title.text": label}],
        }
        for unit, label in units.items()
    ]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02}
    figure.update_layout(
        updatemenus=[menu | {"yanchor": "bottom", "showactive": True}],
        hovermode="closest",
        xaxis_title=units["step"],
        yaxis=y_axis,
        showlegend=True,
        legend={"orientation": "h", "y": -0.22, "traceorder": "reversed"},
        height=480,
        margin={"t": 60},
    )
    return figure


def _times(data: SweepData, trial: TrialResult, has_gpu: bool) -> tuple[list[MetricPoint], dict[str, list[Any]]]:
    points = data.evaluations(trial.trial_id, data.metric)
    factor = trial.gpu_seconds / trial.seconds if has_gpu and trial.seconds else 1.0
    return points, {
        "step": [point.step for point in points],
        "tokens": [point.tokens for point in points],
        "time": [round(point.time_s * factor, 3) for point in points],
    }


def _curve(data: SweepData, trial: TrialResult, color: str, has_gpu: bool) -> dict[str, Any]:
    points, x = _times(data, trial, has_gpu)
    best = trial.best.step if trial.best else None
    name = plain(trial.trial_id)
    return {
        "x": x,
        "of": {
            "y": [point.values[data.metric] for point in points],
            "mode": "lines+markers",
            "name": name,
            "line": {"color": color, "width": 2},
            "marker": {"size": [9 if point.step == best else 3 for point in points], "color": color},
            "hovertemplate": f"{name}<br>{_values(trial)}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
        },
    }


def _gray(data: SweepData, trials: list[TrialResult], has_gpu: bool) -> dict[str, Any]:
    """Return all other trials as one trace with gaps, which draws fast."""
    x: dict[str, list[Any]] = {"step": [], "tokens": [], "time": []}
    y: list[float | None] = []
    names: list[str] = []
    for trial in trials:
        points, times = _times(data, trial, has_gpu)
        for unit, values in times.items():
            x[unit] += [*values, None]
        y += [*(point.values[data.metric] for point in points), None]
        names += [plain(trial.trial_id)] * (len(points) + 1)
    return {
        "x": x,
        "of": {
            "y": y,
            "text": names,
            "mode": "lines",
            "name": f"{len(trials)} others",
            "line": {"color": GRAY, "width": 1},
            "opacity": 0.45,
            "hovertemplate": "%{text}<br>%{x}: %{y:.4g}<extra></extra>",
        },
    }


def rungs(data: SweepData) -> "Figure | str":
    """Return the values of trials at each step where they were compared: who went on, stopped, waited or was cloned."""
    import plotly.graph_objects as go

    said = {(each.trial_id, each.step): (each.action, each.why) for each in data.decisions if each.action != "chosen"}
    if not said:
        return "no trial was stopped, paused or cloned"
    steps = _compared_steps(data, {step for _, step in said})
    if not steps:
        return "no trial has an evaluation"
    groups: dict[str, list[tuple[int, float, str]]] = {}
    for trial in data.trials:
        for point in data.evaluations(trial.trial_id, data.metric):
            if point.step in steps:
                action, why = said.get((trial.trial_id, point.step), ("went on", ""))
                if not why and point.step == trial.step:
                    action = "failed" if trial.state == TrialState.FAILED else "end"
                text = f"{plain(trial.trial_id)}{'<br>' + _wrapped(why) if why else ''}"
                groups.setdefault(action, []).append((steps.index(point.step), point.values[data.metric], text))
    colors = {"went on": GREEN, "end": GREEN, "stopped": ORANGE, "paused": PURPLE, "cloned": PURPLE, "failed": RED}
    symbols = {"end": "star", "stopped": "x", "paused": "diamond", "cloned": "diamond-open", "failed": "x-open"}
    traces = [
        go.Scatter(
            x=[x for x, _, _ in group],
            y=[y for _, y, _ in group],
            text=[text for _, _, text in group],
            mode="markers",
            name=action,
            marker={"color": colors.get(action, GRAY), "symbol": symbols.get(action, "circle"), "size": 9},
            opacity=0.8,
            hovertemplate="%{text}<br>" + plain(data.metric) + " %{y:.4g}<extra></extra>",
        )
        for action, group in groups.items()
    ]
    counts = [[sum(x == place for x, _, _ in groups.get(name, [])) for place in range(len(steps))] for name in groups]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    figure = go.Figure(traces)
    figure.update_layout(
        xaxis={
            "tickvals": list(range(len(steps))),
            "ticktext": [f"{step}<br>{total} there" for step, total in zip(steps, totals, strict=True)],
            "title": "optimizer step",
        },
        yaxis={"title": plain(data.metric)} | _value_axis([data]),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        height=440,
    )
    return figure


def _compared_steps(data: SweepData, decided: set[int]) -> list[int]:
    """Return the steps at which trials were compared: the rungs, or all evaluations up to the last decision."""
    steps = {point.step for trial in data.trials for point in data.evaluations(trial.trial_id, data.metric)}
    scheduler = data.info.spec.scheduler
    if isinstance(scheduler, Rungs) and scheduler.kind != "median" and scheduler.counts == "step" and decided:
        factor, rung = scheduler.reduction_factor, data.info.spec.grace_steps
        planned = {rung * factor**power for power in range(20)}
        steps = (steps & planned) | decided | {max(steps, default=0)}
    ordered = sorted(steps)
    every = -(-len(ordered) // _MOST_COMPARED)
    return sorted(set(ordered[::-1][::every]) | (decided & set(ordered)))


def _values(trial: TrialResult) -> str:
    return "<br>".join(f"{plain(name)} {plain(say_short(value))}" for name, value in trial.config.varied.items())


def _wrapped(text: str, width: int = 70) -> str:
    import textwrap

    return "<br>".join(plain(line) for line in textwrap.wrap(text, width))


def _value_axis(sweeps: Sequence[SweepData]) -> dict[str, Any]:
    """Return the settings of the metric's axis: logarithmic for a loss."""
    metric = sweeps[0].metric
    values = [p.values[metric] for data in sweeps for t in data.trials for p in data.evaluations(t.trial_id, metric)]
    return log_axis(values) if metric == LOSS and min(values) > 0 else {}

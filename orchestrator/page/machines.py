"""Figures of the machines: what ran when, throughput and memory."""

from datetime import datetime
from typing import TYPE_CHECKING

from orchestrator.analysis.sweep_data import SweepData
from orchestrator.page.style import BLUE, ORANGE, STATE_COLORS, plain
from orchestrator.record import TrialResult
from orchestrator.report.tables import duration

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def timeline(data: SweepData) -> "Figure | str":
    """Return a bar for each trial, in the rows of its worker: one row for each trial that runs there at a time."""
    import plotly.graph_objects as go

    runs = [(trial, False) for trial in data.trials] + [(trial, True) for trial in data.repeats]
    known = sorted(((t, again) for t, again in runs if t.started and t.worker), key=lambda run: run[0].started or "")
    if not known:
        return "the records have no times; they were made by an earlier version"
    ends = [datetime.fromisoformat(t.ended) for t, _ in known if t.ended]
    latest = max([*ends, *(datetime.fromisoformat(t.started) for t, _ in known if t.started)])
    rows: dict[str, list[datetime]] = {}
    bars: dict[tuple[str, bool], list[tuple[TrialResult, str, datetime, float]]] = {}
    for trial, is_repeat in known:
        start = datetime.fromisoformat(trial.started or "")
        end = datetime.fromisoformat(trial.ended) if trial.ended else latest
        lanes = rows.setdefault(trial.worker or "", [])
        lane = next((i for i, free in enumerate(lanes) if free <= start), len(lanes))
        lanes[lane : lane + 1] = [end]
        bar = (trial, f"{plain(trial.worker)} #{lane + 1}", start, max((end - start).total_seconds(), 0.05))
        bars.setdefault((str(trial.state), is_repeat), []).append(bar)
    first = min(start for shown in bars.values() for _, _, start, _ in shown)
    figure = go.Figure(
        [
            go.Bar(
                base=[(start - first).total_seconds() for _, _, start, _ in shown],
                x=[seconds for _, _, _, seconds in shown],
                y=[row for _, row, _, _ in shown],
                text=[plain(trial.trial_id) for trial, _, _, _ in shown],
                customdata=[duration(seconds) for _, _, _, seconds in shown],
                orientation="h",
                name=f"{state}, repeat" if is_repeat else state,
                textposition="none",
                marker={
                    "color": STATE_COLORS[state],
                    "line": {"width": 1, "color": "rgba(127,127,127,0.6)"},
                    "pattern": {"shape": "/" if is_repeat else ""},
                },
                hovertemplate="%{text}: %{customdata}<extra></extra>",
            )
            for (state, is_repeat), shown in bars.items()
        ]
    )
    num_rows = sum(len(lanes) for lanes in rows.values())
    figure.update_layout(
        barmode="overlay",
        xaxis_title="seconds since the first trial began",
        yaxis={"automargin": True, "type": "category", "categoryorder": "category descending"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        height=150 + min(26 * num_rows, 900),
    )
    return figure


def throughput_and_memory(data: SweepData) -> "Figure | str":
    """Return tokens per second and peak memory of each trial, in the order in which they began."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    order = {trial_id: place for place, trial_id in enumerate(data.record.paths.trial_ids())}
    known = sorted((t for t in data.trials if t.tokens_per_second), key=lambda t: order.get(t.trial_id, 0))
    if not known:
        return "no trial has trained"
    names = [plain(trial.trial_id) for trial in known]
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    bars = (
        ([trial.tokens_per_second for trial in known], "tokens per second", BLUE),
        ([trial.peak_memory_gib for trial in known], "peak memory, GiB", ORANGE),
    )
    for row, (values, title, color) in enumerate(bars, 1):
        hover = "%{x}: %{y:.4g}<extra></extra>"
        figure.add_trace(go.Bar(x=names, y=values, marker_color=color, name=title, hovertemplate=hover), row, 1)
        figure.update_yaxes(title=title, row=row, col=1, rangemode="tozero")
    figure.update_xaxes(type="category", showticklabels=False)
    figure.update_xaxes(showticklabels=len(known) <= 40, tickangle=-40 if len(known) <= 12 else -90, row=2, col=1)
    figure.update_layout(showlegend=False, height=460, margin={"t": 20})
    return figure

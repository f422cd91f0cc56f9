"""Write the report of sweeps: HTML, Markdown, or their tables."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from orchestrator.analysis.frames import curves_frame, decisions_frame, importances_frame, save_tables, trials_frame
from orchestrator.analysis.importance import find_importances
from orchestrator.analysis.sweep_data import SweepData, with_distinct_names
from orchestrator.page.sections import compared_leaders, comparison, comparison_notes, sections_of
from orchestrator.record.files import write_atomic
from orchestrator.record.versions import installed_versions

ReportFormat = Literal["html", "md", "csv", "parquet"]

_FOLDER = Path(__file__).parent


def write_report(sweeps: Sequence[SweepData], to: Path, format: ReportFormat) -> list[Path]:
    """Write the report of one or more sweeps, and return the files.

    Args:
        sweeps: the sweeps; several are compared.
        to: the file of a page, or the folder of tables.
        format: html or md is one page; csv or parquet is one file for each table.
    """
    if format == "html":
        write_atomic(to, html_page(sweeps))
        return [to]
    if format == "md":
        write_atomic(to, markdown_page(sweeps))
        return [to]
    files = []
    for data in with_distinct_names(sweeps):
        folder = to if len(sweeps) == 1 else to / data.name
        files += save_tables(frames_of(data), folder, format)
    return files


def frames_of(data: SweepData) -> dict[str, Any]:
    """Return all tables of a sweep by name."""
    return {
        "trials": trials_frame(data),
        "curves": curves_frame(data),
        "decisions": decisions_frame(data),
        "importances": importances_frame(find_importances(data)),
    }


@dataclass(frozen=True)
class LivePart:
    """What changes of a page while sweeps run."""

    title: str
    html: str
    """The content of `main`."""
    plots: dict[str, Any]
    """Key -> figure: its data and layout."""
    is_over: bool
    """Whether no trial is left to run in any of the sweeps."""


def html_page(sweeps: Sequence[SweepData]) -> str:
    """Return a page that holds everything it needs: text, tables, data, styles, and Plotly."""
    return _whole_page(live_part(sweeps))


def live_page(part: LivePart, tag: str) -> str:
    """Return the same page, which asks the server that it comes from for updates.

    Args:
        part: what it shows.
        tag: the server's name for this state of the records.
    """
    return _whole_page(part, tag)


def live_part(sweeps: Sequence[SweepData]) -> LivePart:
    """Return the text, tables and figures of sweeps; several are compared."""
    parts = [sections_of(data) for data in with_distinct_names(sweeps)]
    compared = compared_leaders(parts) if len(parts) > 1 else None
    plots = {
        f"{number}-{plot.name}": json.loads(plot.json)
        for number, part in enumerate(parts)
        for plot in part.plots
        if plot.json is not None
    }
    if compared is not None and compared.json is not None:
        plots["all-leaders"] = json.loads(compared.json)
    common = _common(parts)
    html = _environment().get_template("page.main.html.jinja").render(**common, compared=compared)
    return LivePart(common["title"], html, plots, all(data.is_over for data in sweeps))


def _whole_page(part: LivePart, tag: str = "") -> str:
    from plotly.offline import get_plotlyjs

    scripts = ["page.js", *(["live.js"] if tag else [])]
    rendered: str = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=part.title,
            main=part.html,
            tag=tag,
            is_over=part.is_over,
            style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
            scripts=[(_FOLDER / name).read_text(encoding="utf-8") for name in scripts],
            plotly=get_plotlyjs().replace("</script", "<\\/script"),
            plots=json.dumps(part.plots, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        )
    )
    return rendered


def markdown_page(sweeps: Sequence[SweepData]) -> str:
    """Return the report as Markdown, without figures."""
    parts = [sections_of(data, with_figures=False) for data in with_distinct_names(sweeps)]
    rendered: str = _environment().get_template("page.md.jinja").render(**_common(parts))
    return rendered


def _common(parts: Sequence[Any]) -> dict[str, Any]:
    return {
        "sweeps": parts,
        "title": " and ".join(part.name for part in parts) if len(parts) < 4 else f"{len(parts)} sweeps",
        "comparison": comparison(parts) if len(parts) > 1 else None,
        "notes": comparison_notes(parts) if len(parts) > 1 else [],
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": installed_versions().get("qlora-orchestrator", "of this folder"),
    }


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _md
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: Any) -> Any:
    """Return text for HTML that may break after each mark within a name, such as `training.learning_rate`."""
    from markupsafe import Markup, escape

    return Markup(re.sub("(?<=[._])", "<wbr>", str(escape(text))))


def _md(text: Any) -> str:
    """Return text that Markdown shows as it is, on one line."""
    escaped = "".join(f"\\{char}" if char in "\\`*_[]<>|#~" else char for char in str(text))
    return " ".join(escaped.split())

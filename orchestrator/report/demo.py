"""Compare the answers of the base and of the best adapter to the same held-out prompts."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.deploy import FinishedSweep
from orchestrator.deploy.side_by_side import record_answers
from orchestrator.report.tables import TrialsTable, axes_of

_NUM_PROMPTS = 6


def show_side_by_side(console: Console, sweep: FinishedSweep) -> None:
    """Print the best trial's row, then prompts with the expected answer, the base's and the adapter's."""
    answers = record_answers(sweep, _NUM_PROMPTS)
    console.print(TrialsTable([sweep.best().trial], axes=axes_of(sweep.record.info.spec)))
    table = Table(title="held-out prompts", title_justify="left", header_style="bold")
    for name in ("prompt", "expected", "base", "best adapter"):
        table.add_column(name)
    for each in answers.prompts:
        color = "green" if each.adapter == each.expected else "red"
        # Text instead of a string, which rich would read as markup: the template has square brackets.
        table.add_row(*map(Text, (each.prompt, each.expected, each.base)), Text(each.adapter, style=color))
    console.print(table)

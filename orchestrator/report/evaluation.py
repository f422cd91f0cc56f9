"""Print the scores of the best adapters in each form in which they can be exported."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.deploy.scoring.evaluate import Evaluation, EvaluationReport
from orchestrator.words import counted

_OWN = ("loss", "cost", "perplexity", "token_accuracy")
"""Values that have a column of their own or are not in the table."""


def evaluation_table(report: EvaluationReport) -> Table:
    """Return a table with a row per adapter and form: loss, difference to the adapter as trained, other metrics."""
    values = list(dict.fromkeys(name for each in report.evaluations for name in each.values))
    columns = [name for name in values if name == "perplexity" or name not in _OWN]
    table = Table(
        title=f"{counted(report.num_rows, 'row')} ({report.rows}) on {report.device}",
        title_justify="left",
        box=SIMPLE_HEAD,
        header_style="bold",
    )
    for name in ("trial", "form", "type"):
        table.add_column(name, no_wrap=True)
    for name in ("loss", "cost", *columns):
        table.add_column(name, justify="right")
    last = ""
    for each in report.evaluations:
        if last and each.name != last:
            table.add_section()
        last = each.name
        table.add_row(
            each.name,
            each.form,
            each.dtype,
            f"{each.values['loss']:.4g}",
            _cost(each),
            *(f"{each.values[name]:.4g}" if name in each.values else "" for name in columns),
        )
    return table


def _cost(evaluation: Evaluation) -> str:
    """Return the loss minus the loss of the adapter as trained, such as `+0.0123 (+8.3%)`."""
    cost, loss = evaluation.values["cost"], evaluation.values["loss"]
    if evaluation.form == "adapter":
        return "as trained"
    share = f" ({cost / (loss - cost):+.1%})" if loss != cost else ""
    return f"{cost:+.2g}{share}"

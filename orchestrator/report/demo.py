"""Compare the answers of the base and of the best adapter to the same held-out prompts."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.adapters.generate import answer
from orchestrator.data import load
from orchestrator.deploy import FinishedSweep
from orchestrator.deploy.chat import open_chat
from orchestrator.report.tables import TrialsTable, axes_of

_NUM_PROMPTS = 6


def show_side_by_side(console: Console, sweep: FinishedSweep) -> None:
    """Print the best trial's row, then prompts with the expected answer, the base's and the adapter's."""
    winner = sweep.best()
    config = winner.trial.config
    chat = open_chat(winner.adapter_ref())
    prompts = load(sweep.record.paths.data).prompts[:_NUM_PROMPTS]
    ids = [prompt.ids for prompt in prompts]
    new, batch = config.evaluation.max_new_tokens, config.training.eval_batch_size
    with chat.model.disable_adapter():
        before = answer(chat.model, chat.tokenizer, ids, new, batch)
    after = answer(chat.model, chat.tokenizer, ids, new, batch)
    console.print(TrialsTable([winner.trial], axes=axes_of(sweep.record.info.spec)))
    table = Table(title="held-out prompts", title_justify="left", header_style="bold")
    for name in ("prompt", "expected", "base", "best adapter"):
        table.add_column(name)
    for prompt, base_answer, adapter_answer in zip(prompts, before, after, strict=True):
        question = chat.tokenizer.decode(prompt.ids, skip_special_tokens=True)
        color = "green" if adapter_answer == prompt.answer else "red"
        # Text instead of a string, which rich would read as markup: the template has square brackets.
        table.add_row(*map(Text, (question, prompt.answer, base_answer)), Text(adapter_answer, style=color))
    console.print(table)

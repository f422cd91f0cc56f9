"""From rows to tokens: read, mix, render, encode, split, cut and pack the data of an experiment.

Reading order: `prepare` (all steps, for a sweep), `sources` and `files` (where rows are read from; `json_rows`,
`tables` and `open_files` read single files into a `row`), `mix` (several sources, held-out rows), `render` (a row to
prompt and completion; conversations through `turns` and `conversation`), `encode` (text to tokens, and which are in
the loss), `stop_tokens` (whether rows teach the model to end), `packing` (several rows in a sequence). `bad_rows`
groups faults by kind, `long_rows` compares rows with the base's positions, `unread_columns` finds columns that nothing
reads, `preview` is what `orchestrator data` shows, `infer_format` guesses the format of rows without an experiment.
"""

from orchestrator.data.encode import encode_prompt
from orchestrator.data.prepare import PreparedData, Prompt, load, prepare, save
from orchestrator.data.render import render_prompt

__all__ = ["PreparedData", "Prompt", "encode_prompt", "load", "prepare", "render_prompt", "save"]

"""Columns, and keys of turns, that nothing reads are listed once, with the number of rows."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.data.preview import preview
from orchestrator.errors import DataError
from orchestrator.report.data import say_data
from orchestrator.spec.sections import BaseSection, DataSection

BASE = BaseSection(model="embedded")
CHATML = (
    "{% for m in messages %}<|{{ m['role'][0] }}|>{{ m['name'] }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}


def unread(file: Path, rows: list[dict[str, Any]], **fields: Any) -> dict[str, int]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection.model_validate({"source": str(file), "held_out": {"count": 1}, **fields})
    shown = preview(data, BASE, 0)
    out = StringIO()
    say_data(Console(file=out, width=200), shown)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("columns that neither")]
    assert len(lines) == bool(shown.unread)
    assert all(name in lines[0] for name in shown.unread)
    return shown.unread


def test_unread_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": "1", "output": "2", "input": "", "category": name, "id": 7} for name in ("a", "", "b")]
    assert unread(file, rows, format="alpaca") == {"category": 2, "id": 3}
    template = "{?category}{category} {/category}{instruction} {output}"
    assert unread(file, rows, format="template", template=template) == {"id": 3}
    assert unread(file, [{"text": "1", "weight": 0}] * 2, format="text") == {"weight": 2}


def test_unread_keys_of_turns(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    turns = [{**USER, "name": "me", "id": "x"}, {**ANSWER, "id": "y", "weight": 1, "nothing": None}]
    rows = [{"messages": turns, "tools": None, "system": "3", "source": "s"}, {"messages": [USER, ANSWER]}]
    assert unread(file, rows, format="messages", chat_template=CHATML) == {"source": 1, "messages[].id": 1}
    own = CHATML.replace("m['name']", "m['content']")
    assert unread(file, rows, format="messages", chat_template=own) == {
        "source": 1, "messages[].name": 1, "messages[].id": 1
    }  # fmt: skip


def test_a_template_that_renders_whole_turns_reads_all_their_keys(tmp_path: Path) -> None:
    whole = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    turns = [{**USER, "id": "x"}, ANSWER]
    assert unread(tmp_path / "rows.jsonl", [{"messages": turns}] * 2, format="messages", chat_template=whole) == {}


def test_a_mark_on_a_turn_that_is_never_trained_is_unread(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "1", "train": True}, {"from": "gpt", "value": "2", "train": True}]
    rows = [{"conversations": turns}] * 2
    fields = {"format": "sharegpt", "chat_template": CHATML}
    assert unread(tmp_path / "rows.jsonl", rows, **fields, loss_on="assistant") == {"conversations[].train": 2}
    assert unread(tmp_path / "rows.jsonl", rows, **fields) == {}


@pytest.mark.parametrize("format", ["alpaca", "prompt"])
@pytest.mark.parametrize("column", ["system", "history", "tools"])
def test_columns_that_a_format_cannot_render_are_refused(tmp_path: Path, format: str, column: str) -> None:
    row = {"instruction": "1", "output": "2", "prompt": "1", "completion": "2"}
    with pytest.raises(DataError, match=f"column '{column}' is not empty, but format {format} cannot render it"):
        unread(tmp_path / "rows.jsonl", [{**row, column: "3"}] * 2, format=format)
    names = {"alpaca": {"prompt": 2, "completion": 2}, "prompt": {"instruction": 2, "output": 2}}
    assert unread(tmp_path / "rows.jsonl", [{**row, column: []}] * 2, format=format) == names[format]


def test_a_weight_of_a_speaker_with_a_given_role_is_read(tmp_path: Path) -> None:
    turns = [{"from": "person", "value": "1"}, {"from": "bot", "value": "2", "weight": 1}]
    roles = {"person": "user", "bot": "assistant"}
    rows = [{"conversations": turns}] * 2
    assert unread(tmp_path / "rows.jsonl", rows, format="sharegpt", roles=roles, chat_template=CHATML) == {}

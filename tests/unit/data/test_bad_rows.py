"""Bad rows: reported by kind, or left out and counted."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import load, prepare, save
from orchestrator.data.bad_rows import RowError
from orchestrator.data.prepare import PreparedData
from orchestrator.data.preview import preview
from orchestrator.errors import DataError
from orchestrator.record import BadRows
from orchestrator.spec.sections import BaseSection, DataSection, HeldOut

BASE = BaseSection(model="embedded")
GOOD = {"prompt": "1", "completion": "2"}


def section(file: Path, rows: list[dict[str, Any]], **fields: Any) -> DataSection:
    """Make a data section with separate held-out rows: every row of the file is trained on."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = file.with_name("held.jsonl")
    held_out.write_text(json.dumps(fields.pop("held", GOOD)) + "\n")
    return DataSection.model_validate(
        {"source": str(file), "format": "prompt", "held_out": {"source": str(held_out)}, **fields}
    )


ROWS = [
    GOOD, {"prompt": "1", "completion": ""}, GOOD, {"prompt": "1", "completion": None}, {"prompt": "1"},
    *([{"prompt": "1", "completion": " "}] * 3), {"prompt": [1], "completion": "2"}, GOOD,
]  # fmt: skip


def test_all_bad_rows_are_reported_by_kind(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(DataError) as caught:
        prepare(section(file, ROWS), BASE)
    assert str(caught.value).splitlines() == [
        "7 of 11 rows cannot be used:",
        f"  column 'completion' is empty: 5 rows: {file}:2, {file}:4, {file}:6 and 2 more",
        f"  there is no column 'completion': 1 row: {file}:5",
        f"  column 'prompt' is a list of turns, but format prompt reads text: 1 row: {file}:9",
        "  data.format says which columns are read; format template reads any column named in data.template.",
        "  Set data.format: messages, which reads prompt and completion as turns.",
        "  data.bad_rows: drop leaves such rows out and counts them.",
    ]


def test_a_single_bad_row_is_reported_with_the_number_of_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(DataError) as caught:
        prepare(section(file, ROWS[:3]), BASE)
    assert str(caught.value).splitlines() == [
        f"{file}:2: column 'completion' is empty",
        "  It is the only bad one of 4 rows: fix it, or set data.bad_rows: drop.",
    ]


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    data = section(tmp_path / "rows.jsonl", ROWS, bad_rows="drop")
    prepared = prepare(data, BASE)
    good = prepare(section(tmp_path / "good.jsonl", [GOOD] * 3), BASE)
    assert prepared.train["input_ids"] == good.train["input_ids"]
    assert (prepared.num_train, prepared.num_dropped) == (3, 0)
    assert [(bad.fault, bad.num_rows) for bad in prepared.bad_rows] == [
        ("column 'completion' is empty", 5),
        ("there is no column 'completion'", 1),
        ("column 'prompt' is a list of turns, but format prompt reads text", 1),
    ]
    save(prepared, tmp_path / "data")
    loaded: PreparedData = load(tmp_path / "data")
    assert loaded.bad_rows == prepared.bad_rows
    assert preview(data, BASE, 1).bad == prepared.bad_rows


def test_held_out_rows_are_taken_from_the_good_ones(tmp_path: Path) -> None:
    """Their number is as requested, and they are the same as in a file without the bad rows."""
    good = [{"prompt": str(i), "completion": "2"} for i in range(9)]
    prepared = []
    for name, rows in {"good": good, "both": [row for each in good for row in (each, ROWS[1])]}.items():
        file = tmp_path / f"{name}.jsonl"
        data = section(file, rows).model_copy(update={"held_out": HeldOut(count=4), "bad_rows": "drop"})
        prepared.append(prepare(data, BASE))
    assert [len(each.held_out) for each in prepared] == [4, 4]
    assert prepared[0].fingerprint == prepared[1].fingerprint


def test_dropping_every_row_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match=r"drop leaves no training row: column 'completion' is empty: 1 row: .*:1$"):
        prepare(section(file, ROWS[1:2], bad_rows="drop"), BASE)
    with pytest.raises(DataError, match=r"drop leaves no held-out row: column 'completion' is empty: 1 row"):
        prepare(section(file, [GOOD], bad_rows="drop", held=ROWS[1]), BASE)


def test_a_conversation_that_ends_with_the_human_is_one_bad_row(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]
    rows = [{"conversations": turns}, {"conversations": turns[:1]}, {"conversations": turns * 2}]
    data = section(tmp_path / "rows.jsonl", rows, format="sharegpt", held=rows[0], bad_rows="drop")
    assert [str(bad) for bad in prepare(data, BASE).bad_rows] == [
        f"the last turn must be the assistant's and not empty: 1 row: {tmp_path / 'rows.jsonl'}:2"
    ]


def test_a_column_that_no_row_has_is_refused_under_drop_too(tmp_path: Path) -> None:
    for bad_rows in ("error", "drop"):
        with pytest.raises(DataError, match=r"rows.jsonl:1: there is no column 'completion'; columns: 'prompt'"):
            prepare(section(tmp_path / "rows.jsonl", [{"prompt": "1"}] * 2, bad_rows=bad_rows), BASE)


def test_a_row_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(RowError("x:1", "is bad: 7", "mend it", kind="is bad")))
    assert (str(error), error.where, error.kind) == ("x:1: is bad: 7\n  mend it", "x:1", "is bad")
    assert str(BadRows(fault="is bad", num_rows=1, first=["x:1"])) == "is bad: 1 row: x:1"


TEMPLATE = "Q: {question}\n{?context}\nContext: {context}\n{/context}\n{hint?}\nA: {answer}"


def test_a_column_of_a_template_may_be_empty(tmp_path: Path) -> None:
    rows = [
        {"question": "1", "context": "2", "hint": "3", "answer": "4"},
        {"question": "1", "context": "", "hint": None, "answer": "4"},
        {"question": "1", "answer": "4"},
    ]
    data = section(tmp_path / "rows.jsonl", rows, format="template", template=TEMPLATE, held=rows[1])
    shown = ["".join(piece.text for piece in row.pieces) for row in preview(data, BASE, 3).rows]
    assert shown == ["<s>Q: 1\nContext: 2\n3\nA: 4</s>", "<s>Q: 1\n\nA: 4</s>", "<s>Q: 1\n\nA: 4</s>"]
    data = section(tmp_path / "rows.jsonl", [rows[2]], format="template", template=TEMPLATE, held=rows[0])
    with pytest.raises(DataError, match=r"no row has a column 'context'; columns: 'question', 'answer'"):
        prepare(data, BASE)
    required = section(
        tmp_path / "rows.jsonl", rows[:2], format="template", template="{context} {answer}", held=rows[0]
    )
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'context' is empty\n.*\{column\?\}"):
        prepare(required, BASE)

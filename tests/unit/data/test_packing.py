"""Packing: no row is lost or split, and little space is left empty."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.data import load, prepare, save
from orchestrator.data.encode import IGNORED
from orchestrator.data.packing import pack_rows
from orchestrator.spec.sections import BaseSection, DataSection

BASE = BaseSection(model="embedded")


@pytest.mark.parametrize(
    ("lengths", "sequences"),
    [
        ([], []),
        ([8], [[0]]),
        ([8, 8], [[0], [1]]),
        ([3, 5, 4], [[0, 1], [2]]),
        ([5, 2, 6, 2, 1], [[0, 3, 4], [1, 2]]),  # one 2 fills the 6; the other 2 and the 1 fill the 5
        ([1] * 9, [[*range(8)], [8]]),
    ],
)
def test_rows_are_packed_longest_first_where_they_fit_best(lengths: list[int], sequences: list[list[int]]) -> None:
    assert pack_rows(lengths, 8) == sequences


def test_every_row_is_in_one_sequence_and_none_is_too_long() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(500)]
    sequences = pack_rows(lengths, 100)
    assert sorted(row for rows in sequences for row in rows) == list(range(500))
    sums = [sum(lengths[row] for row in rows) for rows in sequences]
    assert max(sums) <= 100
    assert sum(sums) / (100 * len(sums)) > 0.97, "and they are full"


@pytest.fixture
def section(tmp_path: Path) -> DataSection:
    """Six training rows and two held-out rows, in sequences of eight tokens."""
    file = tmp_path / "rows.jsonl"
    prompts = ["1", "1 2", "2", "1 2 3 4 5", "3", "4"]
    file.write_text("".join(json.dumps({"prompt": p, "completion": "5"}) + "\n" for p in prompts))
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "6", "completion": "7"}\n{"prompt": "8", "completion": "9"}\n')
    return DataSection.model_validate(
        {
            "source": str(file), "format": "prompt", "loss_on": "completion", "max_length": 8, "packing": True,
            "held_out": {"source": str(held_out)},
        }
    )  # fmt: skip


def test_a_sequence_is_its_rows_one_after_another(section: DataSection, tmp_path: Path) -> None:
    prepared = prepare(section, BASE)
    tokenizer = load_tokenizer(BASE)
    # `<s> 1 2 5 </s>` has six tokens with its space, the others four; `1 2 3 4 5` is cut to none and dropped.
    assert [tokenizer.decode(ids) for ids in prepared.train["input_ids"]] == [
        "<s>15</s><s>25</s>",
        "<s>1 25</s>",
        "<s>35</s><s>45</s>",
    ]
    assert prepared.train["seq_lengths"] == [[4, 4], [6], [4, 4]]
    five, end = tokenizer.convert_tokens_to_ids(["5", "</s>"])
    X = IGNORED
    assert prepared.train["labels"] == [[X, X, five, end] * 2, [X, X, X, X, five, end], [X, X, five, end] * 2]
    assert (prepared.num_train, prepared.num_sequences, prepared.num_dropped) == (5, 3, 1)
    assert "seq_lengths" not in prepared.held_out.column_names, "held-out rows are scored one by one"
    save(prepared, tmp_path / "data")
    again = load(tmp_path / "data")
    assert again.train["seq_lengths"] == prepared.train["seq_lengths"]
    assert (again.num_sequences, again.sources, again.fingerprint) == (3, prepared.sources, prepared.fingerprint)


def test_the_first_token_of_a_packed_row_is_not_in_the_loss(section: DataSection) -> None:
    labels: list[list[int]] = prepare(section.model_copy(update={"loss_on": "all"}), BASE).train["labels"]
    assert [[place for place, label in enumerate(row) if label == IGNORED] for row in labels] == [
        [0, 4],
        [0],
        [0],
        [0, 4],
    ]


@pytest.mark.parametrize("change", [{"packing": False}, {"max_length": 12}, {"loss_on": "all"}])
def test_the_fingerprint_depends_on_the_packing(section: DataSection, change: dict[str, Any]) -> None:
    fingerprint = prepare(section, BASE).fingerprint
    assert prepare(section, BASE).fingerprint == fingerprint
    assert prepare(section.model_copy(update=change), BASE).fingerprint != fingerprint

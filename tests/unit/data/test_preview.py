"""`orchestrator data` shows what is trained."""

import json
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.base import load_tokenizer
from orchestrator.cli import main
from orchestrator.data import prepare
from orchestrator.data.encode import IGNORED
from orchestrator.data.preview import DataPreview, pieces, preview
from orchestrator.embedded import BASE_DIR
from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.report.data import row_text, say_data
from orchestrator.spec.sections import BaseSection, DataSection

BASE = BaseSection(model="embedded")


@pytest.fixture
def section(tmp_path: Path) -> DataSection:
    """Nine rows. The second is cut, the fourth is dropped, and a held-out one is also a training row."""
    lines = [("1", "2"), ("1", "2 3 4 5 6 7"), ("3", "4"), ("1 2 3 4 5 6", "7"), *((str(i), "9") for i in range(4, 9))]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in lines))
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "2", "completion": "2"}\n')
    return DataSection.model_validate(
        {
            "source": str(file), "format": "prompt", "loss_on": "completion", "max_length": 10,
            "held_out": {"source": str(held_out)},
        }
    )  # fmt: skip


def test_the_preview_is_what_would_be_trained(section: DataSection) -> None:
    shown, prepared = preview(section, BASE, 99), prepare(section, BASE)
    assert [row.ids for row in shown.rows] == prepared.train["input_ids"]
    trained = [[label != IGNORED for label in labels] for labels in prepared.train["labels"]]
    assert [row.trained for row in shown.rows] == trained
    assert shown.fingerprint == prepared.fingerprint
    assert (shown.num_train, shown.num_held_out, shown.num_shared) == (8, 2, 1)
    assert [(place.where[-2:], place.num_tokens) for place in shown.cut] == [(":2", 14)]
    assert [(place.where[-2:], place.num_tokens) for place in shown.dropped] == [(":4", 14)]
    assert shown.num_tokens == sum(len(ids) for ids in prepared.train["input_ids"])
    assert shown.num_trained == sum(map(sum, trained))
    assert sum(each.num_rows for each in shown.lengths) == 11
    assert (shown.median, shown.longest) == (4, 14)


def test_a_row_of_plain_text_shows_its_mask(section: DataSection) -> None:
    shown = preview(section, BASE, 2)
    assert row_text(shown.rows[0], is_colored=False).plain == "<s>1⟦2</s>⟧"
    colored = row_text(shown.rows[0], is_colored=True)
    assert colored.plain == "<s>12</s>"
    styles = {colored.plain[span.start : span.end]: span.style for span in colored.spans}
    assert styles == {"<s>": "dim reverse", "1": "dim", "2": "green", "</s>": "green reverse"}
    assert (shown.rows[1].num_cut, shown.rows[1].num_trained) == (4, 8)


def test_pieces_join_to_the_whole_text() -> None:
    tokenizer = load_tokenizer(BASE)
    ids = tokenizer("a ä =\n</s> b")["input_ids"]
    for every in (1, 2, 3):
        trained = [i % (2 * every) < every for i in range(len(ids))]
        found = pieces(ids, trained, tokenizer)
        assert "".join(piece.text for piece in found) == tokenizer.decode(ids)
        assert [piece.is_trained for piece in found for _ in range(piece.num_tokens)] == trained


BARS = [(4, 40, 9), (6, 0, 0), (8, 0, 0), (10, 0, 0), (12, 0, 0), (14, 9, 2)]
"""Maximum tokens, length of the bar and number of rows, for nine rows of 4 tokens and two of 14."""


def printed(shown: DataPreview) -> list[str]:
    out = StringIO()
    say_data(Console(file=out, width=160), shown)
    return out.getvalue().splitlines()


def test_printed_lines(section: DataSection) -> None:
    lines = printed(preview(section, BASE, 1))
    assert lines[0].endswith("rows.jsonl:1: 4 tokens, 2 in the loss")
    assert lines[1] == "<s>1⟦2</s>⟧"
    assert any(line.startswith("1 row is truncated (right): ") and line.endswith(":2 (14 tokens)") for line in lines)
    assert any(line.startswith("1 row is dropped") and line.endswith(":4 (14 tokens)") for line in lines)
    assert "1 held-out row is also in the training data; that loss says little about new data" in lines
    assert lines[-1].startswith("fingerprint ")
    start = lines.index("tokens per row: median 4, longest 14, max_length 10") + 1
    bars = [f"  up to {length:2} {'#' * bar} {number}" for length, bar, number in BARS]
    assert lines[start : start + len(bars) + 1] == [*bars[:4], "  ----- max_length 10 -----", *bars[4:]]


def test_packed_rows_are_shown_in_the_order_of_sequences(section: DataSection) -> None:
    shown = preview(section.model_copy(update={"packing": True}), BASE, 4)
    assert shown.packing is not None
    assert (shown.packing.num_sequences, shown.packing.most_rows) == (5, 2)
    assert [row.sequence for row in shown.rows] == [0, 0, 1, 2]
    assert any("packed into 5 sequences, " in line for line in printed(shown))


def run(monkeypatch: pytest.MonkeyPatch, *call: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["orchestrator", "data", *call])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_the_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    call = [str(DEMO), "--rows", "1", "--set", "data.max_rows=40", "--set", "data.held_out={count: 4}"]
    assert run(monkeypatch, *call) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[:2] == [
        "embedded:1: 32 tokens, 6 in the loss",
        "<s>[INST] How does y n b read from the right? [/INST]⟦ # b n y </s>⟧",
    ]
    assert "36 training rows, 4 held out" in out
    assert err == ""
    assert run(monkeypatch, *call, "--json") == 0
    out, err = capfd.readouterr()
    document: dict[str, Any] = json.loads(out)
    assert DataPreview.model_validate(document).num_train == 36
    assert err == ""


def test_the_command_shows_rows_without_an_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"messages": turns}] * 2))
    assert run(monkeypatch, str(file), "--rows", "1", "--set", "data.loss_on=completion") == 0
    out, err = capfd.readouterr()
    row, shown, _, about, *_ = out.splitlines()
    assert row.startswith(f"{file}:1 row ")
    assert shown == "<s>[INST] 1 [/INST]⟦ 2 </s>⟧"
    assert about == "format messages, tokenizer of base embedded"
    assert "1 training row, 1 held out" in out
    assert err == ""


def test_rows_beyond_the_positions_of_the_base_are_told(
    section: DataSection, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    shown = preview(section, BaseSection(model=str(base)), 0)
    assert shown.positions == 8
    assert [place.where[-2:] for place in shown.beyond] == [":2"]  # the other row of 14 tokens is dropped
    warning = f"warning: 1 of 10 rows has more tokens (up to 10) than base {base} has positions (8); it was not trained"
    assert any(line.startswith(warning) for line in printed(shown))
    assert not preview(section, BASE, 0).beyond

    file = tmp_path / "one.yaml"
    file.write_text(
        "base: {model: base}\ndata: {source: rows.jsonl, format: text, max_length: 9}\ntraining: {steps: 2}\n"
        "search: {algorithm: random, num_trials: 1}\n"
    )
    for max_length, told in (("9", True), ("8", False)):
        monkeypatch.setattr(sys, "argv", ["orchestrator", "check", str(file), "--set", f"data.max_length={max_length}"])
        with pytest.raises(SystemExit):
            main()
        note = f"# note: data.max_length=9: base {base} has 8 positions, and was not trained beyond them."
        assert (note in capsys.readouterr().out) is told

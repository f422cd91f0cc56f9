"""Split, cut, fingerprint, and prepared data that is saved and loaded."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.data import PreparedData, load, prepare, save
from orchestrator.data.encode import IGNORED
from orchestrator.data.prepare import load_test
from orchestrator.errors import DataError
from orchestrator.spec.sections import BaseSection, DataSection

BASE = BaseSection(model="embedded")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty different rows."""
    return _write(tmp_path / "rows.jsonl", [f"row {i}" for i in range(40)])


def test_the_split_is_the_same_each_time(rows: Path) -> None:
    first, again = prepare(_section(rows), BASE), prepare(_section(rows), BASE)
    assert _texts(first) == _texts(again)
    other = prepare(_section(rows, seed=7), BASE)
    assert _texts(first) != _texts(other)
    for prepared in (first, other):
        train, held_out = _texts(prepared)
        assert not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(_texts_of(rows))


def test_the_split_is_drawn_from_all_over(rows: Path) -> None:
    _, held_out = _texts(prepare(_section(rows, held_out={"count": 10}), BASE))
    places = [_texts_of(rows).index(text) for text in held_out]
    assert places == sorted(places), "rows keep their order"
    assert places not in ([*range(10)], [*range(30, 40)])


@pytest.mark.parametrize(
    ("held_out", "num_held_out"),
    [({"share": 0.1}, 4), ({"share": 0.25}, 10), ({"share": 0.001}, 1), ({"count": 7}, 7), ({"count": 39}, 39)],
)
def test_share_and_count(rows: Path, held_out: dict[str, Any], num_held_out: int) -> None:
    prepared = prepare(_section(rows, held_out=held_out), BASE)
    assert (len(prepared.train), len(prepared.held_out)) == (40 - num_held_out, num_held_out)


def test_separate_held_out_rows(rows: Path, tmp_path: Path) -> None:
    own = _write(tmp_path / "own.jsonl", ["one", "two", "three"])
    prepared = prepare(_section(rows, held_out={"source": str(own), "max_rows": 2}), BASE)
    assert _texts(prepared) == (_texts_of(rows), ["one", "two"])


def test_the_first_rows_only(rows: Path) -> None:
    train, held_out = _texts(prepare(_section(rows, max_rows=10), BASE))
    assert sorted(train + held_out) == sorted(_texts_of(rows)[:10])


@pytest.mark.parametrize("held_out", [{"count": 40}, {"count": 41}, {"share": 0.99}])
def test_holding_out_every_row_is_refused(rows: Path, held_out: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data\.held_out takes \d+ of 40 rows"):
        prepare(_section(rows, held_out=held_out), BASE)


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    rows = _write(tmp_path / "rows.jsonl", ["1", "1 2 3 4 5 6 7 8 9", "1 2", "9 8 7 6 5 4 3 2 1"])
    whole = prepare(_section(rows, held_out={"count": 1}, max_length=64), BASE)
    cut = prepare(_section(rows, held_out={"count": 1}, max_length=8), BASE)
    assert (whole.num_truncated, cut.num_truncated, cut.num_dropped) == (0, 2, 0)
    for part in ("train", "held_out"):
        assert getattr(cut, part)["input_ids"] == [ids[:8] for ids in getattr(whole, part)["input_ids"]]
        assert getattr(cut, part)["labels"] == getattr(cut, part)["input_ids"]


def test_rows_without_a_token_in_the_loss_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    prompts = ["1", "1 2 3 4 5 6 7 8 9", "2", "3"]
    rows.write_text("".join(json.dumps({"prompt": p, "completion": " 5"}) + "\n" for p in prompts))
    same = tmp_path / "same.jsonl"
    same.write_text(rows.read_text())
    section = _section(rows, format="prompt", loss_on="completion", max_length=8, held_out={"source": str(same)})
    prepared = prepare(section, BASE)
    assert (len(prepared.train), len(prepared.held_out)) == (3, 3)
    assert (prepared.num_truncated, prepared.num_dropped, prepared.num_shared) == (2, 2, 3)
    assert all(any(label != IGNORED for label in labels) for labels in prepared.train["labels"])


@pytest.mark.parametrize("part", ["training", "held-out"])
def test_a_part_without_any_row_left_is_named(tmp_path: Path, part: str) -> None:
    files = {}
    for name, prompt in {"training": "1", "held-out": "2", part: "1 2 3 4 5 6 7 8 9"}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text(json.dumps({"prompt": prompt, "completion": " 5"}) + "\n")
    own = {"source": str(files["held-out"])}
    section = _section(files["training"], format="prompt", loss_on="completion", max_length=8, held_out=own)
    with pytest.raises(
        DataError,
        match=rf"after truncation no {part} row has a token in the loss\. Longest rows: .*{part}\.jsonl:1 \(21\)",
    ):
        prepare(section, BASE)


def test_held_out_prompts_have_their_answers() -> None:
    section = DataSection(source="embedded", format="template", template="<s>[INST] {question} [/INST] {answer} </s>")
    prepared = prepare(section.model_copy(update={"max_rows": 30}), BASE)
    assert len(prepared.prompts) == len(prepared.held_out) == 3
    for prompt, ids in zip(prepared.prompts, prepared.held_out["input_ids"], strict=True):
        assert ids[: len(prompt.ids)] == prompt.ids
        assert prompt.answer.startswith("# ")
        assert prompt.answer.replace(" ", "") in _decode(ids[len(prompt.ids) :]).replace(" ", "")


def test_text_has_no_prompts(rows: Path) -> None:
    assert prepare(_section(rows), BASE).prompts == []


def test_the_fingerprint_depends_on_the_chat_template(tmp_path: Path) -> None:
    """Two templates may render these rows alike but a question differently."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    first, second = (
        prepare(_section(rows, format="messages", chat_template=text), BASE)
        for text in (template, template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    )
    assert first.train["input_ids"] == second.train["input_ids"]
    assert first.fingerprint != second.fingerprint
    save(second, tmp_path / "data")
    assert load(tmp_path / "data").chat_template == second.chat_template


@pytest.mark.parametrize("truncate", ["right", "left"])
def test_prompts_are_those_of_kept_rows_after_the_cut(tmp_path: Path, truncate: str) -> None:
    """A row with a prompt of 200 tokens has nothing in the loss if it is cut on the right: its prompt is left out."""
    rows = [{"prompt": "a " * num, "completion": "b"} for num in (5, 200, 6, 7)]
    own = [{"prompt": "c", "completion": "d"}]
    files = {}
    for name, each in {"train": own, "held_out": rows}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in each))
    data = {"source": str(files["train"]), "held_out": {"source": str(files["held_out"])}, "max_length": 16}
    data |= {"format": "prompt", "loss_on": "completion", "truncate": truncate}
    prepared = prepare(DataSection.model_validate(data), BASE)
    lengths = [len(prompt.ids) for prompt in prepared.prompts]
    assert lengths == ([6, 7, 8] if truncate == "right" else [6, 14, 7, 8])
    assert len(prepared.prompts) == len(prepared.held_out), "one for each held-out row, in their order"
    for prompt, ids in zip(prepared.prompts, prepared.held_out["input_ids"], strict=True):
        assert ids[: len(prompt.ids)] == prompt.ids


def test_a_prompt_that_fills_its_row_is_cut_to_its_end(tmp_path: Path) -> None:
    """With loss_on all, such a row is kept without its answer; the model is asked with the end of the prompt."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a " * 30 + "? ;", "completion": "b"}) + "\n")
    own = _write(tmp_path / "own.jsonl", ["x"])
    own.write_text(json.dumps({"prompt": "c", "completion": "d"}) + "\n")
    data = {"source": str(own), "held_out": {"source": str(rows)}, "max_length": 8, "format": "prompt"}
    (prompt,) = prepare(DataSection.model_validate(data), BASE).prompts
    tokenizer = load_tokenizer(BASE)
    assert len(prompt.ids) == 8
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.ids[1:]).endswith("a a ? ;")


def test_rows_that_are_too_long_are_refused_under_truncate_error(tmp_path: Path) -> None:
    rows = _write(tmp_path / "rows.jsonl", ["1", "1 2 3 4 5 6 7 8 9", "1 2", "9 8 7 6 5 4 3 2 1"])
    wanted = r"data\.max_length=8: 2 of 4 rows have more tokens: .*rows\.jsonl:[24] \(19\), .*rows\.jsonl:[24] \(19\)$"
    with pytest.raises(DataError) as caught:
        prepare(_section(rows, held_out={"count": 1}, max_length=8, truncate="error"), BASE)
    assert re.match(wanted, caught.value.message)
    whole = prepare(_section(rows, held_out={"count": 1}, max_length=19, truncate="error"), BASE)
    assert (whole.num_truncated, whole.num_dropped) == (0, 0)


def test_the_fingerprint_depends_on_the_tokens(rows: Path, tmp_path: Path) -> None:
    fingerprint = prepare(_section(rows), BASE).fingerprint
    assert prepare(_section(rows), BASE).fingerprint == fingerprint
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(rows.read_bytes())
    assert prepare(_section(copy), BASE).fingerprint == fingerprint, "whatever the file is called"
    _write(copy, [*_texts_of(rows)[:-1], "another"])
    own = {"source": str(copy)}
    others = [
        _section(copy),
        _section(rows, seed=1),
        _section(rows, max_length=8, held_out={"count": 5}),
        _section(rows, held_out=own),
        _section(copy, held_out={"source": str(rows)}),
    ]
    found = {prepare(section, BASE).fingerprint for section in others}
    assert len(found | {fingerprint}) == len(others) + 1


def test_the_fingerprint_depends_on_the_labels(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    sections = [_section(rows, format="prompt", loss_on=loss_on) for loss_on in ("all", "completion")]
    assert len({prepare(section, BASE).fingerprint for section in sections}) == 2


def test_the_fingerprint_depends_on_the_split(tmp_path: Path) -> None:
    parts = [(["a", "b"], ["c"]), (["a"], ["b", "c"])]
    fingerprints = set()
    for train, held_out in parts:
        own = {"source": str(_write(tmp_path / "held_out.jsonl", held_out))}
        fingerprints.add(prepare(_section(_write(tmp_path / "rows.jsonl", train), held_out=own), BASE).fingerprint)
    assert len(fingerprints) == 2


def test_saved_data_is_loaded_unchanged(rows: Path, tmp_path: Path) -> None:
    made = prepare(_section(rows), BASE)
    save(made, tmp_path / "data")
    loaded = load(tmp_path / "data")
    assert (loaded.fingerprint, loaded.num_truncated, loaded.num_dropped, loaded.prompts) == (
        made.fingerprint,
        0,
        0,
        [],
    )
    assert _texts(loaded) == _texts(made)
    assert {path.name for path in tmp_path.iterdir()} == {rows.name, "data"}, "nothing else is left"


def _section(source: Path, **values: Any) -> DataSection:
    return DataSection.model_validate({"source": str(source), "format": "text", **values})


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def _texts(prepared: PreparedData) -> tuple[list[str], list[str]]:
    train, held_out = ([_decode(ids) for ids in part["input_ids"]] for part in (prepared.train, prepared.held_out))
    return train, held_out


def _decode(ids: list[int]) -> str:
    return str(_tokenizer().decode(ids, skip_special_tokens=True))


@functools.cache
def _tokenizer() -> Any:
    return load_tokenizer(BASE)


def test_test_rows_are_apart_and_leave_the_held_out_rows_as_they_are(tmp_path: Path) -> None:
    base = BaseSection(model="embedded")
    section = {
        "source": "embedded", "format": "template", "template": "<s>[INST] {question} [/INST] {answer} </s>",
        "max_rows": 60, "held_out": {"count": 7},
    }  # fmt: skip
    without = prepare(DataSection.model_validate(section), base)
    with_test = prepare(DataSection.model_validate(section | {"test": {"count": 5}}), base)
    assert without.test is None
    assert with_test.held_out.to_dict() == without.held_out.to_dict()
    three = with_test.train, with_test.held_out, with_test.test
    parts = [[tuple(ids) for ids in part["input_ids"]] for part in three]
    assert [len(part) for part in parts] == [48, 7, 5]
    assert sorted(ids for part in parts for ids in part) == sorted(
        [tuple(ids) for part in (without.train, without.held_out) for ids in part["input_ids"]]
    )
    save(with_test, tmp_path / "data")
    assert load_test(tmp_path / "data").to_dict() == with_test.test.to_dict()
    save(without, tmp_path / "none")
    with pytest.raises(DataError, match="has no test rows"):
        load_test(tmp_path / "none")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"test": {"count": 53}, "held_out": {"count": 7}}, "data.held_out takes 7 and data.test takes 53 of 60 rows"),
        (
            {"test": {"source": "FILE"}, "held_out": {"source": "FILE"}},
            "is held_out.source too: no decision",
        ),
        ({"test": {"source": "FILE/../*.jsonl"}, "held_out": {"source": "FILE"}}, "is among the other rows"),
    ],
)
def test_test_rows_that_are_not_apart_are_refused(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n' * 3)
    common = {"source": "embedded", "format": "template", "template": "{question} {answer}", "max_rows": 60}
    for part in section.values():
        if "source" in part:
            part["source"] = part["source"].replace("FILE/..", str(tmp_path)).replace("FILE", str(file))
    with pytest.raises((DataError, ValueError), match=message):
        prepare(DataSection.model_validate(common | section), BaseSection(model="embedded"))

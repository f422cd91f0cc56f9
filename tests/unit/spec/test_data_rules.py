"""Rules of the data section: fields that do not go together are refused at `check`, with the reason."""

from itertools import product
from typing import Any, get_args

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import parse_spec
from orchestrator.spec.sections import DataSection

TEMPLATE = {"template": "{q} {a}"}
CHAT = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
FORMATS = ("text", "prompt", "messages", "sharegpt", "alpaca", "template")
TURNS = ("messages", "sharegpt")


def test_each_format_is_tested_here() -> None:
    assert set(FORMATS) == set(get_args(DataSection.model_fields["format"].annotation))


def check(data: dict[str, Any], **sections: Any) -> Any:
    return parse_spec({"base": {"model": "embedded"}, "data": {"source": "owner/rows", **data}, **sections})


@pytest.mark.parametrize(
    ("format", "loss_on", "chat", "truncate", "packing"),
    product(FORMATS, ("all", "completion", "assistant"), (False, True), ("right", "left", "error"), (False, True)),
)
def test_combinations_of_format_loss_template_truncate_and_packing(
    format: str, loss_on: str, chat: bool, truncate: str, packing: bool
) -> None:
    data = {"format": format, "loss_on": loss_on, "truncate": truncate, "packing": packing}
    data |= (TEMPLATE if format == "template" else {}) | (CHAT if chat else {})
    refused = None
    if chat and format not in TURNS:
        refused = f"data: chat_template formats conversations, but format is {format}"
    elif format == "text" and loss_on != "all":
        refused = f"data: loss_on: {loss_on} needs a prompt, and format text has none"
    elif loss_on == "assistant" and format not in TURNS:
        refused = f"data: loss_on: assistant needs turns; format {format} has none"
    if refused is None:
        assert check(data).data.format == format
        return
    with pytest.raises(SpecError) as caught:
        check(data)
    assert refused in str(caught.value)


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "template without one": ({"format": "template"}, {}, "format template needs a template"),
    "template of another format": ({"format": "alpaca", **TEMPLATE}, {}, "a template is given, but format is alpaca"),
    "template malformed": ({"format": "template", "template": "{a"}, {}, "'{a': a single '{' at character 1"),
    "template without a column": ({"format": "template", "template": "a"}, {}, "has no field; write {column} fields"),
    "chat template malformed": (
        {"format": "messages", "chat_template": "a\n{% for m in messages %}"}, {}, "chat_template: line 2: "
    ),
    "chat template of no Jinja": ({"format": "messages", "chat_template": "a"}, {}, "is not a Jinja template"),
    "no source": ({"source": None, "format": "text"}, {}, "exactly one of source, mix, but got none"),
    "two sources": ({"mix": [{"source": "a/b"}], "format": "text"}, {}, "exactly one of source, mix"),
    "field beside a mix": (
        {"source": None, "mix": [{"source": "a/b"}], "max_rows": 5, "format": "text"},
        {},
        "max_rows belong to a source; in a mix",
    ),
    "half of the weights": (
        {"source": None, "mix": [{"source": "a/b", "weight": 1.0}, {"source": "c/d"}], "format": "text"}, {},
        "1 of 2 sources have a weight",
    ),
    "weight of nothing": (
        {"source": None, "mix": [{"source": "a/b", "weight": 0.0}], "format": "text"}, {}, "mix.0.weight: Input should"
    ),
    "a source twice": (
        {"source": None, "mix": [{"source": "a/b"}, {"source": "a/b", "split": "train"}], "format": "text"}, {},
        "mix: a/b appears twice",
    ),
    "roles of no speakers": ({"format": "text", "roles": {"bot": "assistant"}}, {}, "roles name the speakers of conv"),
    "delimiter of a hub data set": ({"format": "text", "delimiter": ";"}, {}, "delimiter belongs to CSV files"),
    "delimiter of JSON": (
        {"source": "/a.jsonl.gz", "format": "text", "delimiter": ";"}, {}, "delimiter belongs to CSV files"
    ),
    "delimiter that is a quote": (
        {"source": "/a.csv", "format": "text", "delimiter": '"'}, {}, "delimiter '\"' has another meaning"
    ),
    "delimiter of two": ({"source": "/a.csv", "format": "text", "delimiter": ";;"}, {}, "at most 1 character"),
    "optional completion": ({"format": "template", "template": "{q} {a?}"}, {}, "must not be optional"),
    "stream without an end": ({"stream_buffer": 9, "format": "text"}, {}, "stream_buffer needs max_rows"),
    "stream of a file": (
        {"source": "/a.csv", "stream_buffer": 9, "max_rows": 9, "format": "text"}, {}, "stream_buffer belongs to a hub"
    ),
    "config of a file": ({"source": "/a.csv", "config": "x", "format": "text"}, {}, "config belongs to a hub data set"),
    "split of a file": ({"source": "/a.csv", "split": "x", "format": "text"}, {}, "split belongs to a hub data set or"),
    "split of a glob": ({"source": "/a/*", "split": "x", "format": "text"}, {}, "split belongs to a hub data set or"),
    "split of a file in a mix": (
        {"source": None, "mix": [{"source": "/a.csv", "split": "x"}], "format": "text"}, {}, "data.mix.0: split belongs"
    ),
    "held out of training": (
        {"held_out": {"source": "owner/rows", "split": "train"}, "format": "text"}, {},
        "held_out.source is the training source",
    ),
    "held out of a slice of training": (
        {"split": "train[:90%]", "held_out": {"source": "owner/rows", "split": "train"}, "format": "text"}, {},
        "held_out.source is the training source",
    ),
    "held-out slice of training": (
        {"held_out": {"source": "owner/rows", "split": "train[90%:]"}, "format": "text"}, {},
        "held_out.source is the training source",
    ),
    "rows of a slice": (
        {"split": "train[:90%]", "max_rows": 9, "format": "text"}, {}, "data: max_rows with split train[:90%]"
    ),
    "rows of a held-out slice": (
        {"held_out": {"source": "a/b", "split": "test[:9]", "max_rows": 9}, "format": "text"}, {},
        "max_rows with split test[:9]",
    ),
    "held-out mix of training": (
        {"held_out": {"mix": [{"source": "a/b"}, {"source": "owner/rows", "split": "train"}]}, "format": "text"}, {},
        "held_out.mix: owner/rows is the training source",
    ),
    "held-out share and mix": (
        {"held_out": {"share": 0.1, "mix": [{"source": "a/b"}]}, "format": "text"}, {}, "exactly one of share, count"
    ),
    "held-out stream without an end": (
        {"held_out": {"source": "a/b", "stream_buffer": 5}, "format": "text"}, {}, "stream_buffer needs max_rows"
    ),
    "part of no held-out source": (
        {"held_out": {"count": 3, "stream_buffer": 5}, "format": "text"}, {}, "stream_buffer belong to a source"
    ),
    **{
        f"embedded rows as {format}": (
            {"source": "embedded", "format": format, **(TEMPLATE if format == "template" else {})}, {},
            f"data.source embedded: there is no column '{column}' for format {format}; columns: question, answer",
        )
        for format, column in {
            "text": "text", "prompt": "prompt", "messages": "messages", "sharegpt": "conversations",
            "alpaca": "instruction", "template": "q",
        }.items()
    },
    "packing of grouped rows": (
        {"packing": True, "format": "text"}, {"training": {"group_by_length": True}}, "groups nothing"
    ),
    "packing where grouping is searched": (
        {"packing": True, "format": "text"},
        {"search": {"space": {"training.group_by_length": {"choice": [False, True]}}}},
        "groups nothing",
    ),
    "answers of text": (
        {"format": "text"}, {"evaluation": {"metrics": ["exact_match"]}}, "need prompts; data.format text has none"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_fields_that_do_not_go_together_are_refused(name: str) -> None:
    data, sections, message = PAIRS[name]
    with pytest.raises(SpecError) as caught:
        check(data, **sections)
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"source": "/saved", "split": "dev", "held_out": {"source": "/saved", "split": "test"}, "format": "text"},
        {"config": "main", "split": "dev", "max_rows": 3, "stream_buffer": 2, "format": "prompt"},
        {"source": None, "mix": [{"source": "a/b"}, {"source": "a/b", "split": "dev"}], "format": "prompt"},
        {"split": "train[:90%]", "held_out": {"source": "owner/rows", "split": "train[90%:]"}, "format": "text"},
        {"source": "/e[1]/saved", "split": "dev", "held_out": {"source": "/e[1]/saved"}, "format": "text"},
        {
            "source": None,
            "mix": [{"source": "/a.csv", "weight": 2.0}, {"source": "/b", "weight": 0.5}],
            "format": "alpaca",
        },
        {"held_out": {"mix": [{"source": "a/b", "max_rows": 5, "stream_buffer": 3}]}, "format": "sharegpt"},
        {"format": "messages", "chat_template": "{% generation %}{{ x }}{% endgeneration %}", "loss_on": "assistant"},
    ],
)
def test_fields_that_go_together_are_accepted(data: dict[str, Any]) -> None:
    spec = check(data)
    assert parse_spec(spec.model_dump(mode="json")) == spec

"""Wrong data, templates and bases are refused with the place and the reason."""

from collections.abc import Callable

import pytest

from tests.unit.wrong_calls.calls import Wrong, data_file, jsonl, options, overridden, trial

DATA = [
    jsonl("not JSON", '{"text": "a"}\n{"text"\n', "rows.jsonl:2: is not JSON"),
    jsonl("line not UTF-8", b'{"text": "a"}\n\n{"text": "\xff"}\n', "rows.jsonl:3: is not UTF-8 text"),
    jsonl("not an object", '{"text": "a"}\n{"text": "b"}\n["c"]\n', "rows.jsonl:3", "JSON object", 'got ["c"]'),
    jsonl("missing column", '{"text": "a"}\n{"txt": "b"}\n', "rows.jsonl:2", "no column 'text'", "txt"),
    jsonl("column of another type", '{"text": "a"}\n{"text": ["b"]}\n', "rows.jsonl:2", "'text' must be text", "list"),
    jsonl("null", '{"text": "a"}\n{"text": null}\n', "rows.jsonl:2", "'text' is empty"),
    jsonl("not a number", '{"text": "a"}\n{"text": NaN}\n', "rows.jsonl:2", "'text' is empty"),
    jsonl("empty value", '{"text": "a"}\n{"text": " "}\n', "rows.jsonl:2", "'text' is empty"),
    jsonl("no row", "\n", "rows.jsonl: holds no row"),
    jsonl("one row", '{"text": "a"}\n', "data.held_out takes 1 of 1 row:", "data.held_out.source"),
    jsonl("one row without its column", '{"txt": "a"}\n', "rows.jsonl:1: there is no column 'text'", "'txt'"),
    jsonl("no completion", '{"prompt": "a"}\n' * 2, "rows.jsonl:", "no column 'completion'", format="prompt"),
    jsonl("messages of text", '{"messages": "a"}\n' * 2, "rows.jsonl:", "list of turns", format="messages"),
    jsonl(
        "turn without content", '{"messages": [{"role": "user"}]}\n' * 2, "rows.jsonl:", "content", format="messages"
    ),
    jsonl(
        "no answer",
        '{"messages": [{"role": "user", "content": "a"}]}\n' * 2,
        "rows.jsonl:",
        "last turn must be the assistant's",
        format="messages",
    ),
    data_file(
        "CSV with a field too many",
        "rows.csv",
        "text\na\nb,c\n",
        "rows.csv:3: has 2 fields, but the header has 1: text",
    ),
    data_file(
        "JSON array with a number",
        "rows.json",
        '[{"text": "a"},\n3]',
        "rows.json:2 row 1: must be a JSON object, got 3",
    ),
    data_file("Parquet that is none", "rows.parquet", "PAR", "rows.parquet: is not Parquet"),
    data_file("a kind that is not known", "rows.md", "a\n", "rows.md: is of no known kind", ".jsonl"),
    data_file("CSV with an empty value", "rows.csv", 'text\na\n" "\n', "rows.csv:3", "'text' is empty"),
    jsonl("conversations of text", '{"conversations": 1}\n' * 2, "rows.jsonl:", "list of turns", format="sharegpt"),
    jsonl("instruction without output", '{"instruction": "a"}\n' * 2, "no column 'output'", format="alpaca"),
    jsonl(
        "tools the template leaves out",
        '{"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}]}\n' * 2,
        "rows.jsonl:",
        "leaves the column tools out",
        format="messages",
    ),
    trial("glob without files", ["data={source: 'a/*.csv', format: text}"], "a/*.csv: no file matches"),
    trial(
        "rows too long for error",
        ["data.max_length=8", "data.truncate=error"],
        "data.max_length=8: 2000 of 2000 rows have more tokens: embedded:",
        "and 1997 more",
        "set data.truncate to right or left: it is error now",
    ),
    overridden(
        "mix of names", ["data.source=", "data.mix=[a.csv]"], "data.mix.0: must be a section of source, weight", "a.csv"
    ),
    overridden("base as a name", ["base=embedded"], "base: must be a section of model, revision", "'embedded'"),
    overridden(
        "rows by a URL", ["data.source=https://x.org/a.csv"], "data.source: 'https://x.org/a.csv' is a URL", "hub id"
    ),
    trial("missing file of a mix", ["data.source=", "data.mix=[{source: nope.csv}]"], "nope.csv: there is no such"),
    Wrong(
        "held-out file in the training folder",
        ["trial", "x.yaml", *options(["data={source: ., format: text, held_out: {source: ./rows.jsonl}}"])],
        ("data.held_out: ", "rows.jsonl is among the training rows"),
        {"rows.jsonl": '{"text": "a"}\n'},
    ),
    Wrong(
        "preview of a bad row",
        ["data", "x.yaml", *options(["data={source: rows.jsonl, format: text}"])],
        ("rows.jsonl:2", "no column 'text'"),
        {"rows.jsonl": '{"text": "a"}\n{}\n'},
    ),
    Wrong(
        "preview of rows of no format",
        ["data", "rows.jsonl"],
        ("rows.jsonl:1: columns 'a', 'b' fit no format", "data.format=template"),
        {"rows.jsonl": '{"a": 1, "b": 2}\n'},
    ),
    Wrong("preview of no file", ["data", "nope.jsonl"], ("nope.jsonl: there is no such data file",)),
    Wrong(
        "training on rows without an experiment",
        ["sweep", "rows.jsonl"],
        ("rows.jsonl: holds rows, and is not an experiment file", "data.source", "orchestrator data rows.jsonl"),
        {"rows.jsonl": '{"text": "a"}\n'},
    ),
    trial("missing data file", ["data.source=nope.jsonl"], "nope.jsonl: there is no such data file"),
    trial("missing held-out file", ["data.held_out={source: ./nope}"], "nope: there is no such data file"),
    trial("no such data set", ["data.source=nobody/nothing"], "nobody/nothing", "cannot be loaded from the hub"),
    trial("held out takes all", ["data.held_out={count: 2000}"], "data.held_out takes 2000 of 2000 rows"),
    trial("template without fields", ["data.template=hello"], "data.template 'hello'", "{column} fields"),
    trial("template without names", ["data.template='{} {0}'"], "data.template", "a field has no name"),
    trial("template malformed", ["data.template='{question} {answer'"], "data.template", "a single '{'", "{{ or }}"),
    trial("template over no column", ["data.template='{question} {reply}'"], "embedded:", "no column 'reply'"),
    trial(
        "template as a number",
        ["data.template='{question:d} {answer}'"],
        "there is no column 'question:d'",
    ),
    trial(
        "template in a field",
        ["data.template='{question:{w}} {answer}'"],
        "data.template",
    ),
    trial(
        "nothing to learn",
        ["data.max_length=8", "data.loss_on=completion"],
        "data.max_length=8 is too short: after truncation no training row has a token in the loss",
        "(36) and 1797 more",
    ),
    trial("folder without a model", ["base.model=./nope"], "base.model", "nope", "no config.json"),
    trial("no such model", ["base.model=nobody/nothing"], "base.model nobody/nothing: cannot be loaded"),
    trial("pad token not known", ["base.pad_token=<fill>"], "base.pad_token '<fill>'", "not a token of embedded"),
]


@pytest.mark.parametrize("wrong", DATA, ids=lambda wrong: wrong.name.replace(" ", "-"))
def test_a_wrong_call_is_refused(wrong: Wrong, assert_refused: Callable[[Wrong], None]) -> None:
    assert_refused(wrong)

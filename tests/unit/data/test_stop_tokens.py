"""Stop tokens: found in encoded rows, and refused if no row has one in the loss."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.data import load, prepare, save
from orchestrator.data.encode import IGNORED, Tokens, encode
from orchestrator.data.files import Row
from orchestrator.data.preview import preview
from orchestrator.data.render import render
from orchestrator.data.stop_tokens import RowEnds, StopFinder
from orchestrator.errors import DataError, RequestError
from orchestrator.report.data import _end_lines
from orchestrator.spec.sections import BaseSection, DataSection

BASE = BaseSection(model="embedded")
WITH_TURNS = BASE.model_copy(update={"new_tokens": ("<|im_start|>", "<|im_end|>")})
"""Both are added tokens, but not special ones."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = CHATML.replace("<|im_end|>", "")
CLOSED_EARLY = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}",
)
CLOSED_BEHIND = CLOSED_EARLY.replace("{% endgeneration %}", "<|im_end|>{% endgeneration %}").replace(
    "{% endif %}<|im_end|>", "<|im_end|>{% endif %}"
)
TURNS = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]


@pytest.fixture
def chatml() -> Any:
    """The embedded base's tokenizer with ChatML's tokens as special ones; its EOS is still `</s>`."""
    tokenizer = load_tokenizer(BASE, CHATML)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|eom|>"], special_tokens=True)
    tokenizer.add_tokens(["</tool_call>"])
    return tokenizer


def section(**fields: Any) -> DataSection:
    return DataSection.model_validate(
        {"source": "embedded", "format": "messages", "loss_on": "completion", "held_out": {"count": 1}} | fields
    )


def ends(tokenizer: Any, *values: dict[str, Any], **fields: Any) -> RowEnds:
    """Return how these rows end."""
    data = section(**fields)
    rows = [encode(render(Row(value, "rows:1"), data, tokenizer), tokenizer, data) for value in values]
    return StopFinder(tokenizer).ends_of(rows, data)


def turns(answer: str = "4") -> dict[str, Any]:
    return {"messages": [TURNS[0], {"role": "assistant", "content": answer}]}


def stops(tokenizer: Any, found: RowEnds) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(found.stop_tokens))


def test_a_turn_ends_with_the_templates_own_stop_token(chatml: Any) -> None:
    found = ends(chatml, turns(), turns("5"))
    assert stops(chatml, found) == ["<|im_end|>", "</s>"]
    assert (found.num_rows, found.num_ended, found.num_not_learned, found.num_cut) == (2, 2, 0, 0)


def test_added_tokens_that_are_not_special_end_a_turn_too() -> None:
    tokenizer = load_tokenizer(WITH_TURNS, CHATML)
    assert stops(tokenizer, ends(tokenizer, turns())) == ["<|im_end|>", "</s>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), ["</s>"]),
        (CHATML[: -len("{% endif %}")] + "{% else %}{{ eos_token }}{% endif %}", ["<|im_end|>", "</s>"]),  # as Phi-3's
        (CHATML.replace("<|im_end|>", " <|im_end|>"), ["<|im_end|>", "</s>"]),
        (ENDLESS, ["</s>"]),
    ],
)
def test_the_first_special_token_after_the_answer_ends_it(chatml: Any, template: str, expected: list[str]) -> None:
    chatml.chat_template = template
    assert stops(chatml, ends(chatml, turns())) == expected


def test_the_last_words_of_an_answer_are_not_its_stop_token(chatml: Any) -> None:
    assert stops(chatml, ends(chatml, turns("a call </tool_call>"))) == ["<|im_end|>", "</s>"]
    unknown = ends(chatml, turns("4 <unk>"), turns("4 <s>"))
    assert stops(chatml, unknown) == ["<|im_end|>", "</s>"]


def test_earlier_trained_turns_may_end_with_another_token(chatml: Any) -> None:
    chatml.chat_template = CHATML.replace(
        "<|im_end|>", "{% if m['content'] == 'a call' %}<|eom|>{% else %}<|im_end|>{% endif %}"
    )
    row = {"messages": [TURNS[0], {"role": "assistant", "content": "a call"}, *TURNS]}
    assert stops(chatml, ends(chatml, row, row, turns(), loss_on="assistant")) == ["<|im_end|>", "<|eom|>", "</s>"]
    assert stops(chatml, ends(chatml, row, loss_on="completion")) == ["<|im_end|>", "</s>"]


@pytest.mark.parametrize(
    ("fields", "value", "expected"),
    [
        ({"format": "prompt"}, {"prompt": "2 + 2 =", "completion": "4"}, ["</s>"]),
        ({"format": "template", "template": "{q} {a} </s>"}, {"q": "2 + 2 =", "a": "4"}, ["</s>"]),
        ({"format": "template", "template": "{q} {a}<|im_end|>"}, {"q": "2 + 2 =", "a": "4"}, ["<|im_end|>", "</s>"]),
        ({"format": "text", "loss_on": "all"}, {"text": "2 + 2 = 4<|im_end|>\n"}, ["<|im_end|>", "</s>"]),
    ],
)
def test_rows_without_turns_end_with_eos_or_their_own_token(
    chatml: Any, fields: dict[str, Any], value: dict[str, str], expected: list[str]
) -> None:
    found = ends(chatml, value, **fields)
    assert stops(chatml, found) == expected
    assert found.num_ended == 1


def test_a_cut_row_loses_its_stop_token(chatml: Any) -> None:
    long = turns("4 " * 40)
    found = ends(chatml, turns(), long, max_length=40)
    assert (found.num_ended, found.num_cut) == (1, 1)
    assert ends(chatml, long, max_length=40, truncate="left").num_ended == 1
    ends(
        chatml, long, max_length=40
    ).require()  # the template writes a stop token; `orchestrator data` shows that the cut removes it


def test_a_generation_block_that_ends_before_the_stop_token_is_refused(chatml: Any) -> None:
    chatml.chat_template = CLOSED_EARLY
    found = ends(chatml, turns(), loss_on="assistant")
    assert stops(chatml, found) == ["<|im_end|>", "</s>"], "answers stop there all the same"
    assert (found.num_ended, found.num_not_learned) == (0, 1)
    with pytest.raises(
        DataError, match="no training row has a stop token in the loss: 1 row ends with one that is not in"
    ) as caught:
        found.require()
    assert caught.value.remedy.startswith("Move {% endgeneration %}")
    chatml.chat_template = CLOSED_BEHIND
    assert ends(chatml, turns(), loss_on="assistant").num_ended == 1
    assert ends(chatml, turns(), loss_on="completion").num_ended == 1


def test_a_token_that_the_tokenizer_lacks_is_not_a_stop_token() -> None:
    tokenizer = load_tokenizer(BASE, CHATML)
    with pytest.raises(
        DataError, match=r"no row ends with a stop token: the first ends with '.*im_end\|>\\n'"
    ) as caught:
        ends(tokenizer, turns()).require()
    assert "base.new_tokens adds one" in caught.value.remedy
    assert "data.require_stop: false" in caught.value.remedy


def test_rows_without_stop_tokens_are_refused_unless_allowed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(turns()) + "\n") * 3)
    data = section(source=str(rows), chat_template=ENDLESS)
    with pytest.raises(DataError, match="data: no row ends with a stop token: the first ends with"):
        prepare(data, BASE)
    shown = preview(data, BASE, 1)  # shows them anyway
    assert _end_lines(shown) == [
        "stop tokens: </s>",
        "no row ends with a stop token",
        "2 training rows end without a stop token",
        "training refuses such rows unless data.require_stop is false",
    ]
    prepared = prepare(data.model_copy(update={"require_stop": False}), BASE)
    save(prepared, tmp_path / "data")
    assert load(tmp_path / "data").stop_tokens == prepared.stop_tokens == [2]


def test_a_given_eos_token_is_written_and_ends_answers() -> None:
    base = WITH_TURNS.model_copy(update={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(base, CHATML.replace("<|im_end|>", "{{ eos_token }}"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert stops(tokenizer, ends(tokenizer, turns())) == ["<|im_end|>"]
    found = ends(tokenizer, {"prompt": "2 + 2 =", "completion": "4"}, format="prompt")
    assert (stops(tokenizer, found), found.num_ended) == (["<|im_end|>"], 1)
    with pytest.raises(RequestError, match=r"base\.eos_token '<\|end\|>' is not a token of embedded"):
        load_tokenizer(BASE.model_copy(update={"eos_token": "<|end|>"}))


def test_labels_decide_which_stop_tokens_count(chatml: Any) -> None:
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    rows = [Tokens([1, 70, end], [1, 70, label], 1, True) for label in (end, IGNORED)]
    found = StopFinder(chatml).ends_of(rows, section())
    assert (found.num_ended, found.num_not_learned, found.last_text) == (1, 1, chatml.decode([1, 70, end]))


def test_an_expected_answer_has_no_stop_tokens(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    completions = ["4 </s>", "5</s>\n", "6", "7 </s></s>"]
    rows.write_text("".join(json.dumps({"prompt": "2 =", "completion": text}) + "\n" for text in completions))
    prepared = prepare(section(source=str(rows), format="prompt", held_out={"count": 3}), BASE)
    assert {prompt.answer for prompt in prepared.prompts} < {"4", "5", "6", "7"}

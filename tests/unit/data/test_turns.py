"""Conversations token for token: ShareGPT, tools, several answers, a given chat template."""

import json
from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.data.encode import IGNORED, encode
from orchestrator.data.render import render
from orchestrator.data.row import Row
from orchestrator.errors import DataError
from orchestrator.spec.sections import BaseSection, DataSection

BASE = BaseSection(model="embedded")
CHATML = (
    "{% for m in messages %}<|{{ m['role'][0] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
TOOLS = (
    "{% for t in tools or [] %}{{ t['function']['name'] }}:{% endfor %}"
    "{% for m in messages %}<|{{ m['role'][0] }}|>{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] %}{{ f['name'] }}{{ f['arguments'] | tojson }}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|a|>{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|u|>{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
TURNS = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
MESSAGES = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
FROM = {"user": "human", "assistant": "gpt", "system": "system"}
SHAREGPT = {
    "conversations": [{"from": FROM[role], "value": value, "weight": None} for role, value in [("system", "5"), *TURNS]]
}
CALL = {"function": {"name": "+", "arguments": '{"a": 1}'}}
CALLING = {
    "tools": json.dumps([{"type": "function", "function": {"name": "+", "parameters": {}}}]),
    "messages": [
        {"role": "user", "content": "1", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "+"},
        {"role": "assistant", "content": "3"},
    ],
}


def encoded(columns: dict[str, Any], template: str | None = None, **section: Any) -> tuple[list[int], str, str, str]:
    """Return the ids, the tokens with trained ones in brackets, the prompt and the answer."""
    data = DataSection.model_validate({"source": "x/y", "format": "messages", "chat_template": template, **section})
    tokenizer = load_tokenizer(BASE, template)
    example = render(Row(columns, "x:1"), data, tokenizer)
    tokens = encode(example, tokenizer, data)
    names = tokenizer.convert_ids_to_tokens(tokens.ids)
    marked = [f"[{name}]" if label != IGNORED else name for name, label in zip(names, tokens.labels, strict=True)]
    return tokens.ids, " ".join(marked), tokenizer.decode(tokens.ids[: tokens.num_prompt]), example.answer


def test_the_last_answer_or_every_answer() -> None:
    columns = MESSAGES
    ids, tokens, prompt, answer = encoded(columns, loss_on="assistant")
    assert ids == [
        1, 62, 263, 64, 224, 20, 264, 263, 64, 224, 21, 224, 2, 1, 62, 263, 64, 224, 22, 264, 263, 64, 224, 23, 224, 2
    ]  # fmt: skip
    head = "[ INST ] Ġ {} Ġ[/ INST ]"
    assert tokens == f"<s> {head.format(1)} [Ġ] [2] [Ġ] [</s>] <s> {head.format(3)} [Ġ] [4] [Ġ] [</s>]"
    assert (prompt, answer) == ("<s>[INST] 1 [/INST] 2 </s><s>[INST] 3 [/INST]", "4")
    last = encoded(columns, loss_on="completion")
    assert last[0] == ids
    assert last[1] == f"<s> {head.format(1)} Ġ 2 Ġ </s> <s> {head.format(3)} [Ġ] [4] [Ġ] [</s>]"
    everything = encoded(columns)
    assert everything[0] == ids
    assert all(token.startswith("[") for token in everything[1].split())


def test_sharegpt_with_a_given_template() -> None:
    ids, tokens, prompt, answer = encoded(SHAREGPT, CHATML, format="sharegpt", loss_on="assistant")
    assert tokens == "< | s | > 5 </s> < | u | > 1 </s> < | a | > [2] [</s>] < | u | > 3 </s> < | a | > [4] [</s>]"
    assert ids[:7] == [31, 95, 86, 95, 33, 24, 2]
    assert (prompt, answer) == ("<|s|>5</s><|u|>1</s><|a|>2</s><|u|>3</s><|a|>", "4")


def test_tool_calls_are_answers_and_tool_results_are_not() -> None:
    _, tokens, prompt, answer = encoded(CALLING, TOOLS, loss_on="assistant")
    call = '[+] [{] ["] [a] ["] [:] [Ġ] [1] [}] [</s>]'
    assert tokens == f"+ : < | u | > 1 </s> < | a | > {call} < | t | > 2 </s> < | a | > [3] [</s>]"
    assert prompt == '+:<|u|>1</s><|a|>+{"a": 1}</s><|t|>2</s><|a|>'
    assert answer == "3"
    calls = {**CALLING, "messages": CALLING["messages"][:2]}
    assert encoded(calls, TOOLS, loss_on="completion")[3] == '+{"a": 1}', "the answer is the call"
    columns = {**CALLING, "messages": [CALLING["messages"][0], {**CALLING["messages"][1], "content": "3 "}]}
    assert encoded(columns, TOOLS, loss_on="completion")[3] == '3 +{"a": 1}', "with the content beside it"


def test_a_template_may_render_a_call_without_the_content_beside_it() -> None:
    """Llama 3.1's template does; the calls are in the text."""
    bare = TOOLS.replace("{{ m['content'] }}", "{% if not m['tool_calls'] %}{{ m['content'] }}{% endif %}")
    columns = {**CALLING, "messages": [CALLING["messages"][0], {**CALLING["messages"][1], "content": "let me see"}]}
    assert encoded(columns, bare, loss_on="completion")[3] == '+{"a": 1}'


def test_the_templates_own_generation_tags_are_used() -> None:
    _, tokens, _, _ = encoded(MESSAGES, MARKED, loss_on="assistant")
    assert tokens == "< | u | > 1 Ċ < | a | > [2] [</s>] Ċ < | u | > 3 Ċ < | a | > [4] [</s>]"
    theirs = load_tokenizer(BASE, MARKED).apply_chat_template(
        MESSAGES["messages"], return_assistant_tokens_mask=True, return_dict=True
    )
    trained = [token.startswith("[") for token in tokens.split()]
    assert [bool(mask) for mask in theirs["assistant_masks"]][: len(trained)] == trained


def test_space_before_an_answer_is_trained_with_tags_and_without() -> None:
    """A prompt ends before it, so the model has to write it."""
    spaced = MARKED.replace("<|a|>", "<|a|>\n")
    _, tokens, prompt, _ = encoded(MESSAGES, spaced, loss_on="assistant")
    assert tokens == "< | u | > 1 Ċ < | a | > [Ċ] [2] [</s>] Ċ < | u | > 3 Ċ < | a | > [Ċ] [4] [</s>]"
    assert prompt.endswith("<|a|>")
    plain = spaced.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert encoded(MESSAGES, plain, loss_on="completion")[1].endswith("< | a | > [Ċ] [4] [</s>]")


def test_a_doubled_bos_does_not_shift_answers() -> None:
    _, tokens, _, _ = encoded(MESSAGES, "<s><s>" + CHATML, loss_on="assistant")
    assert tokens == "<s> < | u | > 1 </s> < | a | > [2] [</s>] < | u | > 3 </s> < | a | > [4] [</s>]"


def turns(*given: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(given), **columns}


USER, ANSWER = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
NO_TOOLS, LAST_ENDS = (
    CHATML,
    CHATML.replace("{{ eos_token }}", "{% if loop.last and 'a' in m['role'] %}</s>{% endif %}"),
)

KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}<|{{ m['role'][0] }}|>{{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
ONLY_USERS = KNOWN_ROLES.replace("['user', 'assistant']", "['user']")

WRONG: dict[str, tuple[dict[str, Any], str | None, dict[str, Any], str]] = {
    "role the template does not know": (turns({"role": "system", "content": "s"}, USER, ANSWER), None, {}, "refuses"),
    "role the template passes by": (
        turns({"role": "usr", "content": "1"}, ANSWER), KNOWN_ROLES, {}, "leaves turn 1 out, of role 'usr'"
    ),
    "system turn left out": (
        turns({"role": "system", "content": "s"}, USER, ANSWER), KNOWN_ROLES, {}, "leaves turn 1 out, of role 'system'"
    ),
    "answer left out": (turns(USER, ANSWER), ONLY_USERS, {}, "leaves turn 2 out, of role 'assistant'"),
    "content with an image": (
        turns({"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "1"}]}, ANSWER),
        CHATML, {}, "a turn's content has a part of type image; only text is read",
    ),
    "reasoning left out": (
        turns(USER, {**ANSWER, "reasoning_content": "3"}), CHATML, {},
        "the chat template leaves reasoning_content of a turn out",
    ),
    "thinking left out": (turns(USER, {**ANSWER, "thinking": "3"}), None, {}, "leaves thinking of a turn out"),
    "a call of before tools": (
        turns(USER, {**ANSWER, "function_call": {"name": "f", "arguments": "{}"}}), CHATML, {}, "leaves function_call"
    ),
    "half a weight": (turns(USER, {**ANSWER, "weight": 0.5}), CHATML, {}, "weight of a turn must be 0 or 1.*got 0.5"),
    "loss of text": (turns(USER, {**ANSWER, "loss": "no"}), CHATML, {}, "loss of a turn must be 0 or 1.*got 'no'"),
    "two marks that differ": (
        turns(USER, {**ANSWER, "weight": 1, "train": False}), CHATML, {}, "weight and train of a turn contradict"
    ),
    "nothing to learn of the last": (
        turns(USER, ANSWER, USER, {**ANSWER, "weight": 0}), CHATML, {"loss_on": "completion"},
        "the last answer has weight 0",
    ),
    "nothing to learn of any": (
        turns(USER, {**ANSWER, "weight": 0}), CHATML, {"loss_on": "assistant"}, "every assistant turn has weight 0"
    ),
    "a column history": (turns(USER, ANSWER, history=[["1", "2"]]), CHATML, {}, "column 'history' is not empty, but"),
    "two systems": (
        turns({"role": "system", "content": "s"}, USER, ANSWER, system="t"), CHATML, {}, "the system turn differ"
    ),
    "a system of objects": (turns(USER, ANSWER, system={"a": 1}), CHATML, {}, "column system must be text"),
    "a completion of several turns": (
        {"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, CHATML, {"loss_on": "completion"},
        "column completion has 3 turns, but loss_on completion trains only the last",
    ),
    "tools left out": (CALLING | {"messages": [USER, ANSWER]}, NO_TOOLS, {}, "leaves the column tools out"),
    "calls left out": (turns(*CALLING["messages"]), NO_TOOLS, {}, "leaves tool_calls out"),
    "answers written otherwise": (MESSAGES, LAST_ENDS, {"loss_on": "assistant"}, "renders turn 2 differently"),
    "no question": (
        turns(ANSWER, USER, ANSWER),
        CHATML,
        {"loss_on": "assistant"},
        "the first turn is an answer without a question",
    ),
    "only an answer": (turns(ANSWER), CHATML, {}, "the assistant's turn is the only one"),
    "a user who calls": (turns({**USER, "tool_calls": [CALL]}, ANSWER), TOOLS, {}, "only the assistant has tool_calls"),
    "a call without a name": (
        turns(USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}), TOOLS, {}, "needs a function with a name"
    ),
    "arguments of text": (
        turns(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}),
        TOOLS, {}, "the arguments of f are not JSON",
    ),
    "arguments in a list": (
        turns(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
        TOOLS, {}, "the arguments of f must be an object",
    ),
    "tools of text": (turns(USER, ANSWER, tools="{"), TOOLS, {}, "column tools is not JSON"),
    "tools of names": (turns(USER, ANSWER, tools=["add"]), TOOLS, {}, "tools must be a list of objects"),
    "sharegpt of an unknown speaker": (
        {"conversations": [{"from": "bing", "value": "1"}]}, CHATML, {"format": "sharegpt"}, "is from 'bing'; known are"
    ),
    "sharegpt of a speaker who is not in the map": (
        {"conversations": [{"from": "bing", "value": "1"}]}, CHATML,
        {"format": "sharegpt", "roles": {"bard": "assistant"}}, "observation, bard",
    ),
    "sharegpt without a value": (
        {"conversations": [{"from": "human"}]}, CHATML, {"format": "sharegpt"}, "needs a from and a value"
    ),
    "sharegpt of messages": (
        MESSAGES, CHATML, {"format": "sharegpt"}, "no column 'conversations'; columns: 'messages'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_conversation_is_refused_with_the_reason(name: str) -> None:
    columns, template, section, message = WRONG[name]
    with pytest.raises(DataError, match=rf"^x:1: .*{message}"):
        encoded(columns, template, **section)


def test_a_template_may_change_earlier_turns() -> None:
    """Some templates leave out the reasoning of earlier answers."""
    thinking = CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
    columns = turns(USER, {"role": "assistant", "content": "<think>1</think>2"}, USER, ANSWER)
    assert encoded(columns, thinking)[1].count("[2]") == 2


U, A, EOS = "< | u | > 1 </s>", "< | a | >", "</s>"
"""Tokens in CHATML: a user's turn, and the beginning of an answer."""


def trained(columns: dict[str, Any], template: str = CHATML, **section: Any) -> int:
    return encoded(columns, template, **section)[1].count("[")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}])
def test_an_answer_with_weight_0_is_not_trained(mark: dict[str, Any]) -> None:
    columns = turns(USER, {**ANSWER, **mark}, USER, {**ANSWER, "weight": 1})
    first, last = f"{U} {A} 2 {EOS}", f"{U} {A} [2] [{EOS}]"
    assert encoded(columns, CHATML, loss_on="assistant")[1] == f"{first} {last}"
    assert encoded(columns, CHATML, loss_on="completion")[1] == f"{first} {last}"
    everything = encoded(columns, CHATML)[1].split()
    is_trained = [token.startswith("[") for token in everything]
    # 7 tokens of the question and 5 of the answer's header, without the answer and its end; then all 14.
    assert is_trained == [True] * 12 + [False] * 2 + [True] * 14
    of_sharegpt = {
        "conversations": [
            {"from": FROM[turn["role"]], "value": turn["content"], **{k: v for k, v in turn.items() if k in mark}}
            for turn in columns["messages"]
        ]
    }
    assert trained(of_sharegpt, format="sharegpt", loss_on="assistant") == 2


def test_a_question_with_weight_0_is_not_trained() -> None:
    columns = turns({**USER, "train": False}, ANSWER, {**USER, "train": False}, ANSWER)
    question = "< | u | > 1 </s>"
    answer = "[<] [|] [a] [|] [>] [2] [</s>]"
    assert encoded(columns, CHATML)[1] == f"{question} {answer} {question} {answer}"
    nothing = turns(*({**turn, "weight": 0} for turn in (USER, ANSWER)))
    with pytest.raises(DataError, match="x:1: every turn has weight 0"):
        encoded(nothing, CHATML)


def test_weights_with_a_template_that_has_generation_tags() -> None:
    columns = turns(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1})
    tokens = encoded(columns, MARKED, loss_on="assistant")[1]
    assert tokens == "< | u | > 1 Ċ < | a | > 2 </s> Ċ < | u | > 1 Ċ < | a | > [2] [</s>]"


def test_a_template_with_several_generation_tags_for_one_answer() -> None:
    """With two tags for each answer it is unknown which belongs to which, and all are trained."""
    twice = MARKED.replace(
        "{{ m['content'] }}{{ eos_token }}", "{{ m['content'] }}{% endgeneration %}-{% generation %}{{ eos_token }}"
    )
    columns = turns({**USER, "weight": 0}, ANSWER)
    assert encoded(columns, twice, loss_on="assistant")[1] == "< | u | > 1 Ċ < | a | > [2] - [</s>]"
    with pytest.raises(DataError, match="marks 4 answers of 2: it is unknown which one has weight 0"):
        encoded(turns(USER, {**ANSWER, "weight": 0}, USER, ANSWER), twice, loss_on="assistant")


def test_reasoning_that_the_template_renders_is_trained() -> None:
    thinking = CHATML.replace("{{ m['content'] }}", "{{ m['reasoning_content'] }}{{ m['content'] }}")
    columns = turns(USER, {**ANSWER, "reasoning_content": "3"})
    assert encoded(columns, thinking, loss_on="completion")[1] == f"{U} {A} [3] [2] [{EOS}]"
    with pytest.raises(DataError, match="the chat template leaves thinking of a turn out"):
        encoded(turns(USER, {**ANSWER, "thinking": "3"}), "{% if enable_thinking %}{% endif %}" + CHATML)
    on_purpose = "{# without reasoning_content #}" + CHATML
    assert encoded(columns, on_purpose, loss_on="completion")[1] == f"{U} {A} [2] [{EOS}]"


def test_the_column_system_becomes_the_first_turn() -> None:
    system = "< | s | > 5 </s>"
    assert encoded(turns(USER, ANSWER, system="5"), CHATML, loss_on="completion")[1] == f"{system} {U} {A} [2] [{EOS}]"
    pair = {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}], "system": "5"}
    assert encoded(pair, CHATML, format="sharegpt", loss_on="completion")[1] == f"{system} {U} {A} [2] [{EOS}]"
    same = turns({"role": "system", "content": "5"}, USER, ANSWER, system="5")
    assert encoded(same, CHATML)[1].count("s") == encoded(turns(USER, ANSWER, system="5"), CHATML)[1].count("s")
    assert encoded(turns(USER, ANSWER, system="", history=[]), CHATML) == encoded(turns(USER, ANSWER), CHATML)


def test_content_in_parts_is_joined() -> None:
    parts = turns(
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
    )
    plain = turns({"role": "user", "content": "12"}, {"role": "assistant", "content": "3"})
    assert encoded(parts, CHATML) == encoded(plain, CHATML)


def test_speakers_get_the_roles_of_the_map() -> None:
    columns = {"conversations": [{"from": "bing", "value": "1"}, {"from": "human", "value": "2"}]}
    roles = {"bing": "user", "human": "assistant"}
    assert encoded(columns, CHATML, format="sharegpt", roles=roles, loss_on="completion")[1] == f"{U} {A} [2] [{EOS}]"
    called = turns({**USER, "role": "person"}, {**ANSWER, "role": "model"})
    named = {"person": "user", "model": "assistant"}
    assert encoded(called, CHATML, roles=named) == encoded(turns(USER, ANSWER), CHATML)


def test_sharegpt_turns_with_other_keys() -> None:
    columns = {"conversations": [USER, ANSWER]}
    assert encoded(columns, CHATML, format="sharegpt") == encoded(turns(USER, ANSWER), CHATML)


def test_turns_in_prompt_and_completion() -> None:
    """TRL's conversational rows: turns in the prompt are not trained, unless everything is."""
    columns = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    head = f"{U} {A} 2 {EOS} {U} {A}"
    for loss_on in ("completion", "assistant"):
        assert encoded(columns, CHATML, loss_on=loss_on)[1:3] == (
            f"{head} [2] [{EOS}]",
            "<|u|>1</s><|a|>2</s><|u|>1</s><|a|>",
        )
    assert trained(columns) == 28
    several = {"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}
    assert trained(several, loss_on="assistant") == 4
    with pytest.raises(DataError, match=r"column 'prompt' is a list of turns.*\n.*data\.format: messages"):
        encoded(columns, format="prompt")

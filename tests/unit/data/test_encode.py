"""From a row to token ids: one BOS, one EOS, and labels on the requested tokens."""

import copy
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from tokenizers.processors import ByteLevel
from transformers import LlamaConfig

from orchestrator.data import render_prompt
from orchestrator.data.encode import IGNORED, Tokens, encode, encode_all
from orchestrator.data.render import Example, render
from orchestrator.data.row import Row
from orchestrator.deploy.chat import Chat, PromptForm
from orchestrator.errors import DataError
from orchestrator.spec.sections import DataSection
from orchestrator.spec.template import template_columns

TEMPLATE = "<s>[INST] {question} [/INST] {answer} </s>"
QUESTION, ANSWER = "What is 12 and 45?", "# 57"
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Name -> data section, columns of a row, and the texts of its two parts.
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "template": (
        {"format": "template", "template": TEMPLATE},
        {"question": QUESTION, "answer": ANSWER},
        f"<s>[INST] {QUESTION} [/INST]",
        f" {ANSWER} </s>",
    ),
    "bare template": (
        {"format": "template", "template": "Q: {question}\nA: {answer}"},
        {"question": QUESTION, "answer": ANSWER},
        f"<s>Q: {QUESTION}\nA:",
        f" {ANSWER}</s>",
    ),
    "prompt": (
        {"format": "prompt"},
        {"prompt": QUESTION, "completion": f" {ANSWER}"},
        f"<s>{QUESTION}",
        f" {ANSWER}</s>",
    ),
    "alpaca": (
        {"format": "alpaca"},
        {"instruction": QUESTION, "input": "", "output": ANSWER},
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{QUESTION}\n\n### Response:",
        f"\n{ANSWER}</s>",
    ),
    "sharegpt": (
        {"format": "sharegpt"},
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        f"<s>[INST] {QUESTION} [/INST]",
        f" {ANSWER} </s>",
    ),
    "messages": (
        {"format": "messages"},
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
        f"<s>[INST] {QUESTION} [/INST]",
        f" {ANSWER} </s>",
    ),
}


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "<s>hello",
        "hello</s>",
        "<s>hello</s>",
        "<s>hello </s>",
        "<s> hello </s>\n",
        "<s><s>hello</s></s>",
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>",
        "\n<s>hello</s>",
        "<s>hello</s> </s>",
    ],
)
def test_a_text_has_one_beginning_and_one_end(tokenizer: Any, text: str) -> None:
    tokens = _encoded(tokenizer, {"format": "text"}, {"text": text})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    turns = max(1, text.count("[INST]"))
    assert (tokens.ids[0], tokens.ids[-1]) == (bos, eos)
    assert bos != tokens.ids[1]
    assert eos != tokens.ids[-2]
    assert tokens.ids.count(bos) == tokens.ids.count(eos) == turns
    assert (tokens.labels, tokens.num_prompt) == (tokens.ids, 0)


def test_no_bos_is_added_if_the_tokenizer_adds_none(tokenizer: Any) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = ByteLevel()
    tokens = _encoded(plain, {"format": "text"}, {"text": "hello"})
    assert plain.decode(tokens.ids) == "hello</s>"


def test_each_format_with_a_prompt_is_tested_here() -> None:
    formats = {section["format"] for section, *_ in FORMATS.values()}
    assert formats | {"text"} == set(get_args(DataSection.model_fields["format"].annotation))


@pytest.mark.parametrize("name", FORMATS)
def test_prompt_and_completion(tokenizer: Any, name: str) -> None:
    section, columns, prompt, completion = FORMATS[name]
    tokens = _encoded(tokenizer, section, columns)
    assert tokenizer.decode(tokens.ids[: tokens.num_prompt]) == prompt
    assert tokenizer.decode(tokens.ids[tokens.num_prompt :]) == completion
    assert tokens.labels == tokens.ids, "loss_on: all"
    assert render(Row(columns, "x:1"), _section(section), tokenizer).answer == ANSWER


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_completions_tokens_are_in_the_loss(tokenizer: Any, name: str) -> None:
    section, columns, _, completion = FORMATS[name]
    tokens = _encoded(tokenizer, section | {"loss_on": "completion"}, columns)
    learned = [label for label in tokens.labels if label != IGNORED]
    assert tokenizer.decode(learned) == completion
    assert tokens.labels == [IGNORED] * tokens.num_prompt + learned
    assert tokens.ids == _encoded(tokenizer, section, columns).ids


@pytest.mark.parametrize("name", FORMATS)
def test_a_chat_prompt_has_the_tokens_of_training(tokenizer: Any, name: str) -> None:
    section, columns, _, _ = FORMATS[name]
    tokens = _encoded(tokenizer, section, columns)
    assert _chat_ids(tokenizer, section) == tokens.ids[: tokens.num_prompt]


def test_a_chat_adds_no_bos_to_a_chat_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML.replace("<|assistant|>\n", "<|assistant|>"))
    section, columns, _, _ = FORMATS["messages"]
    tokens = _encoded(tokenizer, section, columns)
    assert _chat_ids(tokenizer, section) == tokens.ids[: tokens.num_prompt]


def test_a_chat_template_that_ends_in_space(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }}" + CHATML)
    section, columns, _, _ = FORMATS["messages"]
    tokens = _encoded(tokenizer, section, columns)
    assert _chat_ids(tokenizer, section) == tokens.ids[: tokens.num_prompt]


def test_a_prompt_that_ends_in_space(tokenizer: Any) -> None:
    prompt = "### Question\nWhat?\n### Answer\n"
    tokens = _encoded(tokenizer, {"format": "prompt"}, {"prompt": prompt, "completion": ANSWER})
    assert _chat_ids(tokenizer, {"format": "prompt"}, prompt) == tokens.ids[: tokens.num_prompt]


def test_a_chat_template_decides_how_a_conversation_begins(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    tokens = _encoded(tokenizer, {"format": "messages"}, FORMATS["messages"][1])
    assert tokenizer.decode(tokens.ids) == f"<|user|>\n{QUESTION}</s>\n<|assistant|>\n{ANSWER}</s>"


def test_an_instruction_with_an_input(tokenizer: Any) -> None:
    columns = {"instruction": "add", "input": "1 {2}", "output": "3"}
    tokens = _encoded(tokenizer, {"format": "alpaca", "loss_on": "completion"}, columns)
    assert tokenizer.decode(tokens.ids) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nadd\n\n### Input:\n1 {2}\n\n"
        "### Response:\n3</s>"
    )
    names = tokenizer.convert_ids_to_tokens([label for label in tokens.labels if label != IGNORED])
    assert names == ["Ċ", "3", "</s>"]
    for nothing in (None, ""):
        without = _encoded(tokenizer, {"format": "alpaca"}, {**columns, "input": nothing})
        assert "Input" not in tokenizer.decode(without.ids)


# Side, max_length -> what is left of `<s> 1 Ġ 2 Ġ= [Ġ] [3] [</s>]`, and how many of it are the prompt's.
CUTS: dict[tuple[str, int], tuple[str, int] | None] = {
    ("right", 8): ("<s> 1 Ġ 2 Ġ= [Ġ] [3] [</s>]", 5),
    ("right", 7): ("<s> 1 Ġ 2 Ġ= [Ġ] [3]", 5),
    ("right", 5): None,
    ("left", 8): ("<s> 1 Ġ 2 Ġ= [Ġ] [3] [</s>]", 5),
    ("left", 7): ("<s> Ġ 2 Ġ= [Ġ] [3] [</s>]", 4),
    ("left", 4): ("<s> [Ġ] [3] [</s>]", 1),
    ("left", 3): ("<s> [3] [</s>]", 1),
}


@pytest.mark.parametrize(("side", "most"), CUTS)
def test_a_row_is_cut_on_the_requested_side(tokenizer: Any, side: str, most: int) -> None:
    columns = {"prompt": "1 2 =", "completion": " 3"}
    tokens = _encoded(tokenizer, {"format": "prompt", "loss_on": "completion"}, columns)
    assert tokens.ids == [1, 20, 224, 21, 295, 224, 22, 2]
    cut = tokens.cut(most, side)
    names = [] if cut is None else tokenizer.convert_ids_to_tokens(cut.ids)
    labels = [] if cut is None else cut.labels
    marked = [f"[{name}]" if label != IGNORED else name for name, label in zip(names, labels, strict=True)]
    assert (cut and (" ".join(marked), cut.num_prompt)) == CUTS[side, most]


def test_a_row_without_bos_is_cut_on_the_left_to_its_end() -> None:
    tokens = Tokens([5, 6, 7, 8], [5, 6, 7, 8], 0, starts_with_bos=False)
    cut = tokens.cut(3, "left")
    assert cut is not None
    assert cut.ids == [6, 7, 8]


def test_earlier_turns_belong_to_the_prompt(tokenizer: Any) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    columns = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokens = _encoded(tokenizer, {"format": "messages", "loss_on": "completion"}, columns)
    assert tokenizer.decode([label for label in tokens.labels if label != IGNORED]) == " d </s>"


def test_a_token_across_the_boundary_belongs_to_the_completion(tokenizer: Any) -> None:
    word = max((token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha()), key=len)
    tokens = _encoded(tokenizer, {"format": "prompt"}, {"prompt": word[:-1], "completion": word[-1]})
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["<s>", word, "</s>"]
    assert tokens.num_prompt == 1


def test_columns_are_filled_in_unchanged(tokenizer: Any) -> None:
    columns = {"question": "{answer} {{x}}", "answer": "{question}", "other": None}
    tokens = _encoded(tokenizer, {"format": "template", "template": "{{{question}}} {answer}"}, columns)
    assert tokenizer.decode(tokens.ids) == "<s>{{answer} {{x}}} {question}</s>"
    numbers = _encoded(
        tokenizer, {"format": "template", "template": "{question}= {answer}"}, {"question": 1, "answer": 2.5}
    )
    assert tokenizer.decode(numbers.ids) == "<s>1= 2.5</s>"


def test_the_completion_begins_at_the_last_field(tokenizer: Any) -> None:
    section = _section({"format": "template", "template": "{a} {b} {ab} -> {a}!"})
    example = render(Row({"a": "1", "b": "2", "ab": "3"}, "x:1"), section, tokenizer)
    assert (example.prompt, example.completion, example.answer) == ("1 2 3 ->", " 1!", "1")


def test_literal_braces_after_the_last_field(tokenizer: Any) -> None:
    section = _section({"format": "template", "template": "{question} {answer} {{answer}}"})
    example = render(Row({"question": "1", "answer": "2"}, "x:1"), section, tokenizer)
    assert (example.prompt, example.completion) == ("1", " 2 {answer}")


def test_columns_of_a_template() -> None:
    assert template_columns("{{x}} {b} {a} {b}") == ["b", "a", "b"]


def test_a_question_for_a_template_with_several_columns(tokenizer: Any) -> None:
    section = _section({"format": "template", "template": "{title}: {question} {answer}"})
    assert render_prompt("as it stands", section, tokenizer) == "as it stands"


def test_a_missing_chat_template_is_reported(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match=r"has no chat template\n.*data\.chat_template"):
        _encoded(tokenizer, {"format": "messages"}, FORMATS["messages"][1])


def test_a_chat_template_that_renders_the_prompt_differently_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ messages | length }}: {{ messages | map(attribute='content') | join }}"
    )
    with pytest.raises(DataError, match="x:1: the chat template renders the prompt by itself differently"):
        _encoded(tokenizer, {"format": "messages"}, FORMATS["messages"][1])


def _section(values: dict[str, Any]) -> DataSection:
    return DataSection.model_validate({"source": "embedded", **values})


def _encoded(tokenizer: Any, section: dict[str, Any], columns: dict[str, Any]) -> Tokens:
    data = _section(section)
    return encode(render(Row(columns, "x:1"), data, tokenizer), tokenizer, data)


def _chat_ids(tokenizer: Any, section: dict[str, Any], question: str = QUESTION) -> list[int]:
    """Return the token ids that a chat gives to the model."""
    given: list[int] = []

    def generate(input_ids: Any, streamer: Any, **_: Any) -> None:
        given.extend(input_ids[0].tolist())
        streamer.end()

    generation = SimpleNamespace(eos_token_id=2)
    model = SimpleNamespace(device="cpu", generate=generate, generation_config=generation, config=LlamaConfig())
    assert list(Chat(model, PromptForm(tokenizer, _section(section))).stream(question, max_new_tokens=1)) in ([], [""])
    return given


def test_many_rows_in_one_call_are_encoded_like_single_ones(tokenizer: Any) -> None:
    data = _section({"format": "prompt", "loss_on": "completion"})
    texts = [("1 2 =", " 3"), ("<s>ä", "\n</s>"), ("a" * 50, "b"), ("", "c")]
    examples = [Example(prompt, completion, completion) for prompt, completion in texts]
    calls: list[Any] = []

    class Counting:
        """A tokenizer that records its calls."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, given: Any, **options: Any) -> Any:
            calls.append(given)
            return tokenizer(given, **options)

    assert encode_all(examples, Counting(), data) == [encode(example, tokenizer, data) for example in examples]
    assert [len(call) for call in calls if call] == [4], "apart from the empty text, which shows whether BOS is added"

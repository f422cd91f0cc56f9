"""Prompt forms, conversations, sampling, and answers of the embedded base."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from orchestrator.adapters.bundle import Adapter, Origin, save_adapter
from orchestrator.base import load_base, load_tokenizer
from orchestrator.data.encode import encode
from orchestrator.data.render import render
from orchestrator.data.row import Row
from orchestrator.deploy.chat import Chat, Conversation, PromptForm, Sampling, open_chat, open_prompt_form, sampling_of
from orchestrator.deploy.find import find_adapter, load_adapter
from orchestrator.deploy.load import load_own_tokenizer
from orchestrator.errors import RequestError
from orchestrator.record import RowScores
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection, DataSection

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 and 2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And 4?"},
]
# Like many templates: with system turns, and a line break before the answer.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant]\n"
    "{% endif %}"
)
QUESTIONS = ["What is the total of 12 and 45?", "And of 4 and 3?"]


def section(format: str, **fields: Any) -> DataSection:
    return DataSection.model_validate({"source": "embedded", "format": format, **fields})


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = load_tokenizer(BaseSection(model="embedded"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, of format messages."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = TrialConfig(base=BaseSection(model="embedded", compute_dtype="float32"), data=section("messages"))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(config.base), lora)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    origin = Origin(config, "t1", 1, "eval/loss", {"eval/loss": 1.0}, "f", [2])
    scores = RowScores(losses=[1.0], hits=[0], tokens=[1])
    save_adapter(Adapter.of(model), load_tokenizer(config.base), folder, origin, scores)
    return folder


@pytest.fixture(scope="module")
def chat(adapter: Path) -> Chat:
    return open_chat(find_adapter(str(adapter), "runs"))


def answer_to(chat: Chat, question: Any, **options: Any) -> str:
    return "".join(chat.stream(question, 12, **options)).strip()


def ask(conversation: Conversation, question: str) -> str:
    return "".join(conversation.ask(question, 12)).strip()


def test_a_conversation_has_the_same_tokens_as_in_training(tokenizer: Any) -> None:
    data = section("messages")
    row = Row({"messages": [*TURNS, {"role": "assistant", "content": "7"}]}, "x:1")
    trained = encode(render(row, data, tokenizer), tokenizer, data)
    prompt = trained.ids[: trained.num_prompt]
    assert PromptForm(tokenizer, data).ids(TURNS) == prompt
    assert PromptForm(tokenizer, data, system="Be brief.").ids(TURNS[1:]) == prompt
    assert PromptForm(tokenizer, data, system="Be long.").ids(TURNS) == prompt, "an explicit system turn is kept"
    assert PromptForm(tokenizer, data).ids(TURNS[1:]) != prompt


def test_an_adapter_without_a_data_section_uses_its_chat_template(tokenizer: Any) -> None:
    assert (
        PromptForm(tokenizer, None).ids("Hi")
        == tokenizer("[user] Hi [assistant]\n", add_special_tokens=False).input_ids
    )
    tokenizer.chat_template = None
    assert PromptForm(tokenizer, None).ids("Hi") == tokenizer("Hi").input_ids


@pytest.mark.parametrize(
    "data", [section("template", template="{question} {answer}"), section("prompt"), section("text"), None]
)
def test_forms_of_single_questions_reject_turns_and_system_prompts(tokenizer: Any, data: DataSection | None) -> None:
    if data is None:
        tokenizer.chat_template = None
    trained = f"format {data.format}" if data else "without a chat template"
    PromptForm(tokenizer, data).ids("Hi")
    for form, question in [(PromptForm(tokenizer, data, "Be brief."), "Hi"), (PromptForm(tokenizer, data), TURNS[1:])]:
        with pytest.raises(RequestError, match=f"{trained}, which has no system prompt and no earlier turns"):
            form.ids(question)


def test_a_chat_template_without_system_turns(tokenizer: Any) -> None:
    form = PromptForm(tokenizer, section("messages"), "Be brief.")
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="ignores system prompts"):
        form.ids("Hi")
    tokenizer.chat_template = load_tokenizer(BaseSection(model="embedded")).chat_template
    with pytest.raises(RequestError, match="rejects turns of system, user: Only the roles user and assistant"):
        form.ids("Hi")


def test_a_system_prompt_is_rejected_before_the_model_is_loaded(adapter: Path) -> None:
    with pytest.raises(RequestError, match="rejects turns of system, user"):
        open_prompt_form(find_adapter(str(adapter), "runs"), system="Be brief.")


def test_adapter_and_base_remember_a_conversation_until_it_is_cleared(chat: Chat) -> None:
    for base_only in (False, True):
        conversation = Conversation(chat, base_only)
        first, second = (ask(conversation, question) for question in QUESTIONS)
        assert first == answer_to(chat, QUESTIONS[0], base_only=base_only)
        turns = [
            {"role": "user", "content": QUESTIONS[0]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": QUESTIONS[1]},
        ]
        assert second == answer_to(chat, turns, base_only=base_only)
        alone = answer_to(chat, QUESTIONS[1], base_only=base_only)
        assert base_only or second != alone  # the base was trained on single questions and ignores earlier turns
        conversation.clear()
        assert ask(conversation, QUESTIONS[1]) == alone
    assert answer_to(chat, QUESTIONS[0]) != answer_to(chat, QUESTIONS[0], base_only=True)


def test_closing_an_answer_stops_its_generation(chat: Chat) -> None:
    """Otherwise its thread would continue, without the adapter, during the next question."""
    expected = answer_to(chat, QUESTIONS[0])
    for base_only in (True, False):
        answer = chat.stream(QUESTIONS[0], 400, base_only=base_only)
        next(answer)
        answer.close()
        assert answer_to(chat, QUESTIONS[0]) == expected


def test_without_turns_questions_are_independent(chat: Chat) -> None:
    single = Chat(chat.model, PromptForm(chat.tokenizer, section("template", template="{question} {answer}")))
    conversation = Conversation(single)
    assert [ask(conversation, question) for question in QUESTIONS] == [answer_to(single, q) for q in QUESTIONS]


def test_sampling_is_repeatable_and_becomes_greedy(chat: Chat) -> None:
    def sampled(**options: Any) -> str:
        return answer_to(chat, QUESTIONS[0], sampling=Sampling(temperature=2.0, **options))

    greedy = answer_to(chat, QUESTIONS[0])
    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert sampled(seed=1) != greedy
    assert sampled(top_k=1) == sampled(top_p=1e-6) == greedy


def test_options_without_effect_on_greedy_answers_are_rejected() -> None:
    assert sampling_of(0, None, None, None) == Sampling()
    assert sampling_of(0.5, 0.9, 5, 1) == Sampling(0.5, 0.9, 5, 1)
    for name, values in {"--top-p": (0.9, None, None), "--top-k": (None, 5, None), "--seed": (None, None, 0)}.items():
        with pytest.raises(RequestError, match=f"{name}: has no effect on greedy answers"):
            sampling_of(0, *values)


def test_a_loaded_adapter_can_generate(adapter: Path, chat: Chat) -> None:
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel

    model, tokenizer = load_adapter(adapter)
    assert isinstance(model, PeftModel)
    assert not model.training
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    turns = [{"role": "user", "content": QUESTIONS[0]}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    produced = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == answer_to(chat, QUESTIONS[0])


def test_an_adapter_of_unknown_origin_uses_its_own_tokenizer(adapter: Path, tmp_path: Path, tokenizer: Any) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    adapter = find_adapter(str(tmp_path), "runs")
    assert load_own_tokenizer(adapter).chat_template != TEMPLATE
    tokenizer.save_pretrained(str(tmp_path))
    assert load_own_tokenizer(adapter).chat_template == TEMPLATE
    assert open_prompt_form(adapter, system="Be brief.").takes_turns


def test_a_stop_token_that_is_not_special_is_not_shown() -> None:
    """Decoding removes only special tokens."""
    import torch

    tokenizer = load_tokenizer(BaseSection(model="embedded", new_tokens=("<|end|>",)))
    end = tokenizer.convert_tokens_to_ids("<|end|>")

    def generate(input_ids: Any, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for token in [*tokenizer(" 4 4", add_special_tokens=False)["input_ids"], end]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    generation = SimpleNamespace(eos_token_id=[end, 2])
    model = SimpleNamespace(device="cpu", generate=generate, generation_config=generation, config=LlamaConfig())
    chat = Chat(model, PromptForm(tokenizer, section("prompt")))
    assert "".join(chat.stream("2 + 2 = <|end|>", max_new_tokens=8)) == " 4 4"

"""Questions in the form of the training rows, conversations, draws, and the model that answers; on the real base."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
# As many are: with a system turn, and a line break before the answer.
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
    """An adapter on messages, of random weights."""
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


def said(chat: Chat, question: Any, **options: Any) -> str:
    return "".join(chat.stream(question, 12, **options)).strip()


def asked(conversation: Conversation, question: str) -> str:
    return "".join(conversation.ask(question, 12)).strip()


def test_a_conversation_has_the_tokens_that_it_has_in_training(tokenizer: Any) -> None:
    data = section("messages")
    row = Row({"messages": [*TURNS, {"role": "assistant", "content": "7"}]}, "x:1")
    trained = encode(render(row, data, tokenizer), tokenizer, data)
    prompt = trained.ids[: trained.num_prompt]
    assert PromptForm(tokenizer, data).ids(TURNS) == prompt
    assert PromptForm(tokenizer, data, system="Be brief.").ids(TURNS[1:]) == prompt
    assert PromptForm(tokenizer, data, system="Be long.").ids(TURNS) == prompt, "its own system turn stays"
    assert PromptForm(tokenizer, data).ids(TURNS[1:]) != prompt


def test_an_adapter_that_does_not_say_is_asked_by_its_chat_template(tokenizer: Any) -> None:
    assert (
        PromptForm(tokenizer, None).ids("Hi")
        == tokenizer("[user] Hi [assistant]\n", add_special_tokens=False).input_ids
    )
    tokenizer.chat_template = None
    assert PromptForm(tokenizer, None).ids("Hi") == tokenizer("Hi").input_ids


@pytest.mark.parametrize(
    "data", [section("template", template="{question} {answer}"), section("prompt"), section("text"), None]
)
def test_single_questions_have_no_place_for_more(tokenizer: Any, data: DataSection | None) -> None:
    if data is None:
        tokenizer.chat_template = None
    trained = f"format {data.format}" if data else "without a chat template"
    PromptForm(tokenizer, data).ids("Hi")
    for form, question in [(PromptForm(tokenizer, data, "Be brief."), "Hi"), (PromptForm(tokenizer, data), TURNS[1:])]:
        with pytest.raises(RequestError, match=f"{trained}, which has no place for a system prompt or earlier turns"):
            form.ids(question)


def test_a_chat_template_without_system_turns(tokenizer: Any) -> None:
    form = PromptForm(tokenizer, section("messages"), "Be brief.")
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="leaves a system prompt out"):
        form.ids("Hi")
    tokenizer.chat_template = load_tokenizer(BaseSection(model="embedded")).chat_template
    with pytest.raises(RequestError, match="refuses turns of system, user: Only the roles user and assistant"):
        form.ids("Hi")


def test_a_system_prompt_is_refused_before_the_model_is_loaded(adapter: Path) -> None:
    with pytest.raises(RequestError, match="refuses turns of system, user"):
        open_prompt_form(find_adapter(str(adapter), "runs"), system="Be brief.")


def test_a_conversation_is_remembered_by_each_side_until_it_is_cleared(chat: Chat) -> None:
    for base_only in (False, True):
        conversation = Conversation(chat, base_only)
        first, second = (asked(conversation, question) for question in QUESTIONS)
        assert first == said(chat, QUESTIONS[0], base_only=base_only)
        turns = [
            {"role": "user", "content": QUESTIONS[0]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": QUESTIONS[1]},
        ]
        assert second == said(chat, turns, base_only=base_only)
        alone = said(chat, QUESTIONS[1], base_only=base_only)
        assert base_only or second != alone  # the base has learned single questions, and heeds no other
        conversation.clear()
        assert asked(conversation, QUESTIONS[1]) == alone
    assert said(chat, QUESTIONS[0]) != said(chat, QUESTIONS[0], base_only=True)


def test_who_leaves_an_answer_early_ends_it(chat: Chat) -> None:
    """Else its thread goes on, without the adapter, while the next question is answered."""
    wanted = said(chat, QUESTIONS[0])
    for base_only in (True, False):
        answer = chat.stream(QUESTIONS[0], 400, base_only=base_only)
        next(answer)
        answer.close()
        assert said(chat, QUESTIONS[0]) == wanted


def test_without_turns_each_question_stands_alone(chat: Chat) -> None:
    single = Chat(chat.model, PromptForm(chat.tokenizer, section("template", template="{question} {answer}")))
    conversation = Conversation(single)
    assert [asked(conversation, question) for question in QUESTIONS] == [said(single, q) for q in QUESTIONS]


def test_draws_repeat_with_their_seed_and_end_at_the_likeliest_token(chat: Chat) -> None:
    def drawn(**options: Any) -> str:
        return said(chat, QUESTIONS[0], sampling=Sampling(temperature=2.0, **options))

    greedy = said(chat, QUESTIONS[0])
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1) != greedy
    assert drawn(top_k=1) == drawn(top_p=1e-6) == greedy


def test_what_has_no_effect_on_greedy_answers_is_refused() -> None:
    assert sampling_of(0, None, None, None) == Sampling()
    assert sampling_of(0.5, 0.9, 5, 1) == Sampling(0.5, 0.9, 5, 1)
    for name, values in {"--top-p": (0.9, None, None), "--top-k": (None, 5, None), "--seed": (None, None, 0)}.items():
        with pytest.raises(RequestError, match=f"{name}: has no effect on greedy answers"):
            sampling_of(0, *values)


def test_a_loaded_adapter_answers_at_once(adapter: Path, chat: Chat) -> None:
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
    assert text.strip() == said(chat, QUESTIONS[0])


def test_an_adapter_of_unknown_origin_brings_its_tokenizer(adapter: Path, tmp_path: Path, tokenizer: Any) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    adapter = find_adapter(str(tmp_path), "runs")
    assert load_own_tokenizer(adapter).chat_template != TEMPLATE
    tokenizer.save_pretrained(str(tmp_path))
    assert load_own_tokenizer(adapter).chat_template == TEMPLATE
    assert open_prompt_form(adapter, system="Be brief.").takes_turns


def test_a_stop_token_that_is_not_special_is_not_shown() -> None:
    """Decoding leaves out special tokens alone."""
    import torch

    tokenizer = load_tokenizer(BaseSection(model="embedded", new_tokens=("<|end|>",)))
    end = tokenizer.convert_tokens_to_ids("<|end|>")

    def generate(input_ids: Any, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for token in [*tokenizer(" 4 4", add_special_tokens=False)["input_ids"], end]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    model = SimpleNamespace(device="cpu", generate=generate, generation_config=SimpleNamespace(eos_token_id=[end, 2]))
    chat = Chat(model, PromptForm(tokenizer, section("prompt")))
    assert "".join(chat.stream("2 + 2 = <|end|>", max_new_tokens=8)) == " 4 4"

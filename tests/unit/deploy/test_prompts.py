"""Prompts from a file, and answers to a file that appears when it is complete."""

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import load_base, load_tokenizer
from orchestrator.deploy.chat import Chat, PromptForm, Sampling
from orchestrator.deploy.prompts import new_file, read_prompts, write_answers
from orchestrator.errors import DataError, RequestError
from orchestrator.spec.sections import BaseSection, DataSection

BASE = BaseSection(model="embedded", compute_dtype="float32")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@pytest.fixture
def turns(tokenizer: Any) -> PromptForm:
    return PromptForm(tokenizer, DataSection.model_validate({"source": "embedded", "format": "messages"}))


@pytest.fixture
def single(tokenizer: Any) -> PromptForm:
    return PromptForm(tokenizer, DataSection.model_validate({"source": "embedded", "format": "prompt"}))


def test_prompts_of_both_kinds(tmp_path: Path, turns: PromptForm) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Größe?", "id": 3}) + "\n\n" + json.dumps({"messages": TURNS}) + "\n")
    text, conversation = read_prompts(path, turns)
    assert (text.as_dict(), conversation.as_dict()) == ({"prompt": "Größe?"}, {"messages": TURNS})
    assert (text.ids, conversation.ids) == (turns.ids("Größe?"), turns.ids(TURNS))


def test_lines_of_text(tmp_path: Path, single: PromptForm) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b'one\r\n\n  {"two"} \n')
    assert [each.question for each in read_prompts(path, single)] == ["one", '{"two"}']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\n\xff\n", "a.txt:2: is not UTF-8"),
        ("a.txt", b"\n \n", "a.txt: contains no prompt"),
        ("a.csv", b"prompt\n", "a.csv: must be a .jsonl or a .txt file"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "a.jsonl:2: is not JSON"),
        ("a.jsonl", b'\n["a"]\n', 'a.jsonl:2: must be a JSON object, got ."a"'),
        ("a.jsonl", b"", "a.jsonl: holds no row"),
        ("a.jsonl", b'{"prompt": " "}\n', "a.jsonl:1: prompt must be text"),
        ("a.jsonl", b'{"prompt": 3}\n', "a.jsonl:1: prompt must be text, but is 3"),
        ("a.jsonl", b'{"question": "a"}\n', "a.jsonl:1: needs either prompt or messages, but has question"),
        (
            "a.jsonl",
            b'{"prompt": "a", "messages": []}\n',
            "a.jsonl:1: needs either prompt or messages, but has prompt, messages",
        ),
        ("a.jsonl", b'{"messages": []}\n', "a.jsonl:1: messages must be a list of turns"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "a.jsonl:1: each turn needs a role and a content"),
        ("a.jsonl", json.dumps({"messages": TURNS[:2]}).encode(), "a.jsonl:1: the last turn must have the role user"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n' + json.dumps({"messages": TURNS}).encode(),
            "a.jsonl:2: .* no system prompt and no earlier turns",
        ),
    ],
)
def test_a_line_that_is_not_a_prompt_is_named(
    tmp_path: Path, single: PromptForm, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name, single)


def test_missing_files_are_named(tmp_path: Path, single: PromptForm) -> None:
    for name in ("no.txt", "no.jsonl"):
        with pytest.raises(DataError, match=f"{name}: there is no such"):
            read_prompts(tmp_path / name, single)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # some random adapters give empty answers
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(load_base(BASE), lora).eval()


@pytest.mark.long
def test_answers_with_a_seed_are_repeatable(tmp_path: Path, model: Any, single: PromptForm) -> None:
    (tmp_path / "prompts.txt").write_text("What is this?\n" * 3)
    prompts, texts = read_prompts(tmp_path / "prompts.txt", single), []
    for seed in (1, 1, 2):
        file = io.StringIO()
        assert list(write_answers(Chat(model, single), prompts, file, 6, 2, Sampling(2.0, seed=seed), False)) == [3]
        texts.append(file.getvalue())
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0].splitlines())) > 1, "each answer is sampled separately"


@pytest.mark.long
def test_answers_equal_those_of_single_questions_in_the_order_of_the_file(
    tmp_path: Path, model: Any, turns: PromptForm
) -> None:
    chat = Chat(model, turns)
    path, target = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    questions = [f"What is the total of {'1 and ' * (i % 4)}{i}?" for i in range(20)]
    path.write_text("\n".join(questions))
    written = []
    with new_file(target) as file:
        for number in write_answers(chat, read_prompts(path, turns), file, 6, 1, Sampling(), compare_base=True):
            (temporary,) = tmp_path.glob(".answers*")
            written.append((number, len(temporary.read_text().splitlines()), target.exists()))
    assert written == [(8, 8, False), (16, 16, False), (20, 20, False)]
    assert {each.name for each in tmp_path.iterdir()} == {"prompts.txt", "answers.jsonl"}
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == questions
    for line in (lines[0], lines[7], lines[19]):
        for key, base_only in (("answer", False), ("base_answer", True)):
            assert line[key] == "".join(chat.stream(line["prompt"], 6, base_only)).strip()
    assert len({line["answer"] for line in lines}) > 3
    assert any(line["answer"] != line["base_answer"] for line in lines)


@pytest.mark.parametrize("make", [lambda path: path.write_text("old"), lambda path: path.mkdir()])
def test_an_existing_target_is_not_changed(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "answers.jsonl")
    with pytest.raises(RequestError, match=r"answers\.jsonl: already exists"), new_file(tmp_path / "answers.jsonl"):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_target_that_cannot_be_created(tmp_path: Path) -> None:
    with (
        pytest.raises(RequestError, match=r"answers\.jsonl: cannot be created"),
        new_file(tmp_path / "no" / "answers.jsonl"),
    ):
        pass


def test_a_disk_that_fills_up_is_reported(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        with new_file(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RequestError, match=r"answers\.jsonl: cannot be written: .*No space left"):
        fill(tmp_path / "answers.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_file(tmp_path / "answers.jsonl") as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []

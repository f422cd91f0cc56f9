"""The embedded task's generator, and the files of the embedded base."""

import json
import math
import re
import struct
from collections.abc import Callable
from itertools import islice
from random import Random

import pytest
from tokenizers import Tokenizer

from orchestrator.embedded import BASE_DIR
from orchestrator.embedded.task import MARKS, NAMES, QUESTION_WORDS, SKILLS, Skill, plain_line, pretraining_lines, rows

MAX_NEW_TOKENS = 8


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def letters(text: str) -> list[str]:
    return re.findall(r"\b[a-z]\b", text)


# Each skill again, computed from the text.
EXPECTED: dict[str, Callable[[str], str]] = {
    "+": lambda text: str(sum(numbers(text))),
    "gap": lambda text: str(max(numbers(text)) - min(numbers(text))),
    "max": lambda text: str(sorted(numbers(text))[-1]),
    "rev": lambda text: " ".join(letters(text)[::-1]),
}

KEYWORDS = {
    "total": "+",
    "together": "+",
    "difference": "gap",
    "apart": "gap",
    "biggest": "max",
    "highest": "max",
    "backwards": "rev",
    "right": "rev",
}


def test_lines_follow_from_the_seed() -> None:
    first, again, other = (list(islice(pretraining_lines(seed), 200)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_rows_follow_from_the_seed() -> None:
    assert rows(200, seed=3) == rows(200, seed=3)
    assert rows(200, seed=3) != rows(200, seed=4)
    assert rows(300, seed=3)[:200] == rows(200, seed=3)


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.sign)
def test_plain_answers_are_right(skill: Skill) -> None:
    rng = Random(5)
    for _ in range(500):
        prompt, answer = plain_line(rng, skill)
        assert answer == (copied(prompt) if skill.sign == "copy" else EXPECTED[skill.sign](prompt)), prompt


def copied(prompt: str) -> str:
    """Return the words before the mark, without the name."""
    words = prompt.split()
    end = max(index for index, word in enumerate(words) if word in MARKS)
    return " ".join(word for word in words[:end] if word not in ("copy", *NAMES["copy"]))


def test_row_answers_are_right() -> None:
    seen = set()
    for row in rows():
        (keyword,) = [word for word in KEYWORDS if word in row["question"]]
        seen.add(keyword)
        assert row["answer"] == f"# {EXPECTED[KEYWORDS[keyword]](row['question'])}", row["question"]
    assert seen == set(KEYWORDS)


def test_held_out_questions_are_not_in_the_train_part() -> None:
    questions = [row["question"] for row in rows(2000)]
    assert len(questions) == 2000
    assert len(set(questions)) == 2000
    assert not set(questions[:1500]) & set(questions[1500:])


def test_no_line_contains_a_word_of_the_questions() -> None:
    assert "backwards" in QUESTION_WORDS
    lines = islice(pretraining_lines(0), 20_000)
    words = {word for line in lines for word in re.findall(r"[a-z]{2,}", line.lower())}
    assert not words & QUESTION_WORDS


def test_each_name_belongs_to_one_skill() -> None:
    names = [name for skill in SKILLS for name in (skill.sign, *NAMES[skill.sign])]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE_DIR / "tokenizer.json"))


def test_answers_fit_the_cap_on_generation(tokenizer: Tokenizer) -> None:
    lengths = {len(tokenizer.encode(f" {row['answer']} </s>", add_special_tokens=False).ids) for row in rows()}
    assert max(lengths) <= MAX_NEW_TOKENS


def test_completion_tokens_follow_the_prompts(tokenizer: Tokenizer) -> None:
    """Prompt and completion tokenized separately give the row's tokens: no token crosses the boundary."""
    for row in rows(200):
        prompt, completion = f"<s>[INST] {row['question']} [/INST]", f" {row['answer']} </s>"
        parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, completion)]
        assert tokenizer.encode(prompt + completion, add_special_tokens=False).ids == parts[0] + parts[1]


def test_tokenizer_splits_digits_takes_any_text_and_adds_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1072").tokens == ["<s>", "1", "0", "7", "2"]
    text = "Natalia sold 48/2 = <<48/2=24>>24 clips; caf\u00e9 \u6f22.\n#### 72"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_base_is_small() -> None:
    assert sum(path.stat().st_size for path in BASE_DIR.iterdir()) <= 4_000_000


def test_base_has_one_to_two_million_parameters_in_nf4_blocks() -> None:
    with (BASE_DIR / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert 1_000_000 <= sum(math.prod(entry["shape"]) for entry in tensors.values()) <= 2_000_000
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert all(size % 64 == 0 for entry in tensors.values() for size in entry["shape"])
    assert "lm_head.weight" not in tensors  # tied to the embeddings


def test_config_agrees_with_the_weights_and_tokenizer(tokenizer: Tokenizer) -> None:
    config = json.loads((BASE_DIR / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    for key, token in (("bos_token_id", "<s>"), ("eos_token_id", "</s>"), ("pad_token_id", "<pad>")):
        assert config[key] == tokenizer.token_to_id(token)

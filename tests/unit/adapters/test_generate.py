"""Answers: stop tokens and batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from orchestrator.adapters.generate import GREEDY, MAX_BATCH_TOKENS, answer, batches, generate_ids
from orchestrator.adapters.stops import GENERATION, read_stops, stop_at, stops_of, write_stops
from orchestrator.base import load_tokenizer
from orchestrator.errors import RecordError
from orchestrator.spec.sections import BaseSection


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer with the added token `<|end|>`, which is not special, so that decoding keeps it."""
    return load_tokenizer(BaseSection(model="embedded", new_tokens=("<|end|>",)))


class Model:
    """A fake model that gives the same answer to every prompt, and records the shapes of its inputs."""

    def __init__(self, answer_ids: list[int], stops: list[int]) -> None:
        self.device = "cpu"
        self.config = LlamaConfig(max_position_embeddings=100_000)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.shapes: list[tuple[int, ...]] = []
        self._answer_ids = answer_ids
        stop_at(self, stops)

    def eval(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.shapes.append(tuple(input_ids.shape))
        return torch.cat([input_ids, torch.tensor([self._answer_ids] * len(input_ids))], dim=1)


def test_an_answer_ends_before_a_stop_token_that_is_not_special(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ids = tokenizer(" 4 <|end|> 5", add_special_tokens=False)["input_ids"]
    assert answer(Model(ids, [end, 2]), tokenizer, [[1, 70]], 8, 4) == ["4"]
    assert answer(Model(ids, [2]), tokenizer, [[1, 70]], 8, 4) == ["4 <|end|> 5"]


def test_prompts_of_similar_length_share_a_batch_within_the_limits(tokenizer: Any) -> None:
    lengths = [5000, 10, 7000, 12, 11, 9000, 40_000]
    found = list(batches(lengths, max_new_tokens=100, batch_size=4))
    assert found == [[1, 4, 3], [0, 2], [5], [6]]
    for batch in found[:-1]:
        assert len(batch) * (max(lengths[i] for i in batch) + 100) <= MAX_BATCH_TOKENS
    assert list(batches([3] * 5, 8, 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 8, 2)) == []
    model = Model([80], [2])
    answer(model, tokenizer, [[1] * length for length in lengths], 100, 4, GREEDY)
    assert model.shapes == [(3, 12), (2, 7000), (1, 9000), (1, 40_000)]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 50.0},
        {"encoder_repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"suppress_tokens": range(1, 64)},
        {"begin_suppress_tokens": range(1, 64)},
        {"bad_words_ids": [[token] for token in range(1, 64)]},
    ],
)
def test_greedy_answers_do_not_depend_on_the_bases_generation_settings(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    stop_at(model, [1000])
    prompts = [list(range(1, start)) for start in (20, 40)]

    def answers(sampling: dict[str, Any]) -> list[list[int]]:
        return generate_ids(model, SimpleNamespace(pad_token_id=0), prompts, 12, 1, sampling)

    plain = answers(GREEDY)
    for name, value in settings.items():
        setattr(model.generation_config, name, value if isinstance(value, int | float) else list(value))
    assert answers(GREEDY) == plain
    assert answers({"do_sample": False}) != plain, "the settings have no effect, and the test shows nothing"


def test_writing_stop_tokens_keeps_other_generation_settings(tokenizer: Any, tmp_path: Any) -> None:
    assert read_stops(tmp_path) == []
    write_stops(tmp_path, [512, 2], tokenizer)
    assert read_stops(tmp_path) == [512, 2]
    # Like the file of Llama 2, which transformers reads but refuses to write.
    (tmp_path / GENERATION).write_text('{"do_sample": false, "temperature": 0.9, "eos_token_id": 2}')
    write_stops(tmp_path, [512], tokenizer)
    assert read_stops(tmp_path) == [512]
    assert '"temperature": 0.9' in (tmp_path / GENERATION).read_text()
    (tmp_path / GENERATION).write_text("[1]")
    with pytest.raises(RecordError, match=r"generation_config\.json: is damaged"):
        read_stops(tmp_path)


@pytest.mark.parametrize(("stops", "expected"), [([], None), ([2], 2), ([512, 2], [512, 2])])
def test_a_single_stop_token_is_not_a_list(stops: list[int], expected: Any) -> None:
    model = Model([], stops)
    assert model.generation_config.eos_token_id == expected
    assert stops_of(model) == stops

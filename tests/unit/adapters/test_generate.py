"""Answers: where they end, and what is answered together."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.adapters.generate import GREEDY, MAX_BATCH_TOKENS, answer, batches, exact_matches
from orchestrator.adapters.stops import GENERATION, read_stops, stop_at, stops_of, write_stops
from orchestrator.base import load_tokenizer
from orchestrator.data import Prompt
from orchestrator.errors import RecordError
from orchestrator.spec.sections import BaseSection


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """`<|end|>` is an added token, but not a special one, so that decoding does not leave it out."""
    return load_tokenizer(BaseSection(model="embedded", new_tokens=("<|end|>",)))


class Model:
    """Says the same after each prompt, as wide as the longest; keeps the shapes that it was given."""

    def __init__(self, said: list[int], stops: list[int]) -> None:
        self.device = "cpu"
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.shapes: list[tuple[int, ...]] = []
        self._said = said
        stop_at(self, stops)

    def eval(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.shapes.append(tuple(input_ids.shape))
        return torch.cat([input_ids, torch.tensor([self._said] * len(input_ids))], dim=1)


def test_an_answer_ends_before_a_stop_token_that_is_not_special(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    said = tokenizer(" 4 <|end|> 5", add_special_tokens=False)["input_ids"]
    assert answer(Model(said, [end, 2]), tokenizer, [[1, 70]], 8, 4) == ["4"]
    assert exact_matches(Model(said, [end]), tokenizer, [Prompt([1, 70], "4")], 8, 4) == [True]
    assert answer(Model(said, [2]), tokenizer, [[1, 70]], 8, 4) == ["4 <|end|> 5"]


def test_prompts_of_like_length_are_answered_together_and_no_batch_is_too_large(tokenizer: Any) -> None:
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


def test_a_folder_keeps_stop_tokens_and_what_else_is_in_its_generation_config(tokenizer: Any, tmp_path: Any) -> None:
    assert read_stops(tmp_path) == []
    write_stops(tmp_path, [512, 2], tokenizer)
    assert read_stops(tmp_path) == [512, 2]
    # As Llama 2's, which transformers reads but does not write.
    (tmp_path / GENERATION).write_text('{"do_sample": false, "temperature": 0.9, "eos_token_id": 2}')
    write_stops(tmp_path, [512], tokenizer)
    assert read_stops(tmp_path) == [512]
    assert '"temperature": 0.9' in (tmp_path / GENERATION).read_text()
    (tmp_path / GENERATION).write_text("[1]")
    with pytest.raises(RecordError, match=r"generation_config\.json: is damaged"):
        read_stops(tmp_path)


@pytest.mark.parametrize(("stops", "expected"), [([], None), ([2], 2), ([512, 2], [512, 2])])
def test_one_stop_token_is_a_number_for_readers_that_know_no_lists(stops: list[int], expected: Any) -> None:
    model = Model([], stops)
    assert model.generation_config.eos_token_id == expected
    assert stops_of(model) == stops

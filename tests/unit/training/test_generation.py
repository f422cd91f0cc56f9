"""Answers of the fast engine, several slots in one batch, against `generate` of transformers with PEFT's adapters."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_cases import FAMILY_CASES, MULTIMODAL_CASES
from test_decoder import open_model

from orchestrator.adapters.generate import generate_ids
from orchestrator.adapters.stops import stop_at
from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.step import generation
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, GenerationBatch
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.fast.step.generation import Asked
from orchestrator.training.fast.step.kv_cache import CachedInputs
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]

CASES = FAMILY_CASES | MULTIMODAL_CASES
LENGTHS = (5, 19, 2, 11, 8)
NEW, ALPHA = 12, 12
RANKS = {0: 2, 2: 4}
"""Slot -> rank of its adapter. The slot between them has none."""


class Setup:
    """An engine with two random adapters, and the same adapters in PEFT."""

    def __init__(self, model: Any, make_rows: MakeRows, make_table: MakeTable) -> None:
        from peft import LoraConfig, get_peft_model

        modules = list(expected_modules(model, LoraSection()))
        decoder = Decoder(model, torch.float32, max(LENGTHS) + NEW, keeps_base=True)
        adapters = Adapters(
            adapted_layers(model, modules), 3, max(RANKS.values()), torch.float32, torch.float32, torch.device("cpu")
        )
        self.engine = Engine(decoder, adapters, "nothing", None, on_gpu=False)
        self.rows = {slot: make_rows(*LENGTHS[: 3 + slot], seed=slot) for slot in RANKS}
        self._table, self._peft = make_table, {}
        for slot, rank in RANKS.items():
            settings = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=modules, init_lora_weights=False)
            if not self._peft:
                self.peft = get_peft_model(model, settings, adapter_name="0")
            else:
                self.peft.add_adapter(str(slot), settings)
            self._peft[slot] = str(slot)
            matrices = dict(adapters.matrices(slot, rank, adapters.weights))
            for name, parameter in self.peft.named_parameters():
                if f".{slot}.weight" in name and ".lora_" in name:
                    key = name.removeprefix("base_model.model.").removesuffix(f".{slot}.weight")
                    matrices.pop(key).copy_(parameter.detach())
            assert not matrices

    def asked(self, slot: int, stops: list[int]) -> GenerationBatch:
        table = self._table(0.3, scale=ALPHA / RANKS[slot], rank=RANKS[slot])
        return GenerationBatch(self.engine, Asked(slot, self.rows[slot], NEW, frozenset(stops), table))

    def answers(self, stops: list[int]) -> list[list[list[int]]]:
        return self.engine.generate([self.asked(slot, stops) for slot in RANKS])

    def exact(self, slot: int, stops: list[int]) -> list[list[int]]:
        self.peft.set_adapter(self._peft[slot])
        stop_at(self.peft, stops or [10_000])
        prompts = [self.rows[slot].ids(row).tolist() for row in range(len(self.rows[slot]))]
        return generate_ids(self.peft, SimpleNamespace(pad_token_id=0), prompts, NEW, 4)


@pytest.mark.parametrize("name", ["embedded, nf4", *CASES])
def test_the_tokens_are_those_of_transformers(
    name: str, tmp_path: Path, make_rows: MakeRows, make_table: MakeTable
) -> None:
    torch.manual_seed(0)
    setup = Setup(open_model(name, tmp_path), make_rows, make_table)
    whole = setup.answers([])
    assert whole == [setup.exact(slot, []) for slot in RANKS]
    assert whole[0] != whole[1][: len(whole[0])], "the adapters must differ"
    stops = [whole[0][0][3], whole[1][2][5]]
    ended = setup.answers(stops)
    assert ended == [setup.exact(slot, stops) for slot in RANKS]
    assert any(len(answer) < NEW for answer in ended[0])


@pytest.fixture
def setup(base: Any, make_rows: MakeRows, make_table: MakeTable) -> Setup:
    torch.manual_seed(0)
    return Setup(copy.deepcopy(base), make_rows, make_table)


def rooms(monkeypatch: pytest.MonkeyPatch, most: float) -> list[int]:
    """Return the sequences of each cache that is made from now on; one of more than `most` runs out of memory."""
    made: list[int] = []
    new_cache = Decoder.new_cache

    def limited(decoder: Decoder, sequences: int, positions: int) -> Any:
        made.append(sequences)
        if sequences > most:
            raise torch.OutOfMemoryError
        return new_cache(decoder, sequences, positions)

    monkeypatch.setattr(Decoder, "new_cache", limited)
    return made


def test_answers_do_not_depend_on_the_size_of_the_cache_and_of_a_pass(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = setup.answers([])
    made = rooms(monkeypatch, most=float("inf"))
    monkeypatch.setattr(generation, "MAX_BATCH_TOKENS", 3 * (max(LENGTHS) + NEW))
    monkeypatch.setattr("orchestrator.training.fast.step.engine.CPU_TOKENS", 16)
    assert setup.answers([]) == whole
    assert len(made) > 1
    assert sum(made) == sum(len(rows) for rows in setup.rows.values())


def test_a_cache_that_does_not_fit_is_halved(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = setup.answers([])
    made = rooms(monkeypatch, most=2)
    assert setup.answers([]) == whole
    assert made == [8, 4, 2, 2, 4, 2, 2]
    rooms(monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        setup.answers([])


def test_the_lengths_that_attention_gets_are_few(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    next_tokens = Decoder.next_tokens

    def noted(decoder: Decoder, inputs: CachedInputs, *arguments: Any) -> torch.Tensor:
        if inputs.reads_cache:
            lengths.append(inputs.length)
        return next_tokens(decoder, inputs, *arguments)

    monkeypatch.setattr(Decoder, "next_tokens", noted)
    whole = setup.answers([])
    assert lengths == [generation.LENGTH_STEP] * (NEW - 1)
    monkeypatch.setattr(generation, "LENGTH_STEP", 16)
    assert setup.answers([]) == whole
    assert lengths[NEW - 1 :] == [32] * (NEW - 1), "19 tokens of a prompt and 11 of its answer"


def test_each_slot_has_its_own_limit(setup: Setup) -> None:
    whole = setup.answers([])
    one, other = (setup.asked(slot, []) for slot in RANKS)
    short = replace(one, asked=replace(one.asked, max_new_tokens=1))
    assert setup.engine.generate([short, other]) == [[answer[:1] for answer in whole[0]], whole[1]]


def test_each_new_token_is_a_sign_of_life(setup: Setup) -> None:
    """Otherwise long answers would count as a hang."""
    passes: list[None] = []
    setup.engine.generate([setup.asked(0, [])], lambda: passes.append(None))
    assert len(passes) >= NEW
    passes.clear()
    stop_at(setup.peft, [10_000])
    prompts = [setup.rows[0].ids(0).tolist()]
    tokenizer = SimpleNamespace(pad_token_id=0)
    (answer,) = generate_ids(setup.peft, tokenizer, prompts, NEW, 4, on_token=lambda: passes.append(None))
    assert len(passes) == len(answer) == NEW

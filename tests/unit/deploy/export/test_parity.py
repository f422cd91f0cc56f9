"""Comparison of an export with its source."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.data.encode import IGNORED
from orchestrator.deploy.export import parity as parity_module
from orchestrator.deploy.export.parity import MIN_LOSS_TOLERANCE, ROUNDED, SAME, Parity, ask, measure_parity, rounding
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.errors import ExportError


@pytest.fixture
def model() -> Any:
    """An adapter that moves the logits of its base."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


ROWS = [
    {"input_ids": [1, 5, 7, 9, 2], "labels": [IGNORED, IGNORED, 7, 9, 2]},
    {"input_ids": [1, 4, 2], "labels": [IGNORED, 4, 2]},
]
CORRECT = Parity(0.005, 0.5, 0.1, 10.0, 0.5, 0.5, 20, num_layers=4)


def test_a_model_equals_itself(model: Any) -> None:
    found = measure_parity(ask(model, ROWS), model, ROWS)
    assert (found.difference, found.max_logit_difference, found.num_rows) == (0, 0, 2)
    assert found.largest_logit > 0
    assert found.loss_source == found.loss_exported == pytest.approx(score_rows(model, ROWS, 2).loss, rel=1e-6)
    assert found.is_seen
    found.require(SAME)


def test_an_export_without_the_adapter_differs_by_the_effect_of_the_adapter(model: Any) -> None:
    source = ask(model, ROWS)
    with model.disable_adapter():
        found = measure_parity(source, model, ROWS)
    assert found.difference == pytest.approx(found.effect, rel=1e-6)
    assert found.effect > ROUNDED["bfloat16"].rms  # of one layer
    assert not found.is_seen
    with pytest.raises(ExportError, match=r"logits differ by (\S+)% \(rms; the adapter moves them by \1%\)"):
        found.require(ROUNDED["bfloat16"])


def test_an_adapter_without_effect_is_never_seen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    found = measure_parity(ask(model, ROWS), model, ROWS)
    assert (found.effect, found.is_seen) == (0, False)


def test_the_largest_difference_is_found_in_any_row(model: Any) -> None:
    source = ask(model, ROWS)
    source.logits[1][0, 13] -= 3
    found = measure_parity(source, model, ROWS)
    assert found.max_logit_difference == pytest.approx(3, abs=1e-5)
    whole = math.hypot(*(logits.norm() for logits in source.logits))
    assert found.difference == pytest.approx(3 / whole)
    with pytest.raises(ExportError, match=r"does not answer as the adapter does: .* at most by 3 "):
        found.require(ROUNDED["bfloat16"])


def test_only_the_last_tokens_of_a_long_row_are_compared(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary of 200,000, the logits of a token take almost a megabyte."""
    whole = ask(model, ROWS)
    assert [len(logits) for logits in whole.logits] == [3, 2]
    monkeypatch.setattr(parity_module, "NUM_TOKENS", 2)
    cut = ask(model, ROWS)
    assert [len(logits) for logits in cut.logits] == [2, 2]
    assert torch.equal(cut.logits[0], whole.logits[0][1:])
    measure_parity(cut, model, ROWS).require(SAME)


@pytest.mark.parametrize("row", [0, 1])
def test_nan_always_fails(model: Any, row: int) -> None:
    source = ask(model, ROWS)
    model.get_base_model().lm_head.weight.data[ROWS[row]["input_ids"][1]] = math.nan
    found = measure_parity(source, model, ROWS)
    assert math.isnan(found.max_logit_difference)
    assert not found.is_seen
    with pytest.raises(ExportError):
        found.require(ROUNDED["bfloat16"])


@pytest.mark.parametrize(
    ("off", "passes"),
    [
        ({}, True),
        ({"difference": 0.014}, True),  # 0.75%, times sqrt(4)
        ({"difference": 0.016}, False),
        ({"difference": 0.042, "num_layers": 32}, True),
        ({"difference": 0.043, "num_layers": 32}, False),
        ({"max_logit_difference": 0.79}, True),  # 4% of 10, times sqrt(4)
        ({"max_logit_difference": 0.81}, False),
        ({"difference": 0.027, "num_recurrent": 2}, True),
        ({"difference": 0.029, "num_recurrent": 2}, False),
        ({"max_logit_difference": 2.2, "num_layers": 32}, True),
        ({"max_logit_difference": 2.3, "num_layers": 32}, False),
        ({"loss_exported": 0.514}, True),  # 2% of 0.5, and MIN_LOSS_TOLERANCE
        ({"loss_exported": 0.516}, False),
        ({"loss_exported": 0.484}, False),
    ],
    ids=str,
)
def test_each_measure_has_its_bound(off: dict[str, float], passes: bool) -> None:
    found = replace(CORRECT, **off)
    assert MIN_LOSS_TOLERANCE == 0.005
    if passes:
        found.require(ROUNDED["bfloat16"])
    else:
        with pytest.raises(ExportError, match="Nothing was left behind"):
            found.require(ROUNDED["bfloat16"])


def test_the_coarser_type_decides() -> None:
    assert rounding("float16", "bfloat16") == rounding("bfloat16", "float32") == ROUNDED["bfloat16"]
    assert rounding("float16", "float32") == ROUNDED["float16"]

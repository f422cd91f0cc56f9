"""What an export answers is held against its source."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.data.encode import IGNORED
from orchestrator.deploy.scoring.score import score_rows
from orchestrator.deploy.shipping.parity import LEAST_LOSS, ROUNDED, SAME, Parity, answers, compare, rounding
from orchestrator.errors import ExportError


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))


ROWS = [
    {"input_ids": [1, 5, 7, 9, 2], "labels": [IGNORED, IGNORED, 7, 9, 2]},
    {"input_ids": [1, 4, 2], "labels": [IGNORED, 4, 2]},
]


def test_a_model_is_the_same_as_itself(model: Any) -> None:
    found = compare(answers(model, ROWS), model, ROWS)
    assert found.max_logit_difference == 0
    assert found.num_rows == 2
    assert found.largest_logit > 0
    assert found.loss_source == found.loss_exported == pytest.approx(score_rows(model, ROWS, 2).loss, rel=1e-6)
    found.require(SAME)


def test_the_largest_difference_is_found_wherever_it_is(model: Any) -> None:
    source = answers(model, ROWS)
    source[1][0, 13] -= 3
    found = compare(source, model, ROWS)
    assert found.max_logit_difference == pytest.approx(3, abs=1e-5)
    with pytest.raises(ExportError, match="does not answer as the adapter does: largest logit difference 3"):
        found.require(ROUNDED["bfloat16"])


@pytest.mark.parametrize("row", [0, 1])
def test_a_model_that_gives_nan_is_never_near(model: Any, row: int) -> None:
    source = answers(model, ROWS)
    model.lm_head.weight.data[ROWS[row]["input_ids"][1]] = math.nan
    found = compare(source, model, ROWS)
    assert math.isnan(found.max_logit_difference)
    with pytest.raises(ExportError):
        found.require(ROUNDED["bfloat16"])


@pytest.mark.parametrize(
    ("logits", "loss", "passes"),
    [(0.79, 0.0, True), (0.81, 0.0, False), (0.0, 0.011, True), (0.0, 0.013, False), (0.0, -0.013, False)],
)
def test_logits_and_loss_have_their_bounds(logits: float, loss: float, passes: bool) -> None:
    found = Parity(logits, 10.0, 0.5, 0.5 + loss, 20)  # 8% of 10; 2% of 0.5 and LEAST_LOSS
    assert LEAST_LOSS == 0.002
    if passes:
        found.require(ROUNDED["bfloat16"])
    else:
        with pytest.raises(ExportError, match="Nothing was left behind"):
            found.require(ROUNDED["bfloat16"])


def test_the_coarser_type_decides() -> None:
    assert rounding("float16", "bfloat16") == rounding("bfloat16", "float32") == ROUNDED["bfloat16"]
    assert rounding("float16", "float32") == ROUNDED["float16"]

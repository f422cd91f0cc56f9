"""Engines: a trial that the requested engine does not support is refused at load, before a base or a GPU is needed."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.errors import SpecError
from orchestrator.spec import parse_spec
from orchestrator.spec.sections import TrainingSection

Document = dict[str, Any]

REFUSED = [
    ({"lora": {"bias": "all"}}, "lora.bias all"),
    ({"lora": {"bias": "lora_only"}}, "lora.bias lora_only"),
    ({"lora": {"dora": True}}, "lora.dora"),
    ({"lora": {"modules_to_save": ["norm"]}}, "lora.modules_to_save"),
    ({"lora": {"init": "eva"}}, "lora.init eva"),
    ({"lora": {"init": "olora"}}, "lora.init olora"),
    ({"base": {"model": "embedded", "quantization": "int8"}}, "base.quantization int8"),
    ({"base": {"model": "embedded", "new_tokens": ["<|a|>"]}}, "base.new_tokens"),
    ({"training": {"loss": "dft"}}, "training.loss dft"),
    ({"training": {"label_smoothing": 0.1}}, "training.label_smoothing"),
    ({"training": {"neftune_alpha": 5}}, "training.neftune_alpha"),
    ({"training": {"tf32": True, "precision": "none"}}, "training.tf32"),
    ({"training": {"optimizer": "adafactor"}}, "training.optimizer adafactor"),
    ({"training": {"optimizer": "ademamix_8bit"}}, "training.optimizer ademamix_8bit"),
    ({"training": {"precision": "fp16"}}, "training.precision fp16"),
    (
        {"training": {"optimizer": "paged_adamw_32bit", "adapter_dtype": "bfloat16"}},
        "training.optimizer paged_adamw_32bit with adapter_dtype bfloat16",
    ),
    (
        {"training": {"optimizer": "adamw_8bit", "adapter_dtype": "bfloat16"}},
        "training.optimizer adamw_8bit with adapter_dtype bfloat16",
    ),
]


def with_engine(document: Document, sections: Document, engine: str) -> Document:
    return document | sections | {"training": sections.get("training", {}) | {"engine": engine}}


@pytest.mark.parametrize(("sections", "reason"), REFUSED, ids=str)
def test_engine_fast_is_refused_with_the_reason(document: Document, sections: Document, reason: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(with_engine(document, sections, "fast"), "x.yaml")
    assert f"training.engine fast does not support {reason}; use auto or trl" in str(caught.value)


@pytest.mark.parametrize("engine", ["auto", "trl"])
@pytest.mark.parametrize(("sections", "reason"), REFUSED, ids=str)
def test_other_engines_accept_it_and_the_reason_is_known(
    document: Document, sections: Document, reason: str, engine: str
) -> None:
    config = parse_spec(with_engine(document, sections, engine)).trial_config({})
    assert config.fast_unsupported_reason() == reason


@pytest.mark.parametrize(
    "optimizer", ["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"]
)
def test_fast_supports_every_form_of_adamw(document: Document, optimizer: str) -> None:
    config = parse_spec(with_engine(document, {"training": {"optimizer": optimizer}}, "fast")).trial_config({})
    assert config.fast_unsupported_reason() is None


@pytest.mark.parametrize(
    "lora", [{"rslora": True}, {"layers_to_transform": [0]}, {"init": "gaussian"}, {"rank": 7, "alpha": 0.5}], ids=str
)
def test_fast_supports_other_scales_layers_and_initial_weights(document: Document, lora: dict[str, Any]) -> None:
    assert parse_spec(with_engine(document, {"lora": lora}, "fast")).trial_config({}).fast_unsupported_reason() is None


def test_a_search_over_values_that_fast_does_not_support_is_refused(document: Document) -> None:
    search = {"space": {"training.optimizer": {"choice": ["adamw_torch", "sgd"]}}}
    assert parse_spec(document | {"search": search})
    with pytest.raises(
        SpecError, match=r"the value 'sgd' gives .*engine fast does not support training\.optimizer sgd"
    ):
        parse_spec(document | {"search": search, "training": {"engine": "fast"}})


def test_the_defaults_choose_by_the_machine() -> None:
    section = TrainingSection()
    assert (section.engine, section.recompute, section.dequantize) == ("auto", "auto", "auto")


@pytest.mark.parametrize(
    ("field", "value"), [("engine", "slow"), ("dequantize", "never"), ("recompute", "yes"), ("recompute", 1)]
)
def test_other_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        TrainingSection.model_validate({field: value})

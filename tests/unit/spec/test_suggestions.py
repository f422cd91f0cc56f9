"""Suggestions for unknown fields: the intended field, by its dotted name."""

from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.suggestions import FIELD_OF_NAME

Document = dict[str, Any]


def message_of(document: Document, **sections: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(document | sections)
    return str(caught.value)


@pytest.mark.parametrize("name", FIELD_OF_NAME)
def test_a_name_of_another_library_suggests_our_field(document: Document, name: str) -> None:
    section, _, field = name.rpartition(".")
    field_of_ours, _, value = FIELD_OF_NAME[name].partition(": ")
    message = message_of(document, **({section: {field: 1}} if section else {field: 1}))
    assert f"{name}: unknown field; did you mean {FIELD_OF_NAME[name]}? " in message
    there, _, ours = field_of_ours.partition(".")
    if there != "scheduler":
        annotation: Any = SweepSpec.model_fields[there].annotation
        assert ours in annotation.model_fields
    if value:
        assert parse_spec(_with(document, there, {ours: value}))


def _with(document: Document, section: str, fields: Document) -> Document:
    return document | {section: document.get(section, {}) | fields}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"r": 8}}, "training.r: unknown field; did you mean lora.rank?"),
        ({"training": {"target_modules": ["q_proj"]}}, "did you mean lora.target_modules?"),
        ({"learning_rate": 1e-4}, "learning_rate: unknown field; did you mean training.learning_rate?"),
        ({"training": {"scheduler": {"kind": "asha"}}}, "training.scheduler: unknown field; did you mean scheduler?"),
        ({"lora": {"rnk": 8}}, "lora.rnk: unknown field; did you mean rank?"),
        ({"scheduler": {"asha": {}}}, "scheduler.asha: unknown field; asha is a value: write scheduler: {kind: asha,"),
        ({"scheduler": {"asha": {"grace_steps": 5}}}, "write scheduler: {kind: asha, ...}"),
        ({"scheduler": {"kind": "pbt", "pbt": {}}}, "scheduler.pbt: unknown field; pbt is a value: write sch"),
        ({"scheduler": {"none": {}}}, "scheduler.none: unknown field; none is a value"),
        ({"search": {"random": {}}}, "search.random: unknown field; random is a value: write search: {algor"),
        ({"search": {"optuna": {"sampler": "tpe"}}}, "write search: {algorithm: optuna, ...}"),
        ({"search": {"algorithm": "tpe"}}, "search.algorithm: tpe is a sampler of optuna: write algorithm: optuna, "),
        ({"search": {"algorithm": "cmaes"}}, "write algorithm: optuna, sampler: cmaes"),
        ({"search": {"algorithm": "asha"}}, "search.algorithm: asha is a scheduler: write it as scheduler.kind"),
        ({"search": {"space": {"lora.r": {"choice": [8]}}}}, "there is no field lora.r; did you mean lora.rank?"),
        ({"search": {"tied": {"lora.lora_alpha": "2 * lora.rank"}}}, "did you mean lora.alpha? fields of lora"),
        ({"search": {"space": {"training.lr": {"choice": [1e-4]}}}}, "did you mean training.learning_rate?"),
    ],
)  # fmt: skip
def test_an_unknown_field_suggests_the_intended_one(document: Document, sections: Document, expected: str) -> None:
    assert expected in message_of(document, **sections)


@pytest.mark.parametrize("section", ["data", "training", "search"])
@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds_that_some_library_refuses_are_refused(document: Document, section: str, seed: int) -> None:
    message = message_of(document, **{section: document.get(section, {}) | {"seed": seed}})
    assert f"{section}.seed: Input should be " in message
    assert f"(got {seed})" in message


@pytest.mark.parametrize(
    ("section", "field", "written", "meant"),
    [
        ("scheduler", "kind", "ASHA", "asha"),
        ("scheduler", "kind", "hyper_band", "hyperband"),
        ("training", "schedule", "cosin", "cosine"),
        ("training", "optimizer", "adamw", "adamw_torch"),
        ("training", "optimizer", "AdamW_8bit", "adamw_8bit"),
        ("search", "algorithm", "Random", "random"),
        ("base", "compute_dtype", "bf16", "bfloat16"),
        ("data", "format", "alpacca", "alpaca"),
    ],
)
def test_an_unknown_value_suggests_the_one_that_is_meant(
    document: Document, section: str, field: str, written: str, meant: str
) -> None:
    message = message_of(_with(document, section, {field: written}))
    assert f"; did you mean {meant}?" in message


def test_a_value_like_no_other_suggests_nothing(document: Document) -> None:
    assert "did you mean" not in message_of(_with(document, "training", {"schedule": "xyz"}))
    assert "did you mean" not in message_of(_with(document, "scheduler", {"kind": "xyz"}))
    assert "did you mean" not in message_of(_with(document, "training", {"schedule": 3}))

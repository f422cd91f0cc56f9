import json
from hashlib import sha256
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from orchestrator.errors import SpecError
from orchestrator.spec import SweepSpec, TrialConfig, parse_spec
from orchestrator.spec.axes import AXIS_KINDS, Axis
from orchestrator.spec.manual.schema import spec_schema
from orchestrator.spec.sections import OwnMetric
from orchestrator.spec.tied_values import evaluate_tied

Document = dict[str, Any]

SCORE = "def score(prompts, answers, references):\n    return [1.0] * len(answers)\n"


def _spec(document: Document, **search: Any) -> SweepSpec:
    return parse_spec(document | {"search": search})


@pytest.mark.parametrize(
    ("written", "probes"),
    [
        ({"choice": [8, 16, 32]}, [8, 16, 32]),
        ({"choice": [8]}, [8]),
        ({"grid": ["a", None]}, ["a", None]),
        ({"choice": [["q_proj"], ["q_proj", "v_proj"]]}, [["q_proj"], ["q_proj", "v_proj"]]),
        ({"uniform": [0, 0.5]}, [0, 0.5]),
        ({"uniform": [-1.0, 1.0]}, [-1.0, 1.0]),
        ({"loguniform": [1e-5, 1e-3]}, [1e-5, 1e-3]),
        ({"randint": [4, 9]}, [4, 8]),
        ({"randint": [4, 6]}, [4, 5]),
    ],
)
def test_an_axis_is_one_kind_with_its_values(written: dict[str, list[Any]], probes: list[Any]) -> None:
    axis = Axis.model_validate(written)
    assert axis.kind == next(iter(written))
    assert axis.probes() == probes
    assert axis.is_discrete == (axis.kind in ("choice", "grid"))
    assert axis.model_dump() == written
    assert Axis.model_validate_json(axis.model_dump_json()) == axis


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([8, 16], "must be one of {choice: [...]}"),
        ({}, "must be one of"),
        ({"choice": [1], "grid": [1]}, "must be one of"),
        ({"logunifrm": [1e-5, 1e-3]}, "got {'logunifrm': [1e-05, 0.001]}"),
        ({"kind": "choice", "values": [1]}, "must be one of"),
        ({"choice": 8}, "choice takes a list, got 8"),
        ({"choice": []}, "at least 1 item"),
        ({"choice": [8, 8]}, "choice contains a value twice: [8, 8]"),
        ({"uniform": [0.1]}, "uniform takes two numbers"),
        ({"uniform": [0.1, 0.2, 0.3]}, "uniform takes two numbers"),
        ({"uniform": ["0.1", 0.2]}, "uniform takes two numbers"),
        ({"uniform": [False, True]}, "uniform takes two numbers"),
        ({"uniform": [0.2, 0.1]}, "must hold low < high, but got (low=0.2, high=0.1)"),
        ({"uniform": [0.2, 0.2]}, "must hold low < high"),
        ({"loguniform": [0, 1e-3]}, "loguniform must hold low > 0, but got low=0"),
        ({"loguniform": [-1e-3, 1e-3]}, "loguniform must hold low > 0"),
        ({"randint": [1.0, 3.0]}, "randint takes two whole numbers"),
        ({"randint": [3, 3]}, "must hold low < high, but got (low=3, high=3)"),
        ({"randint": [8, 9]}, "randint leaves high out: [8, 9] contains only 8; use choice"),
        ({"lograndint": [8, 9]}, "lograndint leaves high out: [8, 9] contains only 8; use choice"),
    ],
)
def test_a_wrong_axis_is_refused_with_what_is_right(document: Document, written: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        _spec(document, space={"lora.rank": written})
    assert "search.space.lora.rank" in str(caught.value)
    assert message in str(caught.value)


def test_every_kind_is_tested() -> None:
    here = {"choice", "grid", "uniform", "loguniform", "randint"}
    in_test_space = {"quniform", "qloguniform", "lograndint", "qrandint", "qlograndint"}
    assert set(AXIS_KINDS) == here | in_test_space


@pytest.mark.parametrize(
    ("path", "axis", "wrong"),
    [
        ("lora.rank", {"choice": [16, 8, 0]}, "0"),
        ("lora.rank", {"choice": [16, "8"]}, "'8'"),
        ("lora.rank", {"randint": [0, 9]}, "0"),
        ("lora.dropout", {"uniform": [0.0, 1.5]}, "1.5"),
        ("lora.dropout", {"uniform": [-0.5, 0.5]}, "-0.5"),
        ("training.schedule", {"choice": ["cosine", "cosin"]}, "'cosin'"),
        ("base.quantization", {"grid": ["nf4", "int2"]}, "'int2'"),
    ],
)
def test_every_value_of_an_axis_must_fit_its_field(document: Document, path: str, axis: Any, wrong: str) -> None:
    algorithm = "grid" if "grid" in axis else "random"
    with pytest.raises(SpecError) as caught:
        _spec(document, algorithm=algorithm, space={path: axis})
    assert f"search.space.{path}: the value {wrong} gives {path}: " in str(caught.value)


def test_a_value_that_conflicts_with_another_field_is_refused(document: Document) -> None:
    document["training"] = {"adapter_dtype": "bfloat16"}
    with pytest.raises(SpecError, match="the value 'fp16' gives training: precision fp16"):
        _spec(document, space={"training.precision": {"choice": ["bf16", "fp16"]}})


def test_two_axes_whose_values_clash_are_refused(document: Document) -> None:
    space = {
        "lora.rank": {"grid": [4, 8]},
        "training.precision": {"grid": ["none", "fp16"]},
        "training.adapter_dtype": {"grid": ["float32", "bfloat16"]},
    }
    with pytest.raises(SpecError) as caught:
        _spec(document, algorithm="grid", space=space)
    both = "training.precision 'fp16' with training.adapter_dtype 'bfloat16' gives training: precision fp16 scales"
    assert f"spec: search.space: {both}" in str(caught.value)


WHOLE_FIELDS = ("lora.rank", "training.batch_size", "training.steps", "training.save_steps", "training.seed")
RATES = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}


@pytest.mark.parametrize("path", WHOLE_FIELDS)
@pytest.mark.parametrize(
    "axis",
    [
        {"uniform": [4, 16]},
        {"uniform": [4.0, 9.5]},
        {"loguniform": [4, 16]},
        {"quniform": [4, 16, 1]},
        {"quniform": [4, 16, 0.5]},
        {"qloguniform": [4, 16, 4]},
        {"uniform": [4, 16], "when": {"lora.dora": True}},
    ],
    ids=str,
)
def test_a_field_of_whole_numbers_takes_no_range_of_real_numbers(document: Document, path: str, axis: Any) -> None:
    with pytest.raises(SpecError) as caught:
        _spec(document, space={path: axis, "lora.dora": {"choice": [True, False]}})
    kind = next(iter(axis))
    rule = "a field of whole numbers takes choice, randint, lograndint, qrandint, qlograndint, not"
    assert f"search.space.{path}: {rule} {kind} {axis[kind]}" in str(caught.value)


@pytest.mark.parametrize("kind", ["uniform", "loguniform", "quniform", "qloguniform"])
def test_a_field_of_real_numbers_takes_ranges_with_whole_ends(document: Document, kind: str) -> None:
    axis = {kind: [1, 4, 0.5] if kind.startswith("q") else [1, 4]}
    spec = _spec(document, space={"lora.alpha": axis, "training.epochs": axis})
    assert all(type(value) is float for value in spec.search.space["lora.alpha"].probes()), "as they are drawn"


def test_a_fault_of_the_whole_file_names_no_axis(document: Document) -> None:
    document["lora"] = {"init": "pissa"}
    with pytest.raises(SpecError, match=r"^spec: lora\.init pissa needs weights that are not quantized"):
        _spec(document, space=RATES, tied={"lora.alpha": "2 * lora.rank"})
    assert _spec(document, space=RATES | {"base.quantization": {"choice": ["none"]}})


@pytest.mark.parametrize("inits", [["pissa"], ["pissa", "default"], ["default", "pissa"]], ids=str)
@pytest.mark.parametrize("before", [{}, RATES], ids=["only axis", "after another axis"])
def test_a_fault_names_the_axis_that_causes_it(document: Document, inits: list[str], before: Document) -> None:
    with pytest.raises(SpecError, match=r"^spec: search\.space\.lora\.init: the value 'pissa' gives lora\.init pissa"):
        _spec(document, space=before | {"lora.init": {"choice": inits}})


def test_a_fault_below_a_condition_names_the_axis_that_has_it(document: Document) -> None:
    dropout = {"choice": [0.1, 1.5], "when": {"training.optimizer": "sgd"}}
    space = {"training.optimizer": {"choice": ["adamw_torch", "sgd"]}, "lora.dropout": dropout}
    with pytest.raises(SpecError, match=r"^spec: search\.space\.lora\.dropout: the value 1\.5 gives lora\.dropout: "):
        _spec(document, space=space)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lora.rnk", "there is no field lora.rnk; did you mean rank? fields of lora: rank, alpha"),
        ("lora", "there is no field lora"),
        ("rank", "rank is not a field of a trial"),
        ("search.seed", "search.seed is not a field of a trial"),
        ("evaluation.rows", "evaluation.rows is not a field of a trial"),
        ("lora.rank.x", "there is no field lora.rank.x"),
        ("scheduler.grace_steps", "axes are fields of base, lora or training"),
    ],
)
def test_only_fields_of_a_trial_are_searched_or_tied(document: Document, path: str, message: str) -> None:
    for search in ({"space": {path: {"choice": [1]}}}, {"tied": {path: "1 * 1"}}):
        with pytest.raises(SpecError) as caught:
            _spec(document, **search)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "data.source",
        "data.config",
        "data.split",
        "data.format",
        "data.loss_on",
        "data.max_rows",
        "data.seed",
        "data.held_out",
        "data.held_out.share",
        "data.held_out.source",
        "data.max_length",
        "data.template",
    ],
)
def test_fields_that_change_the_held_out_tokens_cannot_be_searched(document: Document, path: str) -> None:
    value = "{question}: {answer}" if path == "data.template" else 64
    with pytest.raises(SpecError, match=rf"{path} cannot vary: .* held-out tokens"):
        _spec(document, space={path: {"choice": [value]}})


@pytest.mark.parametrize(
    ("search", "total"),
    [
        ({}, 1),
        ({"num_trials": 3}, 3),
        ({"num_trials": 3, "algorithm": "random"}, 1),
        ({"budget": {"tokens": 1000}}, 64),
        ({"num_trials": 3, "space": {"lora.rank": {"choice": [1, 2, 3]}}}, 3),
        ({"algorithm": "optuna", "space": {"lora.rank": {"choice": [1, 2]}}}, 2),
        ({"algorithm": "optuna", "space": {"lora.dropout": {"uniform": [0.1, 0.2]}}}, 10),
        ({"algorithm": "grid", "space": {}}, 1),
        ({"algorithm": "grid", "space": {"lora.rank": {"grid": [1, 2, 3]}}}, 3),
        ({"algorithm": "grid", "space": {"lora.rank": {"grid": [1, 2, 3]}, "lora.dropout": {"choice": [0.0, 0.1]}}}, 6),
    ],
)
def test_number_of_trials(document: Document, search: dict[str, Any], total: int) -> None:
    assert _spec(document, **search).search.total_trials == total


@pytest.mark.parametrize(
    ("metric", "mode", "resolved"),
    [
        ("eval/loss", None, "min"),
        ("eval/token_accuracy", None, "max"),
        ("eval/exact_match", None, "max"),
        ("eval/loss", "min", "min"),
        ("eval/token_accuracy", "max", "max"),
        ("eval/score", None, "max"),
        ("eval/score", "max", "max"),
        ("eval/score", "min", "min"),
    ],
)
def test_which_end_is_better(document: Document, metric: str, mode: str | None, resolved: str) -> None:
    own = OwnMetric(file="/m.py", function="score", sha256=sha256(SCORE.encode()).hexdigest(), source=SCORE)
    document["evaluation"] = {"metrics": ["exact_match", own.model_dump()]}
    assert _spec(document, metric=metric, mode=mode).search.resolved_mode == resolved


def test_a_trial_has_its_point_and_the_experiments_other_values(document: Document) -> None:
    document["lora"] = {"dropout": 0.2}
    spec = _spec(document, space={"lora.rank": {"choice": [4, 8]}, "training.learning_rate": {"uniform": [1e-4, 1e-3]}})
    config = spec.trial_config({"lora.rank": 8, "training.learning_rate": 5e-4})
    assert (config.lora.rank, config.lora.dropout, config.training.learning_rate) == (8, 0.2, 5e-4)
    assert config.varied == {"lora.rank": 8, "training.learning_rate": 5e-4}
    assert (config.base, config.data, config.evaluation) == (spec.base, spec.data, spec.evaluation)
    assert (spec.lora.rank, spec.training.learning_rate) == (16, 2e-4), "the experiment itself is as it was"
    assert TrialConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_a_point_out_of_bounds_is_refused(document: Document) -> None:
    with pytest.raises(ValueError, match=r"lora\.rank"):
        _spec(document).trial_config({"lora.rank": 0})


@pytest.mark.parametrize("rank", [1, 4, 7, 64])
def test_a_tied_value_follows_the_point(document: Document, rank: int) -> None:
    space = {"lora.rank": {"randint": [1, 65]}}
    config = _spec(document, space=space, tied={"lora.alpha": "2 * lora.rank"}).trial_config({"lora.rank": rank})
    assert config.lora.alpha == 2 * rank
    assert config.varied == {"lora.rank": rank, "lora.alpha": 2 * rank}


def test_a_tied_value_follows_the_experiment_if_nothing_is_searched(document: Document) -> None:
    document["lora"] = {"rank": 24}
    assert _spec(document, tied={"lora.alpha": "lora.rank / 2"}).trial_config({}).lora.alpha == 12


def test_a_tied_value_can_build_on_one_tied_before_it(document: Document) -> None:
    tied = {"lora.alpha": "2 * lora.rank", "training.weight_decay": "lora.alpha / 1000"}
    config = _spec(document, tied=tied).trial_config({"lora.rank": 8})
    assert (config.lora.alpha, config.training.weight_decay) == (16, 0.016)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"tied": {"lora.rank": "lora.alpha / 2"}},
            "spec: search.tied.lora.rank: 'lora.alpha / 2' gives lora.rank: Input should be a valid integer (got 16.0)",
        ),
        (
            {"tied": {"training.warmup": "10 * training.steps"}},
            "spec: search.tied.training.warmup: '10 * training.steps' gives training: warmup (1000 steps) must end",
        ),
        (
            {"tied": {"lora.rank": "lora.alpha"}, "space": {"lora.alpha": {"uniform": [2, 8]}}},
            "search.space.lora.alpha: the value 2.0 gives search.tied.lora.rank: 'lora.alpha' gives lora.rank: Input",
        ),
        ({"tied": {"lora.alpha": "lora.rnk"}}, "search.tied.lora.alpha there is no field lora.rnk"),
        ({"tied": {"lora.alpha": "2 * rank"}}, "search.tied.lora.alpha cannot use 'rank'"),
        ({"tied": {"lora.alpha": "lora.rank / 0"}}, "search.tied.lora.alpha cannot be computed: division by zero"),
        ({"tied": {"lora.alpha": "2 * base"}}, "cannot use 'base'"),
        ({"tied": {"lora.alpha": "0 - lora.rank"}}, "lora.alpha: Input should be greater than 0"),
        (
            {"tied": {"lora.rank": "4 * 2"}, "space": {"lora.rank": {"choice": [1]}}},
            "lora.rank is both searched and tied",
        ),
        (
            {"tied": {"lora.alpha": "1 / (lora.rank - 8)"}, "space": {"lora.rank": {"choice": [4, 8]}}},
            "search.space.lora.rank: the value 4 gives search.tied.lora.alpha: '1 / (lora.rank - 8)' gives lora.alpha",
        ),
        (
            {"tied": {"lora.alpha": "1 / (8 - lora.rank)"}, "space": {"lora.rank": {"choice": [4, 8]}}},
            "search.space.lora.rank: the value 8 gives search.tied.lora.alpha cannot be computed",
        ),
    ],
)
def test_a_wrong_tied_expression_is_refused_at_load(document: Document, search: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        _spec(document | {"training": {"steps": 100}}, **search)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("-a.x", -10),
        ("a.x + a.y - 1", 12),
        ("a.x * a.y", 30),
        ("a.x / 4", 2.5),
        ("a.x // 4", 2),
        ("a.y ** 2", 9),
        ("2 * (a.x + 1)", 22),
        ("2 * a.x + 1", 21),
        ("min(a.x, a.y, 5)", 3),
        ("max(a.x, a.y)", 10),
        ("round(a.x / a.y)", 3),
        ("round(a.x / a.y, 2)", 3.33),
        ("max(1, round(0.5 * a.y - 1e-1))", 1),
        ("deep.er.x", 5),
    ],
)
def test_arithmetic(expression: str, value: float) -> None:
    assert evaluate_tied(expression, {"a.x": 10, "a.y": 3, "deep.er.x": 5}.__getitem__) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "eval('1')",
        "().__class__",
        "lora.rank.__class__",
        "lora.__class__.__mro__",
        "'a' * 3",
        "[1][0]",
        "[x for x in (1,)]",
        "(lambda: 1)()",
        "print(lora.rank)",
        "min.__call__(1, 2)",
        "min(*[1, 2])",
        "round(number=1.5)",
        "True",
        "None",
        "1j",
        "1 if 1 else 2",
        "1 < 2",
        "1 and 2",
        "lora.rank % 2",
        "~1",
        "(x := 1)",
        "f'{1}'",
        "...",
        "1; 2",
        "x = 1",
        "import os",
        "2 *",
        "",
    ],
)
def test_nothing_but_arithmetic_is_executed(document: Document, expression: str) -> None:
    with pytest.raises(SpecError, match=r"search\.tied\.lora\.alpha (is not arithmetic|cannot use|there is no field)"):
        _spec(document, tied={"lora.alpha": expression})


@pytest.mark.parametrize("expression", ["2**20000", "+".join("1" * 20000), "-" * 100000 + "1"], ids=lambda e: e[:8])
def test_arithmetic_too_large_is_refused_too(document: Document, expression: str) -> None:
    with pytest.raises(SpecError):
        _spec(document, tied={"lora.alpha": expression})


def test_an_axis_is_finite(document: Document) -> None:
    with pytest.raises(SpecError):
        _spec(document, space={"training.learning_rate": {"uniform": [1e-5, float("inf")]}})


@pytest.mark.parametrize(("written", "share"), [("0.3%", 0.003), ("2 %", 0.02), (0.003, 0.003)])
def test_a_share_is_a_number_or_a_percentage(written: Any, share: float, document: Document) -> None:
    search = {"space": {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}, "num_trials": 40}
    assert _spec(document, **search, stop={"gain": written}).search.stop.gain == pytest.approx(share)
    validated = Draft202012Validator(spec_schema())
    assert validated.is_valid(document | {"search": search | {"stop": {"gain": written}}})


@pytest.mark.parametrize("written", ["0%", "100%", "1.2.3%", "0.3", "-1%", 1.0, 0])
def test_no_other_share_is_accepted(written: Any, document: Document) -> None:
    search = {"space": {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}, "num_trials": 40}
    with pytest.raises(SpecError, match=r"search\.stop\.gain"):
        _spec(document, **search, stop={"gain": written})

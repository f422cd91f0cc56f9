"""Rules between searcher, scheduler, search space and length: senseless combinations are refused with the reason."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.errors import RequestError, SpecError
from orchestrator.spec import load_spec, parse_spec
from orchestrator.spec.cross_checks import MUTABLE
from orchestrator.spec.sections.scheduler import FIELDS_OF_KIND

Document = dict[str, Any]

RATE = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}
RANK = {"lora.rank": {"choice": [4, 8]}}
UNIFORM = {"lora.dropout": {"uniform": [0, 0.5]}}
DROPOUT = {"lora.dropout": {"choice": [0.0, 0.1]}}
STEPS = {"steps": 100, "eval_steps": 10}


def search(algorithm: str = "random", space: Any = RATE, **fields: Any) -> Document:
    return {"search": {"algorithm": algorithm, "space": space, **fields}}


def scheduler(kind: str, **fields: Any) -> Document:
    return {"scheduler": {"kind": kind, **fields}}


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        # scheduler x searcher
        (search("bohb"), "go only with each other: the searcher learns from what the scheduler measures at its rungs"),
        (search("bohb") | scheduler("asha"), "go only with each other"),
        (search("bohb") | scheduler("hyperband"), "(got bohb and hyperband)"),
        (search("random") | scheduler("bohb"), "(got random and bohb)"),
        (search("optuna") | scheduler("bohb"), "go only with each other"),
        (search("hyperopt") | scheduler("bohb"), "go only with each other"),
        (search("optuna") | scheduler("hyperband"), "does not go with search.algorithm optuna: the trials of"),
        (search("hyperopt") | scheduler("hyperband"), "use random or grid, or bohb for both"),
        (search("optuna") | scheduler("pbt"), "does not go with search.algorithm optuna: its trials all exist from"),
        (search("hyperopt") | scheduler("pb2"), "pb2 does not go with search.algorithm hyperopt"),
        # searcher x axes
        (search("optuna", {}), "algorithm optuna needs a space to search"),
        (search("hyperopt", {}), "algorithm hyperopt needs a space to search"),
        (search("optuna", RATE | RANK, sampler="cmaes"), "sampler cmaes searches numbers, but lora.rank is choice"),
        (search("optuna", RATE, sampler="cmaes"), "sampler cmaes needs two or more axes, got 1"),
        (
            search(
                "optuna",
                RANK | {"lora.dropout": {"uniform": [0, 0.5], "when": {"lora.rank": 4}}},
                sampler="cmaes",
            ),
            "sampler cmaes searches numbers",
        ),
        (search("random", sampler="tpe"), "sampler tpe belongs to algorithm optuna, but algorithm is random"),
        (search("hyperopt", sampler="cmaes"), "sampler cmaes belongs to algorithm optuna"),
        (search(num_trials=40, stop={"unmoved": 8}) | scheduler("hyperband"), "search.stop ends the drawing of trials"),
        (search(num_trials=40, stop={"gain": 0.01}) | scheduler("pbt"), "compares trials that begin together"),
        (search(num_trials=12, stop={"gain": "1%"}), "could end no search of 12 trials: it acts once 12 have ended"),
        (search(num_trials=20, stop={"unmoved": 19}), "it acts once 20 have ended"),
        (
            search("optuna", RANK | {"lora.dropout": {"uniform": [0, 0.5], "when": {"lora.rank": 4}}},
                   num_trials=40, stop={"gain": "1%"}),
            "stop.gain needs a model of all fields together, but lora.dropout has `when`; use stop.unmoved",
        ),
        (search("random", startup_trials=3), "startup_trials belongs to auto, optuna, hyperopt, bohb"),
        (search("bohb", startup_trials=1) | scheduler("bohb"), "startup_trials must be at least 2 for bohb"),
        (search("optuna", startup_trials=10), "startup_trials come before the model's own, and 10 of 10 trials"),
        (search("hyperopt", startup_trials=9, num_trials=4), "leave none for hyperopt; give fewer"),
        # scheduler x axes
        (search("random", {}) | scheduler("pbt"), "pbt changes searched values, and search.space has none"),
        (search(num_trials=1) | scheduler("pbt"), "pbt needs two or more trials"),
        (
            search(space={"lora.dropout": {"choice": [0.1]}}) | scheduler("pbt"),
            "scheduler.kind pbt would try no other value: listed axes need two values",
        ),
        (search() | scheduler("pbt", factors=[1, 1.0], resample_probability=0), "ranges need scheduler.factors other"),
        (
            search(space=RANK) | scheduler("pbt") | {"training": STEPS | {"optimizer": "adamw_8bit"}},
            "pbt cannot change lora.rank or lora.alpha during a trial here: training.optimizer is adamw_8bit",
        ),
        (
            search(space=RANK) | scheduler("pbt") | {"training": STEPS | {"optimizer": "lion_32bit"}},
            "only AdamW's moments in 32 bits can be resized",
        ),
        (search(space=RANK) | scheduler("pbt") | {"lora": {"dora": True}}, "here: lora.dora: the magnitudes"),
        (search(space=RANK) | scheduler("pbt") | {"lora": {"init": "olora"}}, "here: lora.init olora: the first"),
        (search(space=RATE | RANK) | scheduler("pb2"), "lora.rank is choice; use uniform or loguniform (randint or"),
        (
            search(space={"lora.target_modules": {"choice": ["all-linear", ["q_proj"]]}}) | scheduler("pbt"),
            "cannot change lora.target_modules during a trial: other layers would be adapted",
        ),
        (
            search(space={"training.batch_size": {"choice": [4, 8]}}) | scheduler("pbt"),
            "cannot change training.batch_size during a trial: the checkpoint counts its position in the data",
        ),
        (
            search(space={"training.seed": {"randint": [0, 9]}}) | scheduler("pbt"),
            "cannot change training.seed during a trial: the order of rows",
        ),
        (
            search(space={"training.precision": {"choice": ["auto", "none"]}}) | scheduler("pbt"),
            "cannot change training.precision during a trial: it cannot change between",
        ),
        (search(space=DROPOUT) | scheduler("pb2"), "lora.dropout is choice; use uniform or loguniform ("),
        (
            search(space={"lora.dropout": {"quniform": [0, 0.5, 0.1]}}) | scheduler("pb2"),
            "lora.dropout is quniform; use uniform",
        ),
        (
            search(
                space={"training.weight_decay": {"uniform": [0, 0.1], "when": {"lora.dropout": 0.1}}} | DROPOUT
            )
            | scheduler("pbt"),
            "search.space.training.weight_decay may have no `when`",
        ),
        # scheduler x time
        (scheduler("asha", grace_steps=15), "grace_steps (15) must be a multiple of training.eval_steps (10)"),
        (scheduler("median", grace_steps=15), "must be a multiple of training.eval_steps"),
        (scheduler("hyperband", grace_steps=15), "must be a multiple of training.eval_steps"),
        (scheduler("asha", grace_steps=10, grace_tokens=9), "time is steps or tokens: give grace_steps (10) or"),
        (scheduler("hyperband", grace_tokens=100), "grace_tokens (100) needs max_tokens"),
        (scheduler("hyperband", max_tokens=100), "max_tokens (100) needs grace_tokens"),
        (scheduler("hyperband", grace_tokens=9, max_tokens=99, max_steps=9), "grace_tokens (9) needs max_tokens"),
        (scheduler("hyperband", grace_steps=50), "would have no rung: a whole trial of 100 steps is shorter than"),
        (scheduler("hyperband", grace_tokens=9, max_tokens=10), "a whole trial of 10 tokens is shorter than"),
        (scheduler("hyperband") | {"training": {"epochs": 1.0}}, "give scheduler.max_steps, or a training.steps"),
        (
            search(space={"training.steps": {"choice": [100, 200]}}) | scheduler("hyperband"),
            "a training.steps that is not searched",
        ),
        (
            search(space={"training.eval_steps": {"choice": [5, 10]}}) | scheduler("asha"),
            "training.eval_steps cannot be searched under scheduler asha",
        ),
        (scheduler("hyperband") | {"training": STEPS | {"save_steps": 20}}, "save_steps (20) must divide"),
        (search() | scheduler("pbt") | {"training": STEPS | {"save_steps": 3}}, "save_steps (3) must divide"),
        (
            search(space={"training.save_steps": {"choice": [5, 10]}}) | scheduler("hyperband"),
            "save_steps (searched) must divide",
        ),
        (search() | scheduler("pbt", interval_steps=15), "interval_steps (15) must be a multiple of"),
        (search() | scheduler("pb2", interval_steps=10, interval_tokens=9), "time is steps or tokens: give interval"),
        # metric and budget
        (search(metric="eval/exact_match"), "'eval/exact_match' is not measured; one of eval/loss"),
        (search(metric="train/loss") | scheduler("asha"), "'train/loss' is not measured"),
        (search(metric=["eval/loss", "eval/token_accuracy"]), "must be one metric"),
        (search(budget={"gpu_hours": 1.0}) | {"resources": {"gpus_per_trial": 0}}, "gpu_hours would never be spent"),
    ],
)  # fmt: skip
def test_a_senseless_combination_is_refused(document: Document, written: Document, reason: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(document | {"training": STEPS} | written)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "written",
    [
        search("bohb") | scheduler("bohb"),
        search("bohb", startup_trials=2) | scheduler("bohb", max_steps=90, grace_steps=30),
        search("random") | scheduler("hyperband"),
        search("grid", {"lora.rank": {"grid": [4, 8]}}) | scheduler("hyperband", grace_tokens=9, max_tokens=99),
        search("optuna", sampler="tpe") | scheduler("asha", grace_tokens=1000),
        search("optuna", RATE | {"lora.dropout": {"uniform": [0, 0.5]}}, sampler="cmaes") | scheduler("median"),
        search("hyperopt", startup_trials=1) | scheduler("none"),
        search("random", RATE | DROPOUT) | scheduler("pbt", interval_tokens=500, quantile=0.5),
        search("grid", {"lora.dropout": {"grid": [0.0, 0.1]}}) | scheduler("pbt"),
        search("random", RATE | DROPOUT) | scheduler("pbt", factors=[1, 1], resample_probability=0),
        search("random") | scheduler("pbt", factors=[1, 1]),
        search("random", {path: {"uniform": [0.1, 0.2]} for path in MUTABLE if path != "lora.rank"}) | scheduler("pb2"),
        search("random", {"lora.rank": {"lograndint": [4, 64]}}, tied={"lora.alpha": "2 * lora.rank"})
        | scheduler("pb2"),
        search("random", RANK) | scheduler("pbt"),
        search(tied={"training.weight_decay": "10 * training.learning_rate"}) | scheduler("pbt"),
        search(budget={"gpu_hours": 1.0, "wall_clock_hours": 0.5, "tokens": 10}) | scheduler("asha"),
    ],
)
def test_a_sensible_combination_is_accepted(document: Document, written: Document) -> None:
    spec = parse_spec(document | {"training": STEPS} | written)
    assert parse_spec(spec.model_dump(mode="json")) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("kind", ["none", "asha", "hyperband", "pbt"])
def test_trials_that_may_pause_or_be_cloned_save_at_each_evaluation(document: Document, kind: str) -> None:
    spec = parse_spec(document | search() | scheduler(kind) | {"training": STEPS})
    config = spec.trial_config({"training.learning_rate": 1e-4})
    assert config.training.save_steps == (10 if kind in ("hyperband", "pbt") else None)


def test_each_kind_has_its_own_fields(document: Document) -> None:
    for kind, message in {
        "asha": "scheduler.min_trials: unknown field; it belongs to kind median; fields here: kind, grace_steps",
        "none": "scheduler.min_trials: unknown field; it belongs to kind median; fields here: kind",
    }.items():
        with pytest.raises(SpecError) as caught:
            parse_spec(document | scheduler(kind, min_trials=2))
        assert message in str(caught.value)
    with pytest.raises(SpecError, match=r"scheduler\.grace_stps: unknown field; did you mean grace_steps\?"):
        parse_spec(document | scheduler("asha", grace_stps=2))
    with pytest.raises(SpecError, match=r"scheduler\.reduction_factor: Input should be .* 2 \(got 1\)"):
        parse_spec(document | scheduler("asha", reduction_factor=1))
    for wrong in ({"kind": "ahsa"}, "asha", {"kind": ["asha"]}):
        with pytest.raises(
            SpecError, match="scheduler: must be a section whose kind is one of none, forecast, asha, hyperband"
        ):
            parse_spec(document | {"scheduler": wrong})


def test_another_kind_keeps_the_fields_that_it_has() -> None:
    asha_section = "scheduler={kind: asha, grace_steps: 40, reduction_factor: 2}"
    asha = load_spec(DEMO, [asha_section, "scheduler.reduction_factor=4"]).scheduler
    assert (asha.kind, asha.grace_steps, asha.reduction_factor) == ("asha", 40, 4)  # type: ignore[union-attr]
    band = load_spec(DEMO, [asha_section, "scheduler.kind=hyperband"]).scheduler
    assert (band.kind, band.grace_steps, band.reduction_factor) == ("hyperband", 40, 2)  # type: ignore[union-attr]
    median = load_spec(DEMO, [asha_section, "scheduler.kind=median", "scheduler.min_trials=7"]).scheduler
    assert (median.grace_steps, median.min_trials) == (40, 7)  # type: ignore[union-attr]
    assert load_spec(DEMO, ["scheduler.kind=none"]).scheduler.model_dump() == {"kind": "none"}
    with pytest.raises(SpecError, match=r"scheduler\.reduction_factor: unknown field; it belongs to kind asha"):
        load_spec(DEMO, ["scheduler.kind=none", "scheduler.reduction_factor=3"])
    with pytest.raises(SpecError, match=r"scheduler\.grace: unknown field"):
        load_spec(DEMO, [asha_section, "scheduler.grace=3", "scheduler.kind=median"])


def test_a_file_may_leave_out_the_kind(document: Document) -> None:
    assert parse_spec(document | {"scheduler": {}}).scheduler.kind == "none"
    with pytest.raises(SpecError, match=r"scheduler\.grace_steps: unknown field; it belongs to kind asha, "):
        parse_spec(document | {"scheduler": {"grace_steps": 50}})
    assert set(FIELDS_OF_KIND) == {"none", "forecast", "asha", "hyperband", "bohb", "median", "pbt", "pb2"}


@pytest.mark.parametrize(
    ("package", "extra", "overrides"),
    [
        ("hyperopt", "hyperopt", ["search.algorithm=hyperopt"]),
        ("hpbandster", "bohb", ["search.algorithm=bohb", "scheduler.kind=bohb"]),
        ("cmaes", "cmaes", [f"search={{algorithm: optuna, sampler: cmaes, space: {RATE | UNIFORM}}}"]),
        ("sklearn", "pb2", [f"search={{space: {RATE}}}", "scheduler={kind: pb2}"]),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named_with_its_install_command(
    package: str, extra: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: set[str] = set()
    monkeypatch.setattr("orchestrator.spec.optional_packages.find_spec", lambda name: None if name in missing else name)
    spec = load_spec(DEMO, overrides)
    missing.add(package)
    with pytest.raises(RequestError) as caught:
        load_spec(DEMO, overrides)
    assert f"needs the package {package}" in caught.value.message
    assert f"pip install 'qlora-orchestrator[{extra}]'" in (caught.value.remedy or "")
    assert parse_spec(spec.model_dump(mode="json")) == spec, "a sweep's record is read without it"
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f"\n{extra} = [" in pyproject


@pytest.mark.parametrize(
    ("metric", "mode", "message"),
    [
        ("eval/loss", "max", "mode max would choose the trial with the highest eval/loss, which is the worst one"),
        ("eval/token_accuracy", "min", "mode min would choose the trial with the lowest eval/token_accuracy"),
    ],
)
def test_a_mode_that_would_choose_the_worst_trial_is_refused(
    document: dict[str, Any], metric: str, mode: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(document | {"search": {"metric": metric, "mode": mode}})

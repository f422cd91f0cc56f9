"""A user's own metric in an experiment file: read once, with its checksum; what is refused."""

from hashlib import sha256
from pathlib import Path

import pytest

from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.errors import SpecError
from orchestrator.spec import SweepSpec, load_spec, parse_spec
from orchestrator.spec.sections import OwnMetric

SOURCE = "def closeness(prompts, answers, references):\n    return [0.0] * len(answers)\n\n\ndef exact_match(*_): ...\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(SOURCE)
    return tmp_path / "own.py"


def test_the_text_of_the_file_travels_with_the_experiment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    spec = load_spec(DEMO, ["evaluation.metrics=[exact_match, own.py:closeness]", "search.metric=eval/closeness"])
    checksum = sha256(SOURCE.encode()).hexdigest()
    own = OwnMetric(file=str(file), function="closeness", sha256=checksum, source=SOURCE)
    assert spec.evaluation.metrics == ["exact_match", own]
    assert spec.evaluation.names == ["exact_match", "closeness"]
    assert spec.search.resolved_mode == "max"
    file.unlink()
    assert parse_spec(spec.model_dump(mode="json")) == spec
    assert spec.trial_config({}).evaluation == spec.evaluation


def test_a_path_in_a_file_starts_at_its_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = file.parent / "x.yaml"
    rows = "data: {source: embedded, format: template, template: '{question} {answer}'}"
    experiment.write_text(f"base: {{model: embedded}}\n{rows}\nevaluation: {{metrics: [./own.py:closeness]}}\n")
    monkeypatch.chdir("/")
    assert load_spec(experiment).evaluation.own[0].file == str(file)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "own.py:nothing",
            r"evaluation\.metrics\.0: .*own\.py: there is no function 'nothing'; .* closeness, exact_match",
        ),
        ("own.py:exact_match", "exact_match is the name of another metric; rename the function"),
        ("other.py:closeness", r"evaluation\.metrics\.0: 'other\.py:closeness' cannot be read: No such file"),
        ("broken.py:closeness", r"broken\.py: line 1: is not Python"),
        ("own.py", r"'own\.py' is unknown; write 'exact_match', or FILE\.py:FUNCTION"),
        ("own.py:closeness, own.py:closeness", "closeness is there twice"),
    ],
)
def test_what_is_no_metric_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch, metric: str, message: str) -> None:
    (file.parent / "broken.py").write_text("def closeness(:\n")
    monkeypatch.chdir(file.parent)
    with pytest.raises(SpecError, match=message):
        load_spec(DEMO, [f"evaluation.metrics=[{metric}]"])


def test_the_text_is_read_once_however_many_records_hold_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading Python takes a millisecond for 20 lines, and a sweep has a record for each trial."""
    spec = load_spec(DEMO, [f"evaluation.metrics=[{file}:closeness]"])
    monkeypatch.setattr("orchestrator.spec.sections.evaluation.ast", None)
    assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_record_whose_text_was_changed_is_refused(file: Path) -> None:
    spec = load_spec(DEMO, [f"evaluation.metrics=[{file}:closeness]"])
    text = spec.model_dump_json().replace("[0.0]", "[1.0]")
    with pytest.raises(ValueError, match="its recorded text does not match its sha256"):
        SweepSpec.model_validate_json(text)


def test_a_metric_that_is_no_loss_has_no_scheduler_unless_one_is_written(file: Path) -> None:
    """`forecast` knows curves of losses only; where it is written it takes the median rule."""
    spec = load_spec(DEMO, [f"evaluation.metrics=[{file}:closeness]", "search.metric=eval/closeness"])
    document = spec.model_dump(mode="json")
    del document["scheduler"]
    assert parse_spec(document).scheduler.kind == "none"

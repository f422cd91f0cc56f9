"""Commands that use adapters: names of metrics, sweeps instead of folders, commands of a chat."""

import io
import sys
from pathlib import Path

import pytest

from orchestrator.cli import use
from orchestrator.deploy import open_sweep
from orchestrator.deploy.find import find_bundle
from orchestrator.record import TrialResult, read_sweep, write_record
from orchestrator.record.checked import read_record
from orchestrator.record.new_sweep import claim_folder
from orchestrator.spec import load_spec, parse_spec
from tests.unit.conftest import MakeSweep


@pytest.fixture
def sweep(tmp_path: Path, make_sweep: MakeSweep) -> Path:
    """A sweep whose second trial is better by `eval/exact_match`, and whose third failed."""
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5), "b": ("COMPLETE", 0.6), "c": ("FAILED", None)})
    for name, share in (("a", 0.25), ("b", 0.75)):
        trial = read_record(TrialResult, paths.trial(name).result)
        assert trial.best is not None
        best = trial.best.model_copy(update={"values": trial.best.values | {"eval/exact_match": share}})
        write_record(paths.trial(name).result, trial.model_copy(update={"best": best}))
    return paths.root


def test_a_metric_may_be_written_as_tables_head_it(sweep: Path) -> None:
    opened = open_sweep(sweep)
    for metric in ("exact_match", "eval/exact_match"):
        chosen = opened.best(metric)
        assert (chosen.trial.trial_id, chosen.recommendation.metric) == ("b", "eval/exact_match")
        assert [trial.trial_id for trial in opened.top(2, metric)] == ["b", "a"]
        assert {trial.trial_id for trial in opened.pareto([metric, "loss"])} == {"a", "b"}


def test_best_says_how_many_trials_failed(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use.best(str(sweep))
    assert capsys.readouterr().out.startswith("best of 2 (1 other failed): a, eval/loss 0.5 at step 7")
    assert open_sweep(sweep).best().as_dict()["num_failed"] == 1


def test_verify_and_push_take_a_sweep(sweep: Path, tmp_path: Path) -> None:
    best = read_sweep(sweep).paths.trial("a").adapter(7)
    (best / "adapter_config.json").write_text("{}")
    assert find_bundle(str(sweep), "runs") == best
    assert find_bundle("s", str(tmp_path)) == best
    assert find_bundle(str(best), "runs") == best
    assert find_bundle("none", str(tmp_path)) == Path("none")  # the command says that there is no such folder


@pytest.mark.parametrize("end", ["/exit", "/quit"])
def test_a_chat_knows_help_and_exit(
    end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one\n/help\ntwo\n{end}\nthree\n"))
    assert list(use._questions()) == ["one", "two"]
    printed = capsys.readouterr().out
    for command in ("/clear", "/exit", "/quit"):
        assert command in printed


def test_a_trials_own_file_is_an_experiment(sweep: Path) -> None:
    trial = read_sweep(sweep).paths.trial("a")
    spec = load_spec(trial.config, ["training.steps=3"])
    config = spec.trial_config({})
    before = read_record(TrialResult, trial.result).config
    assert config.training.steps == 3
    assert config.lora == before.lora
    assert config.data == before.data


@pytest.mark.parametrize(
    ("file", "begin"),
    [("my file.yaml", "my-file-"), ("-x.yaml", "x-"), (".yaml", "yaml-"), ("ä.yaml", "sweep-"), ("a" * 200, "a" * 80)],
)
def test_default_names_are_names_that_the_option_takes(file: str, begin: str, tmp_path: Path) -> None:
    spec = parse_spec(
        {
            "base": {"model": "embedded"},
            "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
        }
    )
    with claim_folder(spec, file, None, str(tmp_path)) as paths:
        name = paths.name
    assert name.startswith(begin)
    with claim_folder(spec, file, name, str(tmp_path)) as again:
        assert again.name == name

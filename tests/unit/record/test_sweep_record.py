import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.deploy import FinishedSweep, open_sweep
from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.errors import RecordError
from orchestrator.record import (
    MetricPoint,
    SweepPaths,
    SweepRecord,
    TrialResult,
    TrialState,
    find_damage,
    read_metrics,
    read_sweep,
    read_trial,
    write_record,
)
from orchestrator.spec import parse_spec

MakeSweep = Callable[..., SweepPaths]
EVERY_STATE = {
    "running": ("RUNNING", 0.1),
    "cancelled": ("CANCELLED", 0.2),
    "failed": ("FAILED", 0.3),
    "complete": ("COMPLETE", 0.4),
    "stopped": ("STOPPED", 0.5),
    "pending": ("PENDING", None),
    "blind": ("COMPLETE", None),
}


def test_a_sweep_is_opened_by_folder_and_by_name(
    tmp_path: Path, make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_sweep(tmp_path / "runs" / "one", {})
    assert read_sweep(paths.root).paths == read_sweep(str(paths.root)).paths == paths
    assert read_sweep("one", tmp_path / "runs").paths == paths
    monkeypatch.chdir(tmp_path)
    assert read_sweep("one").paths == read_sweep("runs/one").paths == paths
    assert read_sweep("one").info.name == "one"
    with pytest.raises(RecordError, match=r"two: there is no such sweep \(no sweep\.json in two or runs/two\)"):
        read_sweep("two")


@pytest.mark.parametrize("damage", [b"", b'{"name": "x"', b"{}", b"\xff", b"null"])
def test_a_damaged_record_is_named(tmp_path: Path, make_sweep: MakeSweep, damage: bytes) -> None:
    paths = make_sweep(tmp_path / "s", EVERY_STATE)
    for trial_id, damaged in [
        ("complete", paths.trial("complete").result),
        ("running", paths.trial("running").progress),
    ]:
        whole = damaged.read_bytes()
        damaged.write_bytes(damage)
        record = read_sweep(paths.root)
        assert {trial.trial_id for trial in record.trials()} == EVERY_STATE.keys()
        (found,) = [each for each in find_damage(record) if each.path == damaged]
        assert f"{trial_id}/{damaged.name}: is damaged or of another version" in str(found)
        damaged.write_bytes(whole)
    paths.sweep.write_bytes(damage)
    with pytest.raises(RecordError, match=r"sweep\.json: is damaged or of another version"):
        read_sweep(paths.root)


def test_a_record_comes_back_as_it_was(tmp_path: Path, make_sweep: MakeSweep) -> None:
    search = {"space": {"lora.rank": {"choice": [4, 8]}}, "tied": {"lora.alpha": "2 * lora.rank"}}
    record = read_sweep(make_sweep(tmp_path / "s", {}, **search).root)
    trial = record.paths.trial("a")
    result = TrialResult(
        trial_id="a",
        state=TrialState.FAILED,
        config=record.info.spec.trial_config({"lora.rank": 8}),
        metric="eval/loss",
        mode="min",
        step=50,
        tokens_per_second=12.5,
        applied={"lora.rank": 8, "modules": ["q_proj"]},
        error="loss is nan at step 50",
        warnings=["W&B failed"],
    )
    write_record(trial.config, result.config)
    write_record(trial.result, result)
    assert read_trial(trial, record.info) == result
    assert read_sweep(record.paths.root) == record


@pytest.mark.parametrize(("metric", "order"), [("eval/loss", "cab"), ("eval/token_accuracy", "bac")])
def test_trials_come_best_first(tmp_path: Path, make_sweep: MakeSweep, metric: str, order: str) -> None:
    trials = {"n": ("RUNNING", None), "a": ("STOPPED", 0.5), "b": ("COMPLETE", 0.75), "c": ("RUNNING", -0.25)}
    record = read_sweep(make_sweep(tmp_path / "s", trials, metric=metric).root)
    assert [trial.trial_id for trial in record.trials()] == [*order, "n"]


@pytest.mark.parametrize(("metric", "winner"), [("eval/loss", "complete"), ("eval/token_accuracy", "stopped")])
def test_the_best_is_chosen_among_trials_that_ended_well(
    tmp_path: Path, make_sweep: MakeSweep, metric: str, winner: str
) -> None:
    trials = EVERY_STATE | {"failed high": ("FAILED", 0.9), "running high": ("RUNNING", 0.8)}
    record = read_sweep(make_sweep(tmp_path / "s", trials, metric=metric).root)
    best = FinishedSweep(record).best()
    assert best.trial.trial_id == winner
    assert best.recommendation.num_compared == 2
    assert best.adapter == record.paths.trial(winner).root / "adapters" / "step-7"
    best_trial = best.as_dict()
    assert (best_trial["trial_id"], best_trial["value"], best_trial["step"]) == (winner, EVERY_STATE[winner][1], 7)
    assert best_trial["config"]["lora.rank"] == 16
    assert best_trial["config"]["training.learning_rate"] == 2e-4


@pytest.mark.parametrize("state", ["RUNNING", "FAILED", "CANCELLED", "PENDING"])
def test_without_a_trial_that_ended_well_there_is_no_best(tmp_path: Path, make_sweep: MakeSweep, state: str) -> None:
    record = read_sweep(make_sweep(tmp_path / "s", {"a": (state, 0.5), "b": ("COMPLETE", None)}).root)
    with pytest.raises(RecordError, match="no trial has finished with an evaluation yet"):
        FinishedSweep(record).best()


def test_the_best_adapter_must_be_there(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)})
    shutil.rmtree(paths.trial("a").adapter(7))
    with pytest.raises(RecordError, match="adapter of trial a is missing"):
        open_sweep(paths.root).best()


def test_the_result_is_read_before_the_progress_and_that_before_the_configuration(
    tmp_path: Path, make_sweep: MakeSweep
) -> None:
    record = read_sweep(make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)}).root)
    trial = record.paths.trial("a")
    result = read_trial(trial, record.info)
    write_record(trial.progress, result.model_copy(update={"state": TrialState.RUNNING, "step": 3}))
    assert read_trial(trial, record.info) == result
    trial.result.unlink()
    assert read_trial(trial, record.info).state == TrialState.RUNNING
    assert read_trial(trial, record.info).step == 3
    trial.progress.unlink()
    pending = read_trial(trial, record.info)
    assert (pending.state, pending.best, pending.config) == (TrialState.PENDING, None, result.config)
    assert (pending.metric, pending.mode) == ("eval/loss", "min")
    assert [found.trial_id for found in record.trials()] == ["a"]


def test_nan_and_infinity_are_kept(tmp_path: Path, make_sweep: MakeSweep) -> None:
    values = {"train/loss": math.nan, "train/grad_norm": math.inf, "eval/loss": -math.inf, "eval/token_accuracy": 0.1}
    point = MetricPoint(step=1, tokens=2, time_s=0.5, values=values)
    again = MetricPoint.model_validate_json(point.model_dump_json())
    assert math.isnan(again.values["train/loss"])
    assert {**again.values, "train/loss": 0} == {**values, "train/loss": 0}
    record = read_sweep(make_sweep(tmp_path / "s", {"a": ("FAILED", 0.5)}).root)
    trial = record.paths.trial("a")
    write_record(trial.result, read_trial(trial, record.info).model_copy(update={"grad_norm": math.nan}))
    (result,) = record.trials()
    assert result.grad_norm is not None
    assert math.isnan(result.grad_norm)


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    trial = SweepPaths(tmp_path).trial("a")
    assert read_metrics(trial) == []
    points = [MetricPoint(step=step, tokens=step, time_s=step, values={"eval/loss": 1 / step}) for step in (1, 2, 3)]
    lines = "".join(f"{point.model_dump_json()}\n" for point in points)
    trial.root.mkdir(parents=True)
    trial.metrics.write_text(lines)
    assert read_metrics(trial) == points
    last = len(points[-1].model_dump_json()) + 1
    for cut in range(1, last + 1):
        trial.metrics.write_text(lines[:-cut])
        assert read_metrics(trial) == points[:2]


def test_the_number_of_trials_is_what_the_sweep_will_have(
    tmp_path: Path, make_sweep: MakeSweep, document: dict[str, Any]
) -> None:
    search = {"num_trials": 5, "space": {"lora.rank": {"randint": [4, 9]}}}
    record = read_sweep(make_sweep(tmp_path / "s", {}, **search).root)
    assert record.info.num_trials == 5
    assert record.info.model_copy(update={"is_single_trial": True}).num_trials == 1
    assert record.info.spec == parse_spec(document | {"search": search})
    assert SweepRecord(record.paths, record.info).trials() == []


def test_an_experiment_file_is_not_a_sweep() -> None:
    with pytest.raises(RecordError, match=r"demo.yaml: is an experiment file, not a sweep"):
        read_sweep(DEMO)


@pytest.mark.parametrize("place", ["step", "adapters", "trial", "dots"])
def test_an_adapter_outside_its_sweep_is_refused(tmp_path: Path, make_sweep: MakeSweep, place: str) -> None:
    paths = make_sweep(tmp_path / "s", {"one": ("COMPLETE", 0.4)})
    record = read_sweep(paths.root)
    (trial,) = record.trials()
    assert trial.best is not None
    folder = record.adapter_path(trial)
    folder.mkdir(parents=True, exist_ok=True)
    assert record.adapter(trial) == folder
    if place == "dots":
        best = trial.best.model_copy(update={"adapter": "../../../elsewhere"})
        trial = trial.model_copy(update={"best": best})
        (tmp_path / "elsewhere").mkdir()
    else:
        inside = {"step": folder, "adapters": folder.parent, "trial": folder.parents[1]}[place]
        inside.rename(tmp_path / "elsewhere")
        inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        RecordError, match=r"the adapter of trial one is outside the sweep: its path leads to .*elsewhere"
    ):
        record.adapter(trial)


def test_a_link_to_a_sweep_opens_it(tmp_path: Path, make_sweep: MakeSweep) -> None:
    make_sweep(tmp_path / "s", {"one": ("COMPLETE", 0.4)})
    (tmp_path / "latest").symlink_to(tmp_path / "s")
    record = read_sweep(tmp_path / "latest")
    (trial,) = record.trials()
    record.adapter_path(trial).mkdir(parents=True, exist_ok=True)
    assert record.adapter(trial).is_dir()


def test_a_record_can_be_sent_to_another_process(tmp_path: Path, make_sweep: MakeSweep) -> None:
    record = read_sweep(make_sweep(tmp_path / "s", EVERY_STATE).root)
    assert pickle.loads(pickle.dumps(record)) == record

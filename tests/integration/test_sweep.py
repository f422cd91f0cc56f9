"""Real sweeps under Ray Tune: the embedded task is learned, trials are stopped, and trackers hold the results."""

import json
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from tiny import DEMO, TINY

from orchestrator.adapters.generate import answer, matches
from orchestrator.data import Prompt, load
from orchestrator.deploy import FinishedSweep
from orchestrator.deploy.chat import open_chat
from orchestrator.record import SweepPaths, SweepRecord, TrialState, read_metrics
from orchestrator.spec import load_spec
from orchestrator.sweep import run_sweep

pytestmark = pytest.mark.slow

LEARNING_RATES = (1e-5, 2e-3)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    """Run the demo's task with three seeds at two learning rates, every trial to its end."""
    spec = load_spec(
        DEMO,
        [
            "search={algorithm: grid}",
            f"search.space.training.learning_rate={{grid: {list(LEARNING_RATES)}}}",
            f"search.space.training.seed={{grid: {list(SEEDS)}}}",
            "lora.rank=16",
            "scheduler.kind=none",
            "training.steps=150",
            "resources.max_concurrent=4",
            "tracking.wandb.mode=disabled",
        ],
    )
    return run_sweep(spec, SweepPaths(tmp_path_factory.mktemp("learned") / "sweep"), lambda _: None)


def test_the_task_is_learned_and_the_learning_rate_matters(learned: SweepRecord) -> None:
    trials = learned.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    matches = {
        (trial.config.training.learning_rate, trial.config.training.seed): trial.best.values["eval/exact_match"]
        for trial in trials
        if trial.best
    }
    slow, fast = LEARNING_RATES
    assert all(matches[fast, seed] >= 0.6 for seed in SEEDS), matches
    assert all(matches[slow, seed] <= 0.1 for seed in SEEDS), matches
    assert len({trial.best.value for trial in trials if trial.best}) == 6, "seeds make no difference"


def test_the_base_without_adapter_cannot_do_the_task(learned: SweepRecord) -> None:
    winner = FinishedSweep(learned).best()
    chat = open_chat(winner.adapter_ref())
    prompts = load(learned.paths.data).prompts[:64]
    with chat.model.disable_adapter():
        assert share_right(chat, prompts) <= 0.05
    recorded = winner.trial.best
    assert recorded is not None
    again = share_right(chat, prompts)
    assert again == pytest.approx(recorded.values["eval/exact_match"], abs=1 / 64)


def share_right(chat: Any, prompts: list[Prompt]) -> float:
    answers = answer(chat.model, chat.tokenizer, [prompt.ids for prompt in prompts], 8, 64)
    return float(np.mean(matches(answers, [prompt.answer for prompt in prompts])))


def test_workers_and_data_are_shared(learned: SweepRecord) -> None:
    trials = learned.trials()
    assert len({trial.worker for trial in trials}) <= 4 < len(trials)
    assert {trial.data_fingerprint for trial in trials} == {learned.info.data_fingerprint}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    """Run six short trials under ASHA, with TensorBoard, W&B and MLflow."""
    # ASHA may stop none of the trials that reach a rung together; here the best two have passed it before the worst.
    first = [{"training.learning_rate": rate, "lora.rank": 8, "lora.dropout": 0.0} for rate in (3e-3, 1e-3, 1e-5)]
    spec = load_spec(
        DEMO,
        [
            "data.max_rows=240",
            "data.held_out={count: 40}",
            "training.steps=16",
            "training.eval_steps=4",
            "training.logging_steps=2",
            "scheduler={kind: asha, grace_steps: 4, reduction_factor: 2}",
            "search.num_trials=6",
            "search.seed=3",
            "search.space.training.learning_rate={choice: [1e-5, 1e-4, 1e-3, 3e-3]}",
            f"search.first={first}",
            "resources.max_concurrent=2",
            "evaluation.rows=8",
            "output.name=halved",
            "tracking.mlflow=true",
        ],
    )
    return run_sweep(spec, SweepPaths(tmp_path_factory.mktemp("halved") / "halved"), lambda _: None)


def test_asha_stops_at_rungs_by_the_recorded_values(halved: SweepRecord) -> None:
    trials = halved.trials()
    states = [trial.state for trial in trials]
    assert set(states) == {TrialState.COMPLETE, TrialState.STOPPED}, states
    for trial in trials:
        points = [p for p in read_metrics(halved.paths.trial(trial.trial_id)) if "eval/loss" in p.values]
        if trial.state == TrialState.COMPLETE:
            assert trial.step == 16
            continue
        assert trial.step in (4, 8), "stopped between rungs"
        assert not halved.paths.trial(trial.trial_id).checkpoints.exists()
        assert points[-1].step == trial.step, "continued after it was stopped"
        others = [
            point.values["eval/loss"]
            for other in trials
            if other is not trial
            for point in read_metrics(halved.paths.trial(other.trial_id))
            if point.step == trial.step and "eval/loss" in point.values
        ]
        assert any(value < points[-1].values["eval/loss"] for value in others), "the best of its rung was stopped"
    assert (
        FinishedSweep(halved).best().trial.trial_id
        == min(trials, key=lambda t: t.best.value if t.best else 9e9).trial_id
    )


def test_the_median_rule_stops_a_bad_trial(tmp_path: Path) -> None:
    rates = [3e-3, 2e-3, 1e-3, 1e-6]
    spec = load_spec(
        DEMO,
        [
            *TINY,
            "search={algorithm: grid}",
            f"search.space.training.learning_rate={{grid: {rates}}}",
            "scheduler={kind: median, grace_steps: 4, min_trials: 2}",
            "resources.max_concurrent=1",
        ],
    )
    record = run_sweep(spec, SweepPaths(tmp_path / "median"), lambda _: None)
    trials = {trial.config.training.learning_rate: trial for trial in record.trials()}
    assert (trials[1e-6].state, trials[1e-6].step) == (TrialState.STOPPED, 4)
    assert trials[3e-3].state == trials[2e-3].state == TrialState.COMPLETE
    assert len({trial.worker for trial in trials.values()}) == 1, "one at a time, in one worker"


def test_tied_values_follow_the_searched_ones(halved: SweepRecord) -> None:
    for trial in halved.trials():
        assert trial.applied["lora.alpha"] == 2 * trial.config.varied["lora.rank"] == 2 * trial.applied["lora.rank"]


def test_tensorboard_reads_the_sweep_as_one_hparams_table(halved: SweepRecord) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "board", str(halved.paths.root), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as board:
        try:
            assert board.stderr is not None
            url = next(word for line in board.stderr for word in line.split() if word.startswith("http://"))
            data = url + "data/plugin/hparams/"
            experiment = _ask(data + "experiment", {"experimentName": ""})
            groups = _ask(
                data + "session_groups",
                {
                    "experimentName": "",
                    "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
                    "colParams": [{"metric": {"group": "", "tag": "best/eval/loss"}}],
                    "startIndex": 0,
                    "sliceSize": 100,
                },
            )
            tags = json.load(urllib.request.urlopen(url + "data/plugin/scalars/tags"))
        finally:
            board.terminate()
    shown = {group["name"]: group for group in groups["sessionGroups"]}
    trials = {trial.trial_id: trial for trial in halved.trials()}
    assert {name.rstrip("/") for name in shown} == set(trials)
    assert {info["name"] for info in experiment["hparamInfos"]} >= {"lora.rank", "training.learning_rate", "lora.alpha"}
    for name, group in shown.items():
        trial = trials[name.rstrip("/")]
        assert group["hparams"]["lora.rank"] == trial.config.lora.rank
        (loss,) = [m["value"] for m in group["metricValues"] if m["name"]["tag"] == "best/eval/loss"]
        assert trial.best is not None
        assert loss == pytest.approx(trial.best.value, rel=1e-5)
        assert [session["status"] for session in group["sessions"]] == ["STATUS_SUCCESS"]
    assert set(tags) == set(trials), "one run a trial, no more"
    assert all({"train/loss", "train/grad_norm", "eval/loss"} <= set(run) for run in tags.values())


def test_wandb_holds_one_offline_run_a_trial(halved: SweepRecord) -> None:
    runs = [path.name for path in (halved.paths.root / "wandb").glob("offline-run-*")]
    trials = halved.trials()
    assert sorted(name.partition("-")[2].split("-", 2)[2] for name in runs) == sorted(t.trial_id for t in trials)
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.STOPPED}
    for trial in trials:
        (run,) = (halved.paths.root / "wandb").glob(f"offline-run-*-{trial.trial_id}")
        (log,) = run.glob("run-*.wandb")
        summary, config, group = _read_wandb(log)
        assert group == "halved"
        assert summary["state"] == trial.state
        assert config["lora.rank"] == trial.config.lora.rank
        assert trial.best is not None
        assert summary["best/eval/loss"] == pytest.approx(trial.best.value)
        assert summary["best/step"] == trial.best.step


def test_mlflow_holds_one_run_a_trial(halved: SweepRecord) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{halved.paths.root / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("halved")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == sorted(trial.trial_id for trial in halved.trials())
    for trial in halved.trials():
        run = runs[trial.trial_id]
        assert (run.info.status, run.data.tags["state"]) == ("FINISHED", trial.state)
        assert run.data.params["lora.rank"] == str(trial.config.lora.rank)
        recorded = [p for p in read_metrics(halved.paths.trial(trial.trial_id)) if "eval/loss" in p.values]
        history = client.get_metric_history(run.info.run_id, "eval/loss")
        assert {p.step: p.value for p in history} == {p.step: p.values["eval/loss"] for p in recorded}


def _ask(url: str, question: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    answer: dict[str, object] = json.load(urllib.request.urlopen(request))
    return answer


def _read_wandb(log: Path) -> tuple[dict[str, object], dict[str, object], str]:
    """Return summary, config and group of an offline run, from W&B's record file."""
    from wandb.proto import wandb_internal_pb2

    summary: dict[str, object] = {}
    config: dict[str, object] = {}
    group = ""
    for data in _leveldb_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            group = record.run.run_group
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return summary, config, group


def _leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, as W&B writes it.

    Blocks have 32 KiB; a chunk has a CRC, length, type and data.
    """
    offset, whole = 7, b""  # 7: W&B's own header
    while offset + 7 <= len(log):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", log, offset + 4)
        whole += log[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or its last chunk
            yield whole
            whole = b""

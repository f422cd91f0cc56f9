"""What TensorBoard's own readers find in the files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from orchestrator.record import BestPoint, MetricPoint, SweepPaths, TrialPaths, TrialResult, TrialState
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.spec.sections import TrackingSection
from orchestrator.tracking.protocol import TrialIdentity
from orchestrator.tracking.tensorboard import TensorBoardTracker

ROOT = Path(__file__).parents[3]


@pytest.fixture
def paths(tmp_path: Path) -> TrialPaths:
    return SweepPaths(tmp_path / "s").trial("a")


@pytest.fixture
def config(document: dict[str, Any]) -> TrialConfig:
    return parse_spec(document).trial_config({})


def test_a_point_can_be_read_once_it_is_logged(paths: TrialPaths, config: TrialConfig) -> None:
    tracker = _open(paths, config)
    _log(tracker, 10, 20)
    assert _scalars(paths) == {"a": {"eval/loss": [(10, 0.5), (20, 0.25)], "progress/tokens": [(10, 1000), (20, 2000)]}}
    best = BestPoint(value=0.25, step=20, values={"eval/loss": 0.25}, adapter="adapters/step-20")
    tracker.finish(
        TrialResult(
            trial_id="a", state=TrialState.COMPLETE, config=config, metric="eval/loss", mode="min", best=best
        )
    )  # fmt: skip
    assert _scalars(paths)["a"]["best/eval/loss"] == [(20, 0.25)]


def test_a_resumed_trial_hides_what_a_lost_worker_wrote_past_the_checkpoint(
    paths: TrialPaths, config: TrialConfig
) -> None:
    lost = _open(paths, config)
    _log(lost, 10, 20, 30, 40)
    resumed = _open(paths, config, resumed_step=20)
    assert [step for step, _ in _scalars(paths)["a"]["eval/loss"]] == [10, 20]
    _log(resumed, 25)
    assert [step for step, _ in _scalars(paths)["a"]["eval/loss"]] == [10, 20, 25]
    assert len(list(paths.tensorboard.iterdir())) == 2
    _open(paths, config)
    assert not any(_scalars(paths)["a"].values()), "a fresh start"


def test_trials_are_rows_of_one_hparams_table(paths: TrialPaths, config: TrialConfig) -> None:
    varied = {"lora.rank": 4, "training.schedule": "cosine", "lora.target_modules": ["q_proj", "v_proj"]}
    _log(_open(paths, config.model_copy(update={"varied": varied})), 10)
    other = TrialPaths(paths.sweep, "b")
    _log(_open(other, config.model_copy(update={"varied": varied | {"lora.rank": 8}})), 10, 20)
    rows = {group.name.rstrip("/"): group for group in _table(paths)}
    assert set(rows) == {"a", "b"}
    shown = {name: value.number_value or value.string_value for name, value in rows["a"].hparams.items()}
    assert shown == {"lora.rank": 4, "training.schedule": "cosine", "lora.target_modules": "['q_proj', 'v_proj']"}
    assert rows["b"].hparams["lora.rank"].number_value == 8
    losses = {name: [m.value for m in row.metric_values if m.name.tag == "eval/loss"] for name, row in rows.items()}
    assert losses == {"a": [0.5], "b": [0.25]}, "the last evaluation"


def test_what_does_not_vary_still_makes_a_row(paths: TrialPaths, config: TrialConfig) -> None:
    _open(paths, config)
    (row,) = _table(paths)
    assert {name: value.number_value for name, value in row.hparams.items()} == {
        "lora.rank": config.lora.rank,
        "training.learning_rate": config.training.learning_rate,
    }


def test_neither_torch_nor_tensorflow_is_loaded(tmp_path: Path) -> None:
    """They would cost a process that only keeps records seconds and memory."""
    for name in ("torch", "tensorflow"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} is loaded')")
    script = """
import sys
from pathlib import Path
from orchestrator.record import MetricPoint, SweepPaths
from orchestrator.spec import parse_spec
from orchestrator.spec.sections import TrackingSection
from orchestrator.tracking import open_trackers
from orchestrator.tracking.protocol import TrialIdentity

data = {"source": "embedded", "format": "template", "template": "{question} {answer}"}
config = parse_spec({"base": {"model": "embedded"}, "data": data}).trial_config({})
tracking = TrackingSection.model_validate({"tensorboard": True, "wandb": {"mode": "disabled"}})
paths = SweepPaths(Path(sys.argv[1])).trial("a")
trackers = open_trackers(TrialIdentity(paths, config, tracking, "eval/loss", 0))
trackers.log(MetricPoint(step=1, tokens=1, time_s=1.0, values={"eval/loss": 0.5}))
assert not trackers.warnings
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s")],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert "tensorboard" in loaded
    assert loaded & {"torch", "tensorflow", "transformers", "wandb", "ray"} == set()
    assert _scalars(SweepPaths(tmp_path / "s").trial("a"))["a"]["eval/loss"] == [(1, 0.5)]


def _open(paths: TrialPaths, config: TrialConfig, resumed_step: int = 0) -> TensorBoardTracker:
    return TensorBoardTracker(TrialIdentity(paths, config, TrackingSection(), "eval/loss", resumed_step))


def _log(tracker: TensorBoardTracker, *steps: int) -> None:
    for step in steps:
        tracker.log(MetricPoint(step=step, tokens=100 * step, time_s=step, values={"eval/loss": 5 / step}))


def _read(paths: TrialPaths) -> EventMultiplexer:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(paths.tensorboard.parent))
    multiplexer.Reload()
    return multiplexer


def _scalars(paths: TrialPaths) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Run -> scalar -> its steps and values."""
    multiplexer, found = _read(paths), {}
    for run in multiplexer.Runs():
        tags = multiplexer.PluginRunToTagToContent("scalars").get(run, {})
        events = {tag: multiplexer.Tensors(run, tag) for tag in tags}
        found[run] = {
            tag: [(event.step, event.tensor_proto.float_val[0]) for event in values] for tag, values in events.items()
        }
    return found


def _table(paths: TrialPaths) -> list[Any]:
    """Rows of the HParams dashboard."""
    folder = str(paths.tensorboard.parent)
    provider = MultiplexerDataProvider(_read(paths), folder)
    context = Context(TBContext(logdir=folder, data_provider=provider))
    question = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[api_pb2.ColParams(metric=api_pb2.MetricName(tag="eval/loss"))],
        slice_size=100,
    )
    return list(Handler(RequestContext(), context, "", question).run().session_groups)

"""Records of the TensorBoard tracker, read back with TensorBoard's own readers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, get_experiment
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tracked import identify

from orchestrator.record import BestPoint, MetricPoint, SweepPaths, TrialPaths, TrialResult, TrialState
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.spec.sections import OwnMetric
from orchestrator.tracking import open_trackers
from orchestrator.tracking.tensorboard import TensorBoardTracker

ROOT = Path(__file__).parents[3]


@pytest.fixture
def paths(tmp_path: Path) -> TrialPaths:
    return SweepPaths(tmp_path / "s").trial("a")


@pytest.fixture
def spec(document: dict[str, Any]) -> SweepSpec:
    """A search with axes of every kind: numbers, a conditional axis, None among numbers, booleans, text, lists."""
    space = {
        "training.schedule": {"choice": ["cosine", "polynomial"]},
        "training.final_rate": {"uniform": [0.1, 0.5], "when": {"training.schedule": ["polynomial"]}},
        "lora.rank": {"choice": [4, 8]},
        "training.neftune_alpha": {"choice": [None, 5.0]},
        "lora.rslora": {"choice": [False, True]},
        "training.recompute": {"choice": ["auto", True]},
        "lora.target_modules": {"choice": [["q_proj"], ["q_proj", "v_proj"]]},
    }
    search = {"algorithm": "random", "num_trials": 4, "space": space, "tied": {"lora.alpha": "2 * lora.rank"}}
    return parse_spec(document | {"search": search, "tracking": {"wandb": {"mode": "disabled"}}})


FIRST = {
    "training.schedule": "cosine",
    "lora.rank": 4,
    "training.neftune_alpha": None,
    "lora.rslora": False,
    "training.recompute": "auto",
    "lora.target_modules": ["q_proj"],
}
SECOND = FIRST | {
    "training.schedule": "polynomial",
    "training.final_rate": 0.2,
    "lora.rank": 8,
    "training.neftune_alpha": 5.0,
    "lora.rslora": True,
    "training.recompute": True,
}


def test_a_point_can_be_read_as_soon_as_it_is_logged(paths: TrialPaths, spec: SweepSpec) -> None:
    tracker = TensorBoardTracker(identify(paths, spec))
    _log(tracker, (10, 0.5), (20, 0.25))
    scalars = _scalars(paths)["a"]
    assert scalars["eval/loss"] == [(10, 0.5), (20, 0.25)]
    assert scalars["progress/tokens"] == [(10, 1000), (20, 2000)]
    assert scalars["best/eval/loss"] == [(10, 0.5), (20, 0.25)]


def test_a_resumed_trial_hides_points_that_a_lost_worker_wrote_after_the_checkpoint(
    paths: TrialPaths, spec: SweepSpec
) -> None:
    lost = open_trackers(identify(paths, spec))
    _log(lost, *((step, 5 / step) for step in (10, 20, 30, 40)))
    resumed = open_trackers(identify(paths, spec, step=20))
    assert [step for step, _ in _scalars(paths)["a"]["eval/loss"]] == [10, 20]
    _log(resumed, (25, 0.2))
    assert _scalars(paths)["a"]["eval/loss"] == [(10, 0.5), (20, 0.25), (25, pytest.approx(0.2))]
    open_trackers(identify(paths, spec))
    assert not any(_scalars(paths)["a"].values()), "a new trial starts without points"


def test_a_trial_whose_folder_could_not_be_written_is_recorded_when_it_is_resumed(
    paths: TrialPaths, spec: SweepSpec
) -> None:
    paths.tensorboard.parent.mkdir(parents=True)
    paths.tensorboard.touch()  # a file where the folder should be
    failed = open_trackers(identify(paths, spec))
    (warning,) = failed.warnings
    assert warning.startswith("TensorBoard failed: FileExistsError: ")
    _log(failed, (10, 0.5), (20, 0.25))
    paths.tensorboard.unlink()
    again = open_trackers(identify(paths, spec, step=20))
    assert (again.warnings, again.untracked) == ([], ["TensorBoard"])
    assert _scalars(paths)["a"]["eval/loss"] == [(10, 0.5), (20, 0.25)]


def test_trials_are_rows_of_one_table_with_the_columns_of_the_sweep(paths: TrialPaths, spec: SweepSpec) -> None:
    """The first trial lacks an axis. None in a column of numbers is an empty cell."""
    for name, point in (("a", FIRST), ("b", SECOND)):
        TensorBoardTracker(identify(paths.__class__(paths.sweep, name), spec, config=spec.trial_config(point)))
    columns = {info.name: api_pb2.DataType.Name(info.type)[10:] for info in _experiment(paths).hparam_infos}
    assert columns == {
        "state": "STRING",
        "training.schedule": "STRING",
        "training.final_rate": "FLOAT64",
        "lora.rank": "FLOAT64",
        "training.neftune_alpha": "FLOAT64",
        "lora.rslora": "BOOL",
        "training.recompute": "STRING",
        "lora.target_modules": "STRING",
        "lora.alpha": "FLOAT64",
    }
    rows = {row.name.rstrip("/"): row for row in _table(paths)}
    assert _cells(rows["a"]) == {
        "state": "RUNNING",
        "training.schedule": "cosine",
        "lora.rank": 4,
        "lora.rslora": False,
        "training.recompute": "auto",
        "lora.target_modules": "['q_proj']",
        "lora.alpha": 8,
    }
    assert _cells(rows["b"]) == {
        "state": "RUNNING",
        "training.schedule": "polynomial",
        "training.final_rate": 0.2,
        "lora.rank": 8,
        "training.neftune_alpha": 5,
        "lora.rslora": True,
        "training.recompute": "True",
        "lora.target_modules": "['q_proj']",
        "lora.alpha": 16,
    }


def test_the_table_shows_the_best_evaluation_instead_of_the_last(paths: TrialPaths, spec: SweepSpec) -> None:
    tracker = TensorBoardTracker(identify(paths, spec))
    _log(tracker, (10, 0.5), (20, 0.25), (30, 0.75))
    tags = ["best/eval/loss", "best/eval/token_accuracy", "progress/step", "progress/tokens"]
    assert [info.name.tag for info in _experiment(paths).metric_infos] == tags
    progress = {"progress/step": (30, 30), "progress/tokens": (30, 3000)}
    assert _metrics(paths) == {"best/eval/loss": (20, 0.25)} | progress, "also while the trial runs"
    best = BestPoint(value=0.25, step=20, values={"eval/loss": 0.25, "eval/token_accuracy": 0.5}, adapter="x")
    tracker.finish(_result(spec, TrialState.COMPLETE, best))
    values = {"best/eval/loss": (20, 0.25), "best/eval/token_accuracy": (20, 0.5)}
    assert _metrics(paths) == values | progress


def test_a_users_own_metric_is_a_column_under_its_name(paths: TrialPaths, document: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(prompts, answers, references): ...")
    own = OwnMetric.read("own.py:score", tmp_path)
    assert own is not None
    evaluation = {"metrics": [own.model_dump()]}
    spec = parse_spec(document | {"evaluation": evaluation, "search": {"metric": "eval/score", "mode": "min"}})
    _log(TensorBoardTracker(identify(paths, spec)), (10, 0.5), (20, 0.25), (30, 0.75), metric="eval/score")
    assert next(info.name.tag for info in _experiment(paths).metric_infos) == "best/eval/score"
    assert _metrics(paths)["best/eval/score"] == (20, 0.25)


def test_the_largest_value_is_the_best_if_the_search_maximizes(paths: TrialPaths, document: Any) -> None:
    spec, metric = parse_spec(document | {"search": {"metric": "eval/token_accuracy"}}), "eval/token_accuracy"
    _log(TensorBoardTracker(identify(paths, spec)), (10, 0.5), (20, 0.25), (30, 0.75), (40, 0.625), metric=metric)
    assert _metrics(paths)["best/eval/token_accuracy"] == (30, 0.75)


@pytest.mark.parametrize(
    ("state", "status"),
    [("COMPLETE", "SUCCESS"), ("STOPPED", "SUCCESS"), ("FAILED", "FAILURE"), ("CANCELLED", "UNKNOWN")],
)
def test_a_row_has_the_status_of_its_trial(paths: TrialPaths, spec: SweepSpec, state: str, status: str) -> None:
    tracker = TensorBoardTracker(identify(paths, spec))
    (running,) = _table(paths)
    assert running.sessions[0].status == api_pb2.STATUS_UNKNOWN
    tracker.finish(_result(spec, TrialState(state)))
    (ended,) = _table(paths)
    assert api_pb2.Status.Name(ended.sessions[0].status) == f"STATUS_{status}"
    assert (_cells(running)["state"], _cells(ended)["state"]) == ("RUNNING", state)


def test_answers_have_a_column_and_a_logarithmic_range_says_so(paths: TrialPaths, document: Any) -> None:
    space = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}, "lora.dropout": {"uniform": [0.0, 0.1]}}
    search = {"num_trials": 4, "algorithm": "random", "space": space}
    spec = parse_spec(document | {"search": search, "evaluation": {"metrics": ["exact_match"]}})
    tracker = TensorBoardTracker(identify(paths, spec))
    tracker.log(MetricPoint(step=10, tokens=100, time_s=1, values={"eval/loss": 0.5, "eval/exact_match": 0.75}))
    assert _metrics(paths)["best/eval/exact_match"] == (10, 0.75)
    infos = {info.name: info for info in _experiment(paths).hparam_infos}
    assert "logarithmic scale" in infos["training.learning_rate"].description
    assert infos["lora.dropout"].description == ""
    ends = infos["training.learning_rate"].domain_interval
    assert (ends.min_value, ends.max_value) == (1e-5, 1e-3)


def test_a_trial_that_pbt_has_changed_shows_its_present_values(paths: TrialPaths, spec: SweepSpec) -> None:
    TensorBoardTracker(identify(paths, spec, config=spec.trial_config(FIRST)))
    TensorBoardTracker(identify(paths, spec, step=10, config=spec.trial_config(SECOND)))
    (row,) = _table(paths)
    assert _cells(row)["lora.rank"] == 8
    assert _cells(row)["training.final_rate"] == 0.2


def test_a_sweep_without_searched_fields_still_has_a_row(paths: TrialPaths, document: Any) -> None:
    TensorBoardTracker(identify(paths, parse_spec(document)))
    (row,) = _table(paths)
    assert _cells(row) == {"state": "RUNNING", "lora.rank": 16, "training.learning_rate": 2e-4}


def test_a_single_trial_of_a_search_experiment_shows_the_experiments_own_values(
    paths: TrialPaths, document: Any
) -> None:
    search = {"num_trials": 4, "space": {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}}
    TensorBoardTracker(identify(paths, parse_spec(document | {"search": search})))
    (row,) = _table(paths)
    assert _cells(row) == {"state": "RUNNING", "training.learning_rate": 2e-4}


def test_neither_torch_nor_tensorflow_is_loaded(tmp_path: Path) -> None:
    """A process that only writes records would need seconds and memory for them."""
    for name in ("torch", "tensorflow"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} is loaded')")
    script = """
import sys
from pathlib import Path
from orchestrator.record import MetricPoint, SweepPaths, TrialResult
from orchestrator.spec import parse_spec
from orchestrator.tracking import open_trackers
from orchestrator.tracking.protocol import TrialIdentity

data = {"source": "embedded", "format": "template", "template": "{question} {answer}"}
tracking = {"tensorboard": True, "wandb": {"mode": "disabled"}}
spec = parse_spec({"base": {"model": "embedded"}, "data": data, "tracking": tracking})
paths = SweepPaths(Path(sys.argv[1])).trial("a")
config = spec.trial_config({})
start = TrialResult(trial_id="a", state="RUNNING", config=config, metric="eval/loss", mode="min")
trackers = open_trackers(TrialIdentity(paths, start, spec))
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


def _log(tracker: Any, *points: tuple[int, float], metric: str = "eval/loss") -> None:
    for step, value in points:
        tracker.log(MetricPoint(step=step, tokens=100 * step, time_s=step, values={metric: value}))


def _result(spec: SweepSpec, state: TrialState, best: BestPoint | None = None) -> TrialResult:
    config = spec.trial_config({})
    return TrialResult(trial_id="a", state=state, config=config, metric="eval/loss", mode="min", best=best)


def _read(paths: TrialPaths) -> EventMultiplexer:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(paths.tensorboard.parent))
    multiplexer.Reload()
    return multiplexer


def _scalars(paths: TrialPaths) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return run -> scalar -> its steps and values."""
    multiplexer, found = _read(paths), {}
    for run in multiplexer.Runs():
        tags = multiplexer.PluginRunToTagToContent("scalars").get(run, {})
        events = {tag: multiplexer.Tensors(run, tag) for tag in tags}
        found[run] = {
            tag: [(event.step, event.tensor_proto.float_val[0]) for event in values] for tag, values in events.items()
        }
    return found


def _context(paths: TrialPaths) -> Context:
    folder = str(paths.tensorboard.parent)
    return Context(TBContext(logdir=folder, data_provider=MultiplexerDataProvider(_read(paths), folder)))


def _experiment(paths: TrialPaths) -> Any:
    """Return the columns of the HParams dashboard."""
    return get_experiment.Handler(
        RequestContext(), _context(paths), "", api_pb2.GetExperimentRequest(include_metrics=True)
    ).run()


def _table(paths: TrialPaths) -> list[Any]:
    """Return the rows of the HParams dashboard."""
    question = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=list(api_pb2.Status.values()), include_metrics=True, slice_size=100
    )
    return list(Handler(RequestContext(), _context(paths), "", question).run().session_groups)


def _cells(row: Any) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in row.hparams.items()}


def _metrics(paths: TrialPaths) -> dict[str, tuple[int, float]]:
    """Return the step and the value of each metric of the only row."""
    (row,) = _table(paths)
    return {value.name.tag: (value.training_step, value.value) for value in row.metric_values}

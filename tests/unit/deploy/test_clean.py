"""What `orchestrator clean` removes, and what stays."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from orchestrator.adapters.bundle import CONFIG, SCORES, WEIGHTS, Facts, seal
from orchestrator.cli.frame import app
from orchestrator.deploy import open_sweep
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.clean import clean, what_to_free
from orchestrator.errors import RecordError, RequestError
from orchestrator.record import RowScores, SweepPaths, TestScore, read_sweep, write_record
from orchestrator.record.absent import AbsentError, read_absent
from orchestrator.record.lock import DriverInfo, driver_state, only_driver

ROWS = 100
MakeSweep = Callable[..., SweepPaths]
LOSSES = {"a": 0.50, "b": 0.50, "c": 0.60, "d": 0.70}


@pytest.fixture
def paths(tmp_path: Path, make_sweep: MakeSweep) -> SweepPaths:
    """An ended sweep: b is tied with a, and c and d are worse on every row."""
    rng = random.Random(0)
    rows = [rng.uniform(3, 7) for _ in range(ROWS)]
    paths = make_sweep(tmp_path / "s", {name: ("COMPLETE", loss) for name, loss in LOSSES.items()}, num_trials=4)
    for name, loss in LOSSES.items():
        moved = [(0.6 if i % 2 else -0.5) if name == "b" else (loss - 0.5) * 10 for i in range(ROWS)]
        losses = [row + move for row, move in zip(rows, moved, strict=True)]
        folder = paths.trial(name).adapter(7)
        scores = RowScores(losses=losses, hits=[5] * ROWS, tokens=[10] * ROWS, metrics={})
        (folder / SCORES).write_text(scores.model_dump_json())
        (folder / WEIGHTS).write_bytes(b"weights")
        (folder / CONFIG).write_text("{}")
        seal(folder, Facts(format="adapter", base={}, versions={}, metrics={}))
    for folder in (paths.trial("d").checkpoints, paths.trial("a").exploit_checkpoints):
        (folder / "checkpoint-3").mkdir(parents=True)
        (folder / "checkpoint-3" / "optimizer").write_bytes(b"state")
    return paths


def run(paths: SweepPaths, *options: str) -> Result:
    return CliRunner().invoke(app, ["clean", str(paths.root), *options])


def files(paths: SweepPaths) -> set[str]:
    found = (path for path in paths.root.rglob("*") if path.is_file())
    return {path.relative_to(paths.root).as_posix() for path in found if not path.name.startswith(".driver")}


def have_weights(paths: SweepPaths) -> str:
    return "".join(name for name in LOSSES if (paths.trial(name).adapter(7) / WEIGHTS).exists())


def test_best_is_equal_before_and_after(paths: SweepPaths) -> None:
    before = open_sweep(paths.root).best().as_dict()
    trials = read_sweep(paths.root).trials()
    assert run(paths, "--yes").exit_code == 0
    assert have_weights(paths) == "ab"
    assert open_sweep(paths.root).best().as_dict() == before
    assert before["damaged"] == {}
    assert [each["trial_id"] for each in before["choice"]["tied"]] == ["b"]
    assert read_sweep(paths.root).trials() == trials
    assert {f"trials/{name}/adapters/step-7/{SCORES}" for name in LOSSES} <= files(paths)
    assert not paths.trial("d").checkpoints.exists()
    assert not paths.trial("a").exploit_checkpoints.exists()
    assert run(paths, "--yes").stdout.startswith(f"{paths.root}: 0 files, 0 bytes")


def test_a_removed_adapter_is_named_as_such(paths: SweepPaths) -> None:
    run(paths, "--keep", "3", "--yes")
    assert have_weights(paths) == "abc"
    absent = read_absent(paths)
    assert {name: (each.num_bytes, each.num_kept) for name, each in absent.items()} == {"d": (9, 3)}
    record = read_sweep(paths.root)
    said = f"d: its adapter was removed by `orchestrator clean` on {absent['d'].time[:10]}; it was not among the 3 best"
    with pytest.raises(AbsentError) as caught:
        AdapterRef.of_trial(record, record.trials()[-1])
    assert caught.value.message == said


def test_a_dry_run_and_a_pipe_remove_nothing(paths: SweepPaths) -> None:
    before = files(paths)
    dry = run(paths, "--dry-run")
    assert dry.stdout == f"{paths.root}: 6 files, 28 bytes; adapters of 2 trials\n"
    refused = run(paths)
    assert isinstance(refused.exception, RequestError)
    assert refused.exception.remedy == "Give --yes."
    assert files(paths) == before


@pytest.mark.parametrize(("answer", "left"), [("n", "abcd"), ("y", "ab")])
def test_a_terminal_is_asked(paths: SweepPaths, monkeypatch: pytest.MonkeyPatch, answer: str, left: str) -> None:
    monkeypatch.setattr("orchestrator.cli.clean.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    said = CliRunner().invoke(app, ["clean", str(paths.root)], input=f"{answer}\n")
    assert "Remove these files?" in said.stdout
    assert have_weights(paths) == left


def test_a_sweep_that_changes_after_the_question_is_left_alone(paths: SweepPaths) -> None:
    record = read_sweep(paths.root)
    announced = what_to_free(record, 1)
    (paths.trial("b").checkpoints / "checkpoint-9").mkdir(parents=True)
    (paths.trial("b").checkpoints / "checkpoint-9" / "optimizer").write_bytes(b"state")
    before = files(paths)
    with pytest.raises(RequestError, match="the sweep has changed meanwhile"):
        clean(record, 1, announced)
    assert files(paths) == before


def test_a_running_driver_is_refused(paths: SweepPaths) -> None:
    before = files(paths)
    with only_driver(paths):
        refused = run(paths, "--yes")
    assert "a driver is running this sweep" in str(refused.exception)
    assert files(paths) == before


def test_the_name_of_a_killed_driver_stays(paths: SweepPaths) -> None:
    killed = DriverInfo(host=os.uname().nodename, pid=1, session="x")
    paths.driver.write_text(killed.model_dump_json())
    assert run(paths, "--yes").exit_code == 0
    assert driver_state(paths).driver == killed


def test_a_kill_between_record_and_deletion(paths: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next clean finishes the work, even if more adapters are to be kept by then."""

    def die(*_: object, **__: object) -> None:
        assert set(read_absent(paths)) == {"c", "d"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", die)
        record = read_sweep(paths.root)
        with pytest.raises(KeyboardInterrupt):
            clean(record, 1, what_to_free(record, 1))
    assert have_weights(paths) == "abcd"
    absent = read_absent(paths)
    with pytest.raises(AbsentError):
        read_sweep(paths.root).adapter(read_sweep(paths.root).trials()[-1])
    assert run(paths, "--keep", "4", "--yes").exit_code == 0
    assert (have_weights(paths), read_absent(paths)) == ("ab", absent)


def test_the_tested_trial_stays(paths: SweepPaths) -> None:
    scores = RowScores(losses=[1.0], hits=[1], tokens=[1], metrics={})
    write_record(paths.test, TestScore(trial_id="d", step=7, scores=scores, held_out={"eval/loss": 0.7}))
    run(paths, "--yes")
    assert have_weights(paths) == "abd"


@pytest.mark.parametrize("folder", ["repeats", "audit/1"])
def test_trials_that_ran_again_stay(paths: SweepPaths, make_sweep: MakeSweep, folder: str) -> None:
    make_sweep(paths.root / folder, {"again": ("COMPLETE", 0.9)})  # with the values of all trials of the fixture
    before = have_weights(paths)
    run(paths, "--yes")
    assert have_weights(paths) == before


def test_an_open_sweep_loses_only_checkpoints_of_ended_trials(tmp_path: Path, make_sweep: MakeSweep) -> None:
    paths = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5), "b": ("RUNNING", 0.6), "c": ("COMPLETE", 0.7)})
    for name in "ab":
        for folder in (paths.trial(name).checkpoints, paths.trial(name).exploit_checkpoints):
            folder.mkdir()
            (folder / "file").write_bytes(b"state")
    before = files(paths)
    said = run(paths, "--yes")
    assert before - files(paths) == {"trials/a/checkpoints/file"}
    assert "adapters stay: something is left to run" in said.stdout


def test_while_an_adapter_is_damaged_all_stay(paths: SweepPaths) -> None:
    (paths.trial("a").adapter(7) / SCORES).write_text("{")
    said = run(paths, "--yes")
    assert "adapters stay: the adapter of trial a is damaged" in said.stdout
    assert have_weights(paths) == "abcd"


def test_links_are_not_followed(paths: SweepPaths, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    paths.trial("c").checkpoints.symlink_to(outside)
    assert run(paths, "--yes").exit_code == 0
    assert (outside / "file").read_text() == "mine"


def test_a_damaged_record_of_absent_adapters(paths: SweepPaths) -> None:
    paths.absent.write_text("{")
    with pytest.raises(RecordError, match=r"absent\.json: is damaged"):
        read_absent(paths)

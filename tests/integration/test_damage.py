"""Damaged files of a sweep: named, passed over or repaired, and never taken for whole ones."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damaging import damaged_texts
from one_trial import ENGINES, Tiny, curve, run
from tiny import DEMO, TINY, Witness
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.data import load
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.record import SweepPaths, TrialState, read_sweep, start_of
from orchestrator.record.faults import read_faults
from orchestrator.record.manifest import MANIFEST
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.training.local import resume_local_trial, run_local_trial
from orchestrator.training.start import start_sweep
from orchestrator.training.trial import run_trial

pytestmark = pytest.mark.slow

SHORT = ["training.steps=6", "training.eval_steps=2", "training.save_steps=2", "data.max_rows=80"]

NOT_NEEDED = ("log.txt", ".lease", ".driver.lock", ".driver.json", ".step")
"""Files from which nothing is read, or which live only as long as a process."""

Damage = Callable[[bytes], Iterator[bytes]]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepPaths, SweepPaths]:
    """A finished sweep of two trials, and a trial that was interrupted after two checkpoints."""
    runs = tmp_path_factory.mktemp("runs")
    finished, half = SweepPaths(runs / "finished"), SweepPaths(runs / "half")
    searched = ["search={algorithm: grid, space: {lora.rank: {choice: [2, 4]}}}", "scheduler={kind: none}"]
    spec = load_spec(DEMO, [*TINY, *SHORT, *searched])
    start_sweep(spec, finished)
    for rank in (2, 4):
        run_trial(spec.trial_config({"lora.rank": rank}), spec, finished.trial(f"r{rank}"), finished.data, Witness())
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(load_spec(DEMO, [*TINY, *SHORT]), half, Witness(die_at=5))
    return finished, half


def answer(*call: str) -> tuple[dict[str, Any] | None, str]:
    """Run a command in this process; return its JSON document, or None, and all that it has said.

    Any exception other than the project's own errors, which a user would see as a traceback, fails the test.
    """
    done = CliRunner().invoke(app, [*call, "--json"])
    if done.exception is None:
        return json.loads(done.stdout), done.stdout
    if isinstance(done.exception, OrchestratorError):
        return None, str(done.exception)
    raise done.exception


def facts(paths: SweepPaths, file: Path | None = None) -> tuple[Any, Any, str]:
    """Return what `status` and `best` tell of the trials, and all that they and the readers of a damaged file say."""
    status, said = answer("status", str(paths.root))
    assert status is not None, said
    best, also = answer("best", str(paths.root))
    trials = {trial["trial_id"]: (trial["state"], trial["step"], trial["best"]) for trial in status["trials"]}
    chosen = best and (best["trial_id"], best["value"])
    return trials, chosen, said + also + ("" if file is None else words_of_readers(paths, file))


def words_of_readers(paths: SweepPaths, file: Path) -> str:
    """Return what is said by those who read a file: of adapters, of rows, and of the checkpoint to continue from."""
    kind, *rest = file.relative_to(paths.root).parts
    if kind == "data":
        with pytest.raises(DataError) as error:
            load(paths.data)
        return str(error.value)
    if "adapters" in rest:
        return answer("verify", str(file.parent))[1]
    open_ones = [trial for trial in read_sweep(paths.root).trials() if trial.state == TrialState.RUNNING]
    starts = [start_of(paths.trial(trial.trial_id), trial.model_copy(update={"warnings": []})) for trial in open_ones]
    return " ".join(warning for start in starts for warning in start.warnings)


def files_of(paths: SweepPaths) -> list[Path]:
    """Return the files that are read. The checkpoint before the newest one is, if that is damaged."""
    found = (path for path in sorted(paths.root.rglob("*")) if path.is_file() and path.name not in NOT_NEEDED)
    return [path for path in found if path.parent.name != "checkpoint-2"]


def check_each_file(paths: SweepPaths, damage: Damage) -> int:
    """Damage each file of a sweep in turn, and check that nothing wrong is told. Return how often that was done."""
    trials, chosen, _ = facts(paths)
    number = 0
    for file in files_of(paths):
        whole = file.read_bytes()
        for damaged in damage(whole):
            file.write_bytes(damaged)
            found, best, said = facts(paths, file)
            place = f"{file.relative_to(paths.root)}: {len(damaged)} of {len(whole)} bytes"
            assert file.name in said or file.parent.name in said, place
            assert best in (chosen, None) or f"adapters/{file.parent.name}" in place, place
            assert all(trials[trial_id] == fact for trial_id, fact in found.items() if fact[0] != "RUNNING"), place
            number += 1
        file.write_bytes(whole)
    assert facts(paths)[:2] == (trials, chosen)
    return number


def halved_or_flipped(whole: bytes) -> Iterator[bytes]:
    if whole:
        yield whole[: len(whole) // 2]
        *_, flipped = damaged_texts(whole)
        yield flipped


def test_no_damaged_file_is_taken_for_a_whole_one(sweeps: tuple[SweepPaths, SweepPaths]) -> None:
    for paths in sweeps:
        assert check_each_file(paths, halved_or_flipped) > 20


@pytest.mark.long
def test_no_file_that_ends_at_a_block_is_taken_for_a_whole_one(sweeps: tuple[SweepPaths, SweepPaths]) -> None:
    for paths in sweeps:
        assert check_each_file(paths, damaged_texts) > 20


def newest_checkpoint(paths: SweepPaths) -> Path:
    (trial_id,) = paths.trial_ids()
    return paths.trial(trial_id).checkpoints / "checkpoint-4"


def flip(file: Path) -> None:
    *_, flipped = damaged_texts(file.read_bytes())
    file.write_bytes(flipped)


def interrupt(spec: SweepSpec, paths: SweepPaths) -> str:
    """Run a trial up to step 5, and return its id."""
    with pytest.raises(KeyboardInterrupt):
        run_local_trial(spec, paths, Witness(die_at=5))
    (trial_id,) = paths.trial_ids()
    return trial_id


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trial_goes_on_from_the_checkpoint_before_a_damaged_one(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    spec = tiny(*SHORT, f"training.engine={engine}", "training.logging_steps=1")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    undisturbed = run(spec, whole)
    trial_id = interrupt(spec, broken)
    damages: list[tuple[str, Callable[[Path], None], str]] = [
        ("optimizer.pt", Path.unlink, "continued from checkpoint-2"),
        ("trainer_state.json", Path.unlink, "continued from checkpoint-2"),
        ("adapter_model.safetensors", flip, "continued from checkpoint-2"),
    ]
    for name, damage, then in damages:
        kept = tmp_path / "kept"
        shutil.copytree(newest_checkpoint(broken), kept)
        damage(newest_checkpoint(broken) / name)
        new = read_sweep(broken.root).trials()[0].model_copy(update={"warnings": []})
        (warning,) = start_of(broken.trial(trial_id), new).warnings
        assert name in warning
        assert then in warning
        shutil.rmtree(newest_checkpoint(broken))
        kept.rename(newest_checkpoint(broken))
    (newest_checkpoint(broken) / "optimizer.pt").unlink()
    witness = Witness()
    resumed = resume_local_trial(read_sweep(broken.root), witness)
    assert resumed is not None
    assert curve(broken) == curve(whole)
    assert resumed.best == undisturbed.best
    assert any("optimizer.pt is missing" in each for each in resumed.warnings)
    assert any("optimizer.pt is missing" in each for each in witness.said)


def test_without_a_whole_checkpoint_a_trial_begins_anew(tiny: Tiny, tmp_path: Path) -> None:
    """Also with a damaged progress, and rows that are made anew from their source."""
    spec = tiny(*SHORT, "training.logging_steps=1")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    run(spec, whole)
    trial_id = interrupt(spec, broken)
    paths = broken.trial(trial_id)
    for checkpoint in paths.checkpoints.iterdir():
        flip(checkpoint / "optimizer.pt")
    flip(paths.progress)
    flip(next(broken.data.rglob("*.arrow")))
    witness = Witness()
    resumed = resume_local_trial(read_sweep(broken.root), witness)
    assert resumed is not None
    assert resumed.state == TrialState.COMPLETE
    assert curve(broken) == curve(whole)
    assert any("began anew" in each for each in resumed.warnings)
    assert any("made anew from their sources" in each for each in witness.said)
    assert any("progress.json" in fault.cause for fault in read_faults(broken))


def test_points_that_are_cut_are_measured_again(tiny: Tiny, tmp_path: Path) -> None:
    spec = tiny(*SHORT, "training.logging_steps=1")
    whole, broken = SweepPaths(tmp_path / "whole"), SweepPaths(tmp_path / "broken")
    run(spec, whole)
    trial_id = interrupt(spec, broken)
    metrics = broken.trial(trial_id).metrics
    text = metrics.read_bytes()
    metrics.write_bytes(text[: text.index(b'"step":3') + 20])  # the checkpoint of step 4 has no point left
    resumed = resume_local_trial(read_sweep(broken.root), Witness())
    assert resumed is not None
    assert curve(broken) == curve(whole)


def test_an_adapter_without_its_manifest_is_named(sweeps: tuple[SweepPaths, SweepPaths]) -> None:
    finished, _ = sweeps
    best, _ = answer("best", str(finished.root))
    assert best is not None
    assert best["is_verified"]
    manifest = Path(best["adapter"]) / MANIFEST
    whole = manifest.read_bytes()
    manifest.unlink()
    try:
        best, _ = answer("best", str(finished.root))
        assert best is not None
        assert not best["is_verified"]
        assert "is unverified" in CliRunner().invoke(app, ["best", str(finished.root)]).stdout
        assert "cannot be checked" in answer("verify", str(manifest.parent))[1]
    finally:
        manifest.write_bytes(whole)


def test_resume_repairs_the_records_of_a_finished_sweep(sweeps: tuple[SweepPaths, SweepPaths], tmp_path: Path) -> None:
    copied = SweepPaths(tmp_path / "copied")
    shutil.copytree(sweeps[0].root, copied.root)
    before = [trial.model_dump() for trial in read_sweep(copied.root).trials()]
    damaged = [copied.sweep, copied.trial("r2").result, copied.trial("r4").config, copied.trial("r4").progress]
    for file in damaged:
        file.write_bytes(b"")
    flip(next(copied.data.rglob("*.arrow")))
    said = CliRunner().invoke(app, ["resume", str(copied.root)]).stdout
    assert "is finished; nothing is left to run" in said
    assert all(str(file) in said for file in damaged)
    record = read_sweep(copied.root)
    assert [trial.model_dump() for trial in record.trials()] == before
    status, _ = answer("status", str(copied.root))
    assert status is not None
    assert status["damaged"] == []
    load(copied.data)

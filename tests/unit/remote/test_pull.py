"""Sweeps in an object store as seen from another machine: pulled, looked at, taken over. Against a real S3 server."""

import json
import shutil
import time
from pathlib import Path

import pytest
from s3_server import KEY, SECRET, S3Server
from typer.testing import CliRunner

from orchestrator.adapters.bundle import CONFIG, SCORES, WEIGHTS, Facts, seal
from orchestrator.cli import app
from orchestrator.deploy.finished import FinishedSweep
from orchestrator.deploy.pulled import pull_sweep
from orchestrator.errors import RecordError, RequestError
from orchestrator.record import SweepPaths, TrialState, read_sweep
from orchestrator.record.lock import driver_state
from orchestrator.record.pulled import NotPulledError
from orchestrator.remote import view as module
from orchestrator.remote.holder import own_holder
from orchestrator.remote.location import driver_copy, pulled_copy
from orchestrator.remote.mirror import Mirror, TakenOverError
from orchestrator.remote.output import sweep_to_resume
from orchestrator.remote.pull import pull_records
from orchestrator.remote.store import RemoteFolder
from orchestrator.remote.view import refreshing, view_output, view_sweep

URI = "s3://bucket/runs/s"


@pytest.fixture
def mirror(driver: SweepPaths, remote: RemoteFolder) -> Mirror:
    """A mirror that has sent a sweep with a sealed adapter and rows."""
    adapter = driver.trial("a").adapter(7)
    (adapter / CONFIG).write_text("{}")
    (adapter / WEIGHTS).write_bytes(b"w" * 1000)
    (adapter / SCORES).write_text(json.dumps({"losses": [1.0], "hits": [1], "tokens": [2]}))
    seal(adapter, Facts(format="adapter", base={"model": "embedded"}, versions={}, metrics={}))
    driver.data.mkdir()
    (driver.data / "meta.json").write_text("{}")
    made = Mirror(driver.root, remote, print)
    made.make_round()
    return made


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, RequestError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.usefixtures("mirror")
def test_records_come_without_adapters_and_the_adapter_when_it_is_asked_for() -> None:
    record = view_sweep(URI)
    assert record.paths.root == pulled_copy(URI)
    assert {trial.trial_id: trial.state for trial in record.trials()} == {
        "a": TrialState.COMPLETE,
        "b": TrialState.RUNNING,
    }
    adapter = record.paths.trial("a").adapter(7)
    assert (adapter / SCORES).is_file()
    assert not (adapter / WEIGHTS).exists()
    assert not record.paths.tune_snapshot.exists()
    assert not record.paths.trial("b").checkpoints.exists()

    assert FinishedSweep(record).best().adapter == adapter
    assert (adapter / WEIGHTS).read_bytes() == b"w" * 1000
    assert not record.paths.data.exists()
    assert (record.rows() / "meta.json").is_file()


@pytest.mark.usefixtures("mirror")
def test_a_name_and_an_output_that_is_a_uri() -> None:
    assert view_sweep("s", "s3://bucket/runs/").info.name == "s"
    folder = view_output("s3://bucket/runs")
    assert [path.name for path in folder.iterdir()] == ["s"]


@pytest.mark.usefixtures("mirror")
def test_the_list_forgets_sweeps_that_are_gone(s3: S3Server) -> None:
    view_output("s3://bucket/runs")
    for key in s3.names():
        s3.client.delete_object(Bucket="bucket", Key=key)
    code, printed = command("list", "--output", "s3://bucket/runs")
    assert (code, printed.strip()) == (0, "there are no sweeps in s3://bucket/runs")


def test_only_what_has_changed_is_fetched_again(mirror: Mirror, driver: SweepPaths, s3: S3Server) -> None:
    view_sweep(URI)
    time.sleep(1.1)  # as between two rounds
    driver.trial("b").paused.write_text("by the scheduler")
    mirror.make_round()
    s3.requests.clear()
    record = view_sweep(URI)
    fetched = {path for method, path in s3.requests if method == "GET" and path != "/bucket"}
    assert fetched == {"/bucket/runs/s/trials/b/.paused"}
    assert record.trials()[1].state == TrialState.PAUSED
    driver.trial("b").paused.unlink()
    mirror.make_round()
    assert view_sweep(URI).trials()[1].state == TrialState.RUNNING


def test_a_driver_is_seen_by_its_signs_of_life(mirror: Mirror, driver: SweepPaths) -> None:
    assert not driver_state(view_sweep(URI).paths).is_running
    driver.driver.write_text(json.dumps({"host": "gpu-box", "pid": 3}))
    mirror.make_round()
    state = driver_state(view_sweep(URI).paths)
    assert state.is_running
    assert state.driver is not None
    assert state.driver.host == "gpu-box"


def test_a_view_is_refreshed(mirror: Mirror, driver: SweepPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PERIOD_S", 0.05)
    record = view_sweep(URI)
    with refreshing(record):
        (driver.trial("b").root / "log.txt").write_text("a log, which no view reads")
        driver.search_ended.write_text("{}")
        mirror.make_round()
        deadline = time.monotonic() + 20
        while not record.paths.search_ended.is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not record.paths.trial("b").log.exists()


@pytest.mark.usefixtures("mirror")
def test_pull_into_a_folder(tmp_path: Path) -> None:
    to = tmp_path / "mine"
    code, printed = command("pull", URI, "--to", str(to), "--adapters", "none")
    assert code == 0, printed
    with pytest.raises(NotPulledError, match=f"a: its adapter was not pulled from {URI}") as error:
        FinishedSweep(read_sweep(to)).best()
    assert f"orchestrator pull {URI} --adapters all --to {to}" in error.value.remedy
    with pytest.raises(NotPulledError, match="rows were not pulled"):
        read_sweep(to).rows()

    code, printed = command("pull", URI, "--to", str(to), "--rows")
    assert code == 0, printed
    assert FinishedSweep(read_sweep(to)).best().trial.trial_id == "a"
    assert read_sweep(to).rows().is_dir()
    assert sorted(path.name for path in to.iterdir() if path.name.startswith(".")) == [".pulled.json"]


@pytest.mark.usefixtures("mirror")
def test_an_interrupted_pull_leaves_no_half_adapter(s3: S3Server, tmp_path: Path) -> None:
    list(pull_sweep(URI, tmp_path / "mine", "none"))

    def refuse(method: str, path: str) -> None:
        if method == "GET" and path.endswith(WEIGHTS):
            s3.status = 403

    s3.before = refuse
    with pytest.raises(Exception, match="ACCESS_DENIED"):
        list(pull_sweep(URI, tmp_path / "mine", "best"))
    with pytest.raises(NotPulledError):
        FinishedSweep(read_sweep(tmp_path / "mine")).best()


@pytest.mark.usefixtures("mirror")
def test_pull_does_not_mix_sweeps(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for place in ("file", "folder"):
        code, printed = command("pull", URI, "--to", str(tmp_path / place))
        assert code == 2
        assert "is there already, and is no copy of it" in printed
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "s3://bucket/runs/nothing"], "s3://bucket/runs/nothing: there is no such sweep"),
        (["best", "s3://bucket/runs/nothing"], "s3://bucket/runs/nothing: there is no such sweep"),
        (["status", "ftp://bucket/s"], "the scheme ftp is not supported; use a folder, or s3://, gs://, az://"),
        (["status", "s3://bucket/s?region=x"], "must be s3://BUCKET/FOLDER"),
        (["status", "s3://"], "must be s3://BUCKET/FOLDER"),
        (["pull", "runs/s"], "runs/s: is no URI"),
        (["stop", URI], f"{URI}: is in an object store, where this command cannot work"),
        (["clean", URI], f"{URI}: is in an object store, where this command cannot work"),
        (["status", "az://bucket/s"], "AZURE_STORAGE_ACCOUNT is not set"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    code, printed = command(*arguments)
    assert code == 2
    assert message in printed


def test_another_machine_takes_a_sweep_over(
    mirror: Mirror, driver: SweepPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = driver_copy(URI)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another machine"))
    record = sweep_to_resume("s", "s3://bucket/runs")
    root = record.paths.root
    assert root == driver_copy(URI) != first
    assert (record.paths.trial("b").checkpoints / "weights").read_text() == "first"
    assert record.paths.tune_snapshot.read_bytes() == b"state"
    assert record.paths.data.is_dir()
    assert not record.paths.pulled.exists()
    with pytest.raises(TakenOverError):
        mirror.make_round()

    (record.paths.trial("b").checkpoints / "weights").write_text("second")
    Mirror(root, RemoteFolder(URI), print).make_round()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    again = sweep_to_resume(driver.root, "runs")  # its older copy is still here
    assert (again.paths.trial("b").checkpoints / "weights").read_text() == "second"
    (aside,) = driver.root.parent.glob(".s.older-*")
    assert (aside / "trials" / "b" / "checkpoints" / "weights").read_text() == "first"


@pytest.mark.usefixtures("mirror")
def test_the_same_machine_goes_on_with_what_the_store_lacks(driver: SweepPaths) -> None:
    (driver.trial("b").checkpoints / "weights").write_text("later than the last round")
    record = sweep_to_resume(URI, "runs")
    assert (record.paths.trial("b").checkpoints / "weights").read_text() == "later than the last round"


@pytest.mark.usefixtures("mirror")
def test_a_deleted_copy_is_pulled_again(driver: SweepPaths) -> None:
    shutil.rmtree(driver.root)
    record = sweep_to_resume(URI, "runs")
    assert (record.paths.trial("b").checkpoints / "weights").read_text() == "first"
    Mirror(record.paths.root, RemoteFolder(URI), print).make_round()


def test_a_sweep_that_runs_elsewhere_is_not_taken_over(
    mirror: Mirror, driver: SweepPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.driver.write_text(json.dumps({"host": "gpu-box", "pid": 3}))
    mirror.make_round()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(RequestError, match="a driver on gpu-box is running this sweep"):
        sweep_to_resume(URI, "runs")
    assert own_holder(driver_copy(URI)) is None
    mirror.make_round()


def test_nothing_in_the_store_is_no_sweep() -> None:
    with pytest.raises(RecordError, match="there is no such sweep"):
        sweep_to_resume(URI, "runs")


@pytest.mark.usefixtures("mirror")
def test_no_key_is_in_what_was_written() -> None:
    view_sweep(URI)
    files = [path for path in driver_copy(URI).parents[3].rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert KEY.encode() not in path.read_bytes()
        assert SECRET.encode() not in path.read_bytes()


def test_repeats_share_their_rows_after_a_pull(
    mirror: Mirror, driver: SweepPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(driver.root, tmp_path / "copied", ignore=shutil.ignore_patterns("data", ".*"))
    (tmp_path / "copied").rename(driver.repeats)
    SweepPaths(driver.repeats).data.symlink_to("../data")
    mirror.make_round()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another machine"))
    repeats = SweepPaths(sweep_to_resume(URI, "runs").paths.repeats)
    assert repeats.data.is_symlink()
    assert (repeats.data / "meta.json").is_file()


def test_a_sweep_that_ends_while_it_is_pulled_is_looked_up_again(
    mirror: Mirror, driver: SweepPaths, remote: RemoteFolder, s3: S3Server, tmp_path: Path
) -> None:
    """A file that the driver has removed since the listing is not missed in the copy."""
    driver.trial("b").paused.touch()
    mirror.make_round()

    def remove(method: str, path: str) -> None:
        if path.endswith(".paused") and method in ("GET", "HEAD"):
            s3.before = lambda *_: None
            s3.client.delete_object(Bucket="bucket", Key="runs/s/trials/b/.paused")

    s3.before = remove
    pull_records(remote, tmp_path / "mine")
    assert not SweepPaths(tmp_path / "mine").trial("b").paused.exists()
    assert read_sweep(tmp_path / "mine").trials()

"""What reaches an object store, in which order, and what happens while it fails. Against a real S3 server."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import SECRET, S3Server

from orchestrator.errors import StorageError
from orchestrator.record import SweepPaths
from orchestrator.remote import mirror as module
from orchestrator.remote.holder import hold
from orchestrator.remote.layout import is_record
from orchestrator.remote.mirror import Mirror, TakenOverError, mirroring
from orchestrator.remote.store import RefusedError, RemoteError, RemoteFolder

PREFIX = "runs/s/"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def mirror(driver: SweepPaths, remote: RemoteFolder, said: list[str]) -> Mirror:
    return Mirror(driver.root, remote, said.append)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rounds follow each other at once."""
    monkeypatch.setattr(module, "PERIOD_S", 0.05)
    monkeypatch.setattr(module, "_LEAST_S", 0.05)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.2)


def names(s3: S3Server) -> set[str]:
    """Return the files of the sweep in the store, but for the name of its driver's copy."""
    return {key.removeprefix(PREFIX) for key in s3.names()} - {".holder.json"}


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_record_names_is_sent_before_it(mirror: Mirror, s3: S3Server) -> None:
    s3.requests.clear()
    mirror.make_round()

    sent = [name.removeprefix(PREFIX) for name in s3.puts()]
    order = [
        "trials/b/checkpoints/weights",
        "trials/b/metrics.jsonl",
        "trials/b/progress.json",
        "trials/a/result.json",
        "tune-snapshot.zip",
        "sweep.json",
    ]
    assert not is_record("tune-snapshot.zip")
    assert not is_record("tune-snapshot-before.zip"), "views pull no state of the search"
    assert [name for name in sent if name in order] == order
    assert sent.index("trials/a/adapters/step-7/adapter_model.safetensors") < sent.index("trials/a/trial.json")
    assert ".driver.lock" not in sent
    assert len(sent) == len(set(sent))


def test_only_changes_are_sent_and_what_is_gone_is_removed_last(
    mirror: Mirror, driver: SweepPaths, s3: S3Server
) -> None:
    mirror.make_round()
    s3.requests.clear()
    mirror.make_round()
    assert s3.puts() == []

    shutil.rmtree(driver.trial("b").checkpoints)
    (driver.root / "trials" / "b" / "adapters" / "step-9").mkdir()
    (driver.root / "trials" / "b" / "adapters" / "step-9" / "adapter_config.json").write_text("{}")
    driver.trial("b").progress.write_text('{"changed": true}')
    mirror.make_round()
    writes = [path.removeprefix(f"/bucket/{PREFIX}") for method, path in s3.requests if method in ("PUT", "DELETE")]
    writes = [path for path in writes if not path.endswith("/")]  # marks of empty folders
    assert writes == [
        "trials/b/adapters/step-9/adapter_config.json",
        "trials/b/progress.json",
        "trials/b/checkpoints/weights",
    ]
    assert "trials/b/checkpoints/weights" not in names(s3)


def test_logs_are_sent_less_often_and_at_the_end(mirror: Mirror, driver: SweepPaths, s3: S3Server) -> None:
    mirror.make_round()
    with (driver.root / "driver.log").open("a") as log:
        log.write("more\n")
    mirror.make_round()
    assert s3.text(f"{PREFIX}driver.log") == "started\n"
    mirror.start()
    mirror.finish()
    assert s3.text(f"{PREFIX}driver.log") == "started\nmore\n"
    assert not (driver.root / ".mirror").exists()


def test_a_folder_that_the_trial_removes_while_it_is_sent_is_sent_whole(
    mirror: Mirror, driver: SweepPaths, s3: S3Server
) -> None:
    """Otherwise a record of this round would name a checkpoint that the store lacks."""

    def remove(method: str, _: str) -> None:
        if method == "PUT":
            shutil.rmtree(driver.trial("b").checkpoints, ignore_errors=True)

    s3.before = remove
    mirror.make_round()
    assert s3.text(f"{PREFIX}trials/b/checkpoints/weights") == "first"
    mirror.make_round()
    assert "trials/b/checkpoints/weights" not in names(s3)


def test_a_record_that_changes_during_a_round_is_sent_as_it_was_when_the_round_began(
    mirror: Mirror, driver: SweepPaths, s3: S3Server
) -> None:
    def change(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("weights"):
            driver.trial("b").progress.write_text("names a later checkpoint")

    before = driver.trial("b").progress.read_text()
    s3.before = change
    mirror.make_round()
    assert s3.text(f"{PREFIX}trials/b/progress.json") == before
    mirror.make_round()
    assert s3.text(f"{PREFIX}trials/b/progress.json") == "names a later checkpoint"


def test_a_record_that_changes_while_a_round_begins_names_nothing_that_is_not_sent(
    mirror: Mirror, driver: SweepPaths, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature, checkpoint = module._signature, driver.trial("b").checkpoints / "second"

    def change(path: Path) -> tuple[int, int, int]:
        before = signature(path)
        if path == driver.trial("b").progress and not checkpoint.exists():
            checkpoint.write_text("weights")
            path.write_text("names the second checkpoint")
        return before

    monkeypatch.setattr(module, "_signature", change)
    mirror.make_round()
    assert s3.text(f"{PREFIX}trials/b/progress.json") == "names the second checkpoint"
    assert "trials/b/checkpoints/second" in names(s3)


@pytest.mark.usefixtures("quick")
def test_a_store_that_answers_503_for_a_while_gets_everything_later(
    mirror: Mirror, driver: SweepPaths, s3: S3Server, said: list[str]
) -> None:
    mirror.start()
    wait_until(lambda: "sweep.json" in names(s3))
    s3.status = 503
    driver.trial("b").progress.write_text("second")
    wait_until(lambda: bool(said))
    driver.trial("b").progress.write_text("third")
    time.sleep(0.5)  # several rounds fail
    assert len(said) == 1
    assert said[0].startswith("warning: the sweep goes on, but its copy waits: s3://bucket/runs/s: ")
    s3.status = None
    wait_until(lambda: len(said) == 2)
    assert "copied again after" in said[1]
    mirror.finish()
    assert s3.text(f"{PREFIX}trials/b/progress.json") == "third"


@pytest.mark.usefixtures("quick")
def test_a_store_that_is_down_for_seconds(mirror: Mirror, driver: SweepPaths, s3: S3Server, said: list[str]) -> None:
    mirror.start()
    wait_until(lambda: "sweep.json" in names(s3))
    s3.stop()
    driver.trial("b").progress.write_text("while it was down")
    wait_until(lambda: bool(said))
    finishing = threading.Thread(target=mirror.finish)  # the sweep ends during the outage
    finishing.start()
    time.sleep(1)
    assert finishing.is_alive(), "the end waits for the store"
    s3.start()
    finishing.join(20)
    assert not finishing.is_alive()
    assert s3.text(f"{PREFIX}trials/b/progress.json") == "while it was down"


def test_a_slow_store_gets_what_is_there_when_it_is_ready(mirror: Mirror, s3: S3Server) -> None:
    s3.delay_s = 0.2
    began = time.monotonic()
    mirror.make_round()
    num_requests = len(s3.requests)
    assert time.monotonic() - began < 0.2 * num_requests, "files of one rank are sent at the same time"
    assert "sweep.json" in names(s3)


@pytest.mark.usefixtures("quick")
def test_a_store_that_stays_down_is_named_at_the_end_and_nothing_is_lost(
    mirror: Mirror, driver: SweepPaths, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_ROUNDS_S", 0.5)
    s3.stop()
    mirror.start()
    with pytest.raises(StorageError, match="lacks the last changes") as error:
        mirror.finish()
    assert f"orchestrator resume {driver.root}" in error.value.remedy
    assert driver.sweep.is_file()
    s3.start()


@pytest.mark.usefixtures("quick")
def test_a_permission_that_is_taken_away_ends_the_last_rounds_at_once(mirror: Mirror, s3: S3Server) -> None:
    s3.status = 403
    mirror.start()
    began = time.monotonic()
    with pytest.raises(StorageError, match="ACCESS_DENIED") as error:
        mirror.finish()
    assert time.monotonic() - began < 5
    assert "Check the credentials" in error.value.remedy
    assert SECRET not in str(error.value)


def test_a_driver_that_was_replaced_sends_nothing(mirror: Mirror, s3: S3Server, tmp_path: Path) -> None:
    mirror.make_round()
    hold(RemoteFolder("s3://bucket/runs/s"), tmp_path / "elsewhere" / "s")
    s3.requests.clear()
    with pytest.raises(TakenOverError, match="another driver has resumed this sweep"):
        mirror.make_round()
    assert s3.puts() == []


def test_a_folder_that_was_removed_removes_nothing_from_the_store(
    mirror: Mirror, driver: SweepPaths, s3: S3Server
) -> None:
    mirror.make_round()
    before = names(s3)
    shutil.rmtree(driver.root)
    driver.root.mkdir()
    with pytest.raises(RefusedError, match="the sweep's folder is gone"):
        mirror.make_round()
    assert names(s3) == before


def test_a_new_driver_on_the_same_copy_sends_only_what_the_store_lacks(
    mirror: Mirror, driver: SweepPaths, remote: RemoteFolder, s3: S3Server
) -> None:
    mirror.make_round()
    (driver.root / "data").mkdir()
    (driver.root / "data" / "rows").write_text("rows")
    shutil.rmtree(driver.trial("b").checkpoints)
    s3.requests.clear()
    Mirror(driver.root, remote, print).make_round()
    sent = {name.removeprefix(PREFIX) for name in s3.puts()}
    assert "data/rows" in sent
    assert not any(name.endswith(".safetensors") for name in sent)
    assert "trials/b/checkpoints/weights" not in names(s3)


def test_the_end_of_a_driver_is_seen(driver: SweepPaths, s3: S3Server) -> None:
    driver.driver.write_text("{}")
    with mirroring(driver, print):
        wait_until(lambda: ".driver.json" in names(s3))
    assert ".driver.json" not in names(s3)
    assert driver.driver.is_file(), "the lock removes it after the last round"


def test_an_error_of_the_sweep_goes_before_one_of_the_store(
    driver: SweepPaths, s3: S3Server, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_ROUNDS_S", 0.0)
    s3.stop()
    with pytest.raises(ValueError, match="the trial"), mirroring(driver, said.append):
        raise ValueError("the trial")
    assert any("lacks the last changes" in line for line in said)
    s3.start()


def test_a_plain_folder_is_not_mirrored(tmp_path: Path, said: list[str]) -> None:
    with mirroring(SweepPaths(tmp_path / "runs" / "s"), said.append):
        pass
    assert said == []


@pytest.mark.usefixtures("quick")
def test_an_error_of_the_code_itself_is_not_hidden(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Mirror) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Mirror, "make_round", fail)
    mirror.start()
    with pytest.raises(ZeroDivisionError):
        mirror.finish()


def test_a_missing_bucket_is_refused_for_good() -> None:
    with pytest.raises(RefusedError, match="NO_SUCH_BUCKET"):
        RemoteFolder("s3://nowhere/runs").write("x", b"")


def test_a_server_that_is_down_may_come_back(s3: S3Server) -> None:
    remote = RemoteFolder("s3://bucket/runs")
    s3.stop()
    with pytest.raises(RemoteError) as error:
        remote.write("x", b"")
    assert not error.value.is_final
    s3.start()

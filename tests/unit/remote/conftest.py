"""An S3 server, a cache of its own, and a sweep that a driver on this machine mirrors."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import S3Server, s3_server

from orchestrator.record import SweepPaths
from orchestrator.remote.holder import hold
from orchestrator.remote.location import CACHE_VARIABLE, driver_copy
from orchestrator.remote.store import RemoteFolder

URI = "s3://bucket/runs/s"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(monkeypatch) as server:
        yield server


@pytest.fixture
def remote() -> RemoteFolder:
    return RemoteFolder(URI)


@pytest.fixture
def driver(remote: RemoteFolder, make_sweep: Callable[..., SweepPaths]) -> SweepPaths:
    """The driver's copy of a sweep of a finished and a running trial, which has not been sent yet."""
    paths = make_sweep(driver_copy(URI), {"a": ("COMPLETE", 0.5), "b": ("RUNNING", 0.7)})
    hold(remote, paths.root)
    paths.trial("b").checkpoints.mkdir()
    (paths.trial("b").checkpoints / "weights").write_text("first")
    paths.trial("b").metrics.write_text("{}\n")
    paths.tune_snapshot.write_bytes(b"state")
    paths.driver_lock.touch()
    (paths.root / "driver.log").write_text("started\n")
    return paths

"""A resume ends before Ray starts if somebody else may have written the state of the search."""

import io
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.sweep import finish_audit, resume_sweep, run
from orchestrator.sweep.signature import read_signed, write_signed


def archive() -> bytes:
    """Return an archive of a search's state."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("scheduler.pkl", b"a pickle")
    return content.getvalue()


class Started(Exception):
    """The resume has come as far as starting Ray."""


@pytest.fixture
def paths(tmp_path: Path, make_sweep: Any, monkeypatch: pytest.MonkeyPatch) -> SweepPaths:
    """A sweep with a trial that runs, where starting Ray raises `Started`."""

    @contextmanager
    def start(*_: Any) -> Any:
        raise Started
        yield

    monkeypatch.setattr(run, "connection", start)
    made: SweepPaths = make_sweep(tmp_path / "s", {"a": ("RUNNING", 0.5)})
    return made


@pytest.mark.parametrize("inside", [".", "repeats"])
def test_a_resume_refuses_a_state_that_is_not_signed(paths: SweepPaths, make_sweep: Any, inside: str) -> None:
    write_signed(paths.tune_snapshot, archive())
    snapshot = (paths if inside == "." else make_sweep(paths.repeats, {"a": ("RUNNING", 0.5)})).tune_snapshot
    snapshot.write_bytes(planted := archive())
    record = read_sweep(paths.root)
    with pytest.raises(RecordError, match=f"{snapshot}: is not signed"):
        resume_sweep(record, lambda _: None)
    assert snapshot.read_bytes() == planted
    with pytest.raises(Started):
        resume_sweep(record, lambda _: None, trust_state=True)
    assert read_signed(snapshot) == planted
    with pytest.raises(Started):
        resume_sweep(record, lambda _: None)


def test_an_audit_refuses_a_state_that_is_not_signed(paths: SweepPaths, make_sweep: Any) -> None:
    audit = make_sweep(paths.root / "audit" / "x", {"a": ("RUNNING", 0.5)})
    audit.tune_snapshot.write_bytes(archive())
    found, begun = read_sweep(paths.root), read_sweep(audit.root)
    with pytest.raises(RecordError, match=f"{audit.tune_snapshot}: is not signed"):
        finish_audit(found, begun, lambda _: None)
    with pytest.raises(Started):
        finish_audit(found, begun, lambda _: None, trust_state=True)

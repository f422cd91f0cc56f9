"""The death of raylet or GCS is noticed at once, and no other end."""

import threading
from types import SimpleNamespace

import pytest

from orchestrator import ray_watch
from orchestrator.errors import RayLostError
from orchestrator.ray_watch import watching_local_ray, when_ray_is_lost


def processes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """Return the codes with which raylet and GCS have ended, to be set."""
    codes: dict[str, int | None] = {"raylet": None, "GCS": None}
    found = [(name, SimpleNamespace(poll=lambda name=name: codes[name])) for name in codes]
    monkeypatch.setattr(ray_watch, "local_ray_processes", lambda: found)
    monkeypatch.setattr(ray_watch, "_PERIOD_S", 0.01)
    return codes


@pytest.mark.parametrize(
    ("name", "code", "how"), [("raylet", -9, "was killed by signal 9"), ("GCS", 1, "ended with code 1")]
)
def test_a_death_is_told_once(monkeypatch: pytest.MonkeyPatch, name: str, code: int, how: str) -> None:
    codes, errors, told = processes(monkeypatch), list[RayLostError](), threading.Event()

    def handle(error: RayLostError) -> None:
        errors.append(error)
        told.set()

    with when_ray_is_lost(handle), watching_local_ray():
        codes[name] = code
        assert told.wait(10)
    (error,) = errors
    assert error.exit_code == 69
    assert error.message == f"Ray on this machine has died: its {name} {how}"


def test_an_end_after_the_block_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, errors = processes(monkeypatch), list[RayLostError]()
    with when_ray_is_lost(errors.append):
        with watching_local_ray():
            (thread,) = [each for each in threading.enumerate() if each.name == "ray-watch"]
        codes["raylet"] = 0
        thread.join(10)
    assert not thread.is_alive()
    assert errors == []


def test_without_a_handler_the_message_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = processes(monkeypatch)
    codes["raylet"] = -9
    with watching_local_ray():
        (thread,) = [each for each in threading.enumerate() if each.name == "ray-watch"]
        thread.join(10)
    assert "error: Ray on this machine has died" in capsys.readouterr().err

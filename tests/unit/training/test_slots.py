"""Leases of a host: who holds a slot, and who is told that it is gone."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import TrialPaths
from orchestrator.training.attempt.events import Completed, LeaseLost, Left
from orchestrator.training.worker import slots
from orchestrator.training.worker.file_writers import FileWriter
from orchestrator.training.worker.slots import SlotLease, SlotPool

START: Any = None
"""What a trial trains is nothing to a lease."""


def paths(name: str) -> TrialPaths:
    return TrialPaths(Path("sweep"), name)


def take(leases: SlotPool, name: str, trial: str) -> SlotLease:
    lease = leases.lease(name, START, paths(trial))
    assert lease is not None
    return lease


def test_a_slot_is_one_trials_until_it_is_done() -> None:
    leases = SlotPool(2)
    first, second = take(leases, "1", "a"), take(leases, "2", "b")
    assert {first.slot, second.slot} == {0, 1}
    assert leases.num_free() == 0
    assert leases.lease("3", START, paths("c")) is None
    with pytest.raises(LeaseLost, match="lease 3 is unknown here"):
        leases.get("3")
    leases.free(first)
    assert leases.num_free() == 1
    assert leases.get("1") is first, "its last events are still to be taken"
    assert take(leases, "4", "c").slot == first.slot
    assert not second.stopping


def test_another_attempt_at_a_trial_asks_the_earlier_one_to_stop() -> None:
    leases = SlotPool(2)
    earlier, other = take(leases, "1", "a"), take(leases, "2", "b")
    assert leases.lease("3", START, paths("a")) is None, "it waits for the slot"
    assert earlier.stopping
    assert not other.stopping


def test_a_lease_that_has_ended_and_of_which_nobody_hears_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    leases = SlotPool(3)
    ended, silent = take(leases, "1", "a"), take(leases, "2", "b")
    ended.emit(Completed(0.0, 0.0, 0.0))
    leases.free(ended)
    take(leases, "3", "c")
    assert leases.get("1") is ended
    monkeypatch.setattr(slots, "LEASE_TIMEOUT_S", -1.0)
    assert ended.is_expired
    take(leases, "4", "d")
    with pytest.raises(LeaseLost):
        leases.get("1")
    assert leases.get("2") is silent, "it trains on, until it has seen that it is to stop"


def test_all_are_told_that_the_host_is_lost_and_nobody_is_let_in() -> None:
    leases = SlotPool(2)
    running, ended = take(leases, "1", "a"), take(leases, "2", "b")
    ended.emit(Completed(0.0, 0.0, 0.0))
    leases.free(ended)
    leases.fail_all("RuntimeError: no more")
    (event,) = running.take_events(0)
    assert isinstance(event, Left)
    assert event.lost == "RuntimeError: no more"
    assert [type(each) for each in ended.take_events(0)] == [Completed], "nothing comes after the last"
    with pytest.raises(LeaseLost, match="RuntimeError: no more"):
        leases.lease("3", START, paths("c"))


def test_an_interrupted_host_has_each_trial_write_a_checkpoint_and_begins_no_other() -> None:
    leases = SlotPool(2)
    lease = take(leases, "1", "a")
    assert not lease.wants_checkpoint
    assert not leases.interrupt(wait_s=0.1), "it has not ended"
    assert lease.stopping
    assert lease.wants_checkpoint
    assert leases.lease("2", START, paths("b")) is None
    threading.Timer(0.1, lambda: lease.emit(Left(0.0, 0.0, 0.0, 5, None))).start()
    assert leases.interrupt(wait_s=10.0)


def test_a_trial_that_was_stopped_for_good_writes_no_checkpoint() -> None:
    lease = take(SlotPool(1), "1", "a")
    lease.release()
    assert lease.stopping
    assert not lease.wants_checkpoint


@pytest.mark.parametrize(("number", "is_storage"), [(errno.ENOSPC, True), (errno.EACCES, False)])
def test_a_file_that_cannot_be_written_ends_the_attempt_and_says_why(number: int, is_storage: bool) -> None:
    lease = take(SlotPool(1), "1", "a")
    writer = FileWriter(lease)

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    writer.do(fail)
    (told,) = lease.take_events(10.0)
    assert isinstance(told, Left)
    assert os.strerror(number) in str(told.lost)
    assert told.is_storage is is_storage
    assert lease.stopping
    writer.close()


def test_a_log_on_a_full_disk_holds_nobody_up() -> None:
    """The thread that writes files prints the traceback there: had it died of that, its trial would never end."""
    lease = take(SlotPool(1), "1", "a")
    with Path("/dev/full").open("w", buffering=1) as full, pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", full)
        writer = FileWriter(lease)
        writer.do(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        (told,) = lease.take_events(10.0)
        assert isinstance(told, Left)
        assert told.is_storage
        writer.close()
        writer.thread.join(10)
        patched.undo()
        with suppress(OSError):
            full.close()

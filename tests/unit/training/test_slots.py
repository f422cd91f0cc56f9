"""Slot pool of a worker: who holds a slot, and what is reported when the worker or a disk fails."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import TrialPaths
from orchestrator.training.attempt.events import Completed, Evaluated, LeaseLost, Left
from orchestrator.training.worker import slots
from orchestrator.training.worker.file_writers import FileWriter
from orchestrator.training.worker.slots import SlotLease, SlotPool

START: Any = None
"""A lease does not look at the trial."""


def paths(name: str) -> TrialPaths:
    return TrialPaths(Path("sweep"), name)


def lease_slot(pool: SlotPool, name: str, trial: str) -> SlotLease:
    lease = pool.lease(name, START, paths(trial))
    assert lease is not None
    return lease


def test_slot_belongs_to_one_trial_until_it_is_freed() -> None:
    pool = SlotPool(2)
    first, second = lease_slot(pool, "1", "a"), lease_slot(pool, "2", "b")
    assert {first.slot, second.slot} == {0, 1}
    assert pool.num_free() == 0
    assert pool.lease("3", START, paths("c")) is None
    with pytest.raises(LeaseLost, match="lease 3 is unknown here"):
        pool.get("3")
    pool.free(first)
    assert pool.num_free() == 1
    assert pool.get("1") is first, "its last events are still to be taken"
    assert lease_slot(pool, "4", "c").slot == first.slot
    assert not second.stopping


def test_new_attempt_at_a_trial_asks_the_earlier_one_to_stop() -> None:
    pool = SlotPool(2)
    earlier, other = lease_slot(pool, "1", "a"), lease_slot(pool, "2", "b")
    assert pool.lease("3", START, paths("a")) is None, "the new attempt waits for a slot"
    assert earlier.stopping
    assert not other.stopping


def test_ended_and_expired_lease_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SlotPool(3)
    ended, silent = lease_slot(pool, "1", "a"), lease_slot(pool, "2", "b")
    ended.emit(Completed(0.0, 0.0, 0.0))
    pool.free(ended)
    lease_slot(pool, "3", "c")
    assert pool.get("1") is ended
    monkeypatch.setattr(slots, "LEASE_TIMEOUT_S", -1.0)
    assert ended.is_expired
    lease_slot(pool, "4", "d")
    with pytest.raises(LeaseLost):
        pool.get("1")
    assert pool.get("2") is silent, "it trains until it has seen that it should stop"


def test_lost_worker_ends_all_leases_and_admits_no_trial() -> None:
    pool = SlotPool(2)
    running, ended = lease_slot(pool, "1", "a"), lease_slot(pool, "2", "b")
    ended.emit(Completed(0.0, 0.0, 0.0))
    pool.free(ended)
    pool.fail_all("RuntimeError: no more")
    (event,) = running.take_events(0)
    assert isinstance(event, Left)
    assert event.lost == "RuntimeError: no more"
    assert [type(each) for each in ended.take_events(0)] == [Completed], "nothing comes after the last"
    with pytest.raises(LeaseLost, match="RuntimeError: no more"):
        pool.lease("3", START, paths("c"))


def test_interrupted_worker_has_each_trial_write_a_checkpoint_and_starts_no_other() -> None:
    pool = SlotPool(2)
    lease = lease_slot(pool, "1", "a")
    assert not lease.wants_checkpoint
    assert not pool.interrupt(wait_s=0.1), "it has not ended"
    assert lease.stopping
    assert lease.wants_checkpoint
    assert pool.lease("2", START, paths("b")) is None
    threading.Timer(0.1, lambda: lease.emit(Left(0.0, 0.0, 0.0, 5, None))).start()
    assert pool.interrupt(wait_s=10.0)


def test_trial_stopped_for_good_writes_no_checkpoint() -> None:
    lease = lease_slot(SlotPool(1), "1", "a")
    lease.release()
    assert lease.stopping
    assert not lease.wants_checkpoint


@pytest.mark.parametrize(("number", "is_storage"), [(errno.ENOSPC, True), (errno.EACCES, False)])
def test_write_error_ends_the_attempt_and_names_the_reason(number: int, is_storage: bool) -> None:
    lease = lease_slot(SlotPool(1), "1", "a")
    writer = FileWriter(lease)

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    writer.do(fail)
    (event,) = lease.take_events(10.0)
    assert isinstance(event, Left)
    assert os.strerror(number) in str(event.lost)
    assert event.is_storage is is_storage
    assert lease.stopping
    writer.close()


@pytest.mark.parametrize("has_ended", [False, True])
def test_attempt_that_was_replaced_begins_no_file(tmp_path: Path, has_ended: bool) -> None:
    """A worker outlives its killed driver, and an attempt of the resumed sweep may have ended meanwhile."""
    lease, done = SlotPool(1).lease("1", START, TrialPaths(tmp_path, "a")), []
    assert lease is not None
    lease.paths.root.mkdir(parents=True)
    lease.paths.lease.write_text("1")
    writer = FileWriter(lease)
    writer.do(lambda: done.append("own"))
    writer.wait()
    lease.paths.lease.write_text("2")
    if has_ended:
        lease.paths.lease.unlink()
    writer.do(lambda: done.append("replaced"))
    (event,) = lease.take_events(10.0)
    assert isinstance(event, Left)
    assert event.lost == "another attempt has claimed the trial"
    assert lease.stopping
    assert done == ["own"]
    writer.close()


def test_log_on_a_full_disk_blocks_nothing() -> None:
    """The writer thread prints tracebacks there. If that ended the thread, its trial would never end."""
    lease = lease_slot(SlotPool(1), "1", "a")
    with Path("/dev/full").open("w", buffering=1) as full, pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", full)
        writer = FileWriter(lease)
        writer.do(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        (event,) = lease.take_events(10.0)
        assert isinstance(event, Left)
        assert event.is_storage
        writer.close()
        writer.thread.join(10)
        patched.undo()
        with suppress(OSError):
            full.close()


def test_trials_of_a_process_that_goes_away_leave_for_its_reason_and_not_as_failures() -> None:
    pool = SlotPool(2)
    lease, done = lease_slot(pool, "1", "a"), lease_slot(pool, "2", "b")
    done.emit(Completed(0.0, 0.0, 0.0))
    assert not pool.interrupt(wait_s=0.0, reason="its node is about to go away")
    assert pool.has_unread
    lease.emit(Left(0.0, 0.0, 0.0, 5, None))
    (event,) = lease.take_events(0)
    assert isinstance(event, Left)
    assert (event.lost, event.is_outside) == ("its node is about to go away", True)
    assert [type(each) for each in done.take_events(0)] == [Completed]
    assert not pool.has_unread


def test_the_longest_pause_is_between_two_signs_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(slots.time, "monotonic", lambda: now)
    pool = SlotPool(1)
    assert not pool.is_busy
    now = 500.0  # nothing was to do
    lease = lease_slot(pool, "1", "a")
    assert pool.is_busy
    now = 507.0
    lease.on_step(1, 9)
    now = 509.0
    lease.on_step(2, 9)
    now = 512.0
    assert (pool.clock.longest_s, pool.clock.idle_s) == (7.0, 3.0)
    assert (pool.clock.has_stepped, pool.clock.has_evaluated) == (True, False)
    lease.emit(Evaluated(0.0, 0.0, 0.0, step=1, tokens=1, values={}, adapter=None, saves=False))
    assert (pool.clock.idle_s, pool.clock.has_evaluated) == (0.0, True)
    lease.emit(Completed(0.0, 0.0, 0.0))
    assert not pool.is_busy

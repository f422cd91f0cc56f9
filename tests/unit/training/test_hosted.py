"""Leases of a host: who holds a slot, and who is told that it is gone."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import TrialPaths
from orchestrator.training import hosted
from orchestrator.training.events import Completed, LeaseLost, Left
from orchestrator.training.hosted import Lease, Leases

START: Any = None
"""What a trial trains is nothing to a lease."""


def paths(name: str) -> TrialPaths:
    return TrialPaths(Path("sweep"), name)


def take(leases: Leases, name: str, trial: str) -> Lease:
    lease = leases.take(name, START, paths(trial))
    assert lease is not None
    return lease


def test_a_slot_is_one_trials_until_it_is_done() -> None:
    leases = Leases(2)
    first, second = take(leases, "1", "a"), take(leases, "2", "b")
    assert {first.slot, second.slot} == {0, 1}
    assert leases.num_free() == 0
    assert leases.take("3", START, paths("c")) is None
    with pytest.raises(LeaseLost, match="lease 3 is unknown here"):
        leases.named("3")
    leases.done(first)
    assert leases.num_free() == 1
    assert leases.named("1") is first, "its last events are still to be taken"
    assert take(leases, "4", "c").slot == first.slot
    assert not second.stopping


def test_another_attempt_at_a_trial_asks_the_earlier_one_to_stop() -> None:
    leases = Leases(2)
    earlier, other = take(leases, "1", "a"), take(leases, "2", "b")
    assert leases.take("3", START, paths("a")) is None, "it waits for the slot"
    assert earlier.stopping
    assert not other.stopping


def test_a_lease_that_has_ended_and_of_which_nobody_hears_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(3)
    ended, silent = take(leases, "1", "a"), take(leases, "2", "b")
    ended.emit(Completed(0.0, 0.0, 0.0))
    leases.done(ended)
    take(leases, "3", "c")
    assert leases.named("1") is ended
    monkeypatch.setattr(hosted, "LEASE_S", -1.0)
    assert ended.is_given_up
    take(leases, "4", "d")
    with pytest.raises(LeaseLost):
        leases.named("1")
    assert leases.named("2") is silent, "it trains on, until it has seen that it is to stop"


def test_all_are_told_that_the_host_is_lost_and_nobody_is_let_in() -> None:
    leases = Leases(2)
    running, ended = take(leases, "1", "a"), take(leases, "2", "b")
    ended.emit(Completed(0.0, 0.0, 0.0))
    leases.done(ended)
    leases.lose("RuntimeError: no more")
    (event,) = running.take(0)
    assert isinstance(event, Left)
    assert event.lost == "RuntimeError: no more"
    assert [type(each) for each in ended.take(0)] == [Completed], "nothing comes after the last"
    with pytest.raises(LeaseLost, match="RuntimeError: no more"):
        leases.take("3", START, paths("c"))

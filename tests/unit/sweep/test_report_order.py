"""Reports are processed in one order, whatever order they arrive in, and none waits forever."""

import random
from collections.abc import Callable

import pytest

from orchestrator.sweep.schedulers.report_order import MIN_PATIENCE_S, PATIENCE, ReportOrder


def process_due(order: ReportOrder, now_s: float = 0.0) -> list[str]:
    """Return the trials whose reports are due now; all of them continue."""
    found = []
    while names := order.next(now_s):
        for name in names:
            order.processed(name)
        found += names
    return found


def begun(*names: str, num_slots: int | None = None, num_trials: int | None = None) -> ReportOrder:
    order = ReportOrder(num_slots or len(names), num_trials or len(names))
    for name in names:
        order.add(name)
    return order


def test_a_report_waits_for_others_of_its_time_and_they_are_processed_in_the_order_of_trials() -> None:
    order = begun("a", "b", "c")
    order.report("c", 10, 1.0)
    order.report("a", 10, 2.0)
    assert process_due(order) == []
    order.report("b", 10, 3.0)
    assert process_due(order) == ["a", "b", "c"]


def test_reports_of_one_moment_are_due_together_and_others_are_not() -> None:
    order = begun("a", "b", "c")
    order.report("c", 10, 1.0)
    order.report("a", 10, 2.0)
    order.report("b", 20, 3.0)
    assert order.next(3.0) == ["a", "c"]
    for name in ("a", "c"):
        order.processed(name)
    assert order.next(3.0) == [], "both may still report at 20"


def test_an_earlier_step_comes_first_and_a_later_one_waits_for_it() -> None:
    order = begun("a", "b")
    order.report("a", 20, 1.0)
    order.report("b", 10, 2.0)
    assert process_due(order) == ["b"]
    order.report("b", 30, 3.0)
    assert process_due(order) == ["a"], "the next report of b is at 30 or later"


def test_no_report_waits_for_a_trial_that_has_ended() -> None:
    """This includes a trial that failed before its first report and freed its slot at once."""
    order = begun("a", "b", "c")
    order.report("a", 20, 1.0)
    order.report("b", 10, 1.0)
    assert process_due(order) == []
    order.end("c")
    order.end("c")
    assert process_due(order) == ["b"]
    order.end("b")
    assert process_due(order) == ["a"]


def test_reports_are_repeated_after_a_resume() -> None:
    order = begun("a", "b")
    order.report("a", 10, 1.0)
    order.resume(num_slots=2, num_trials=2)
    order.report("b", 10, 2.0)
    order.report("a", 10, 3.0)
    assert process_due(order) == ["a", "b"]


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_no_report_waits_forever_after_a_resume_with_another_number_of_slots(num_slots: int) -> None:
    order = begun("a", "b", num_trials=6)
    order.report("a", 10, 1.0)
    order.resume(num_slots, 8)
    names = [*"abcdefgh"]
    for name in names:
        order.add(name)
    for step in (10, 20):
        for name in names:
            order.report(name, step, 1.0)
        assert sorted(process_due(order, 1.0 + MIN_PATIENCE_S)) == names
    for name in names:
        order.end(name)
        order.end(name)


def test_others_wait_only_for_a_while_for_a_trial_that_never_reports() -> None:
    order = begun("a", "b", "c")
    order.report("b", 10, 1.0)
    order.report("c", 10, 2.0)
    assert process_due(order, 2.0) == []
    assert process_due(order, 2.0 + MIN_PATIENCE_S) == ["b", "c"]


def test_a_new_trial_starts_at_the_time_at_which_its_slot_was_freed() -> None:
    order = begun("a", "b", num_trials=3)
    order.add("c")
    for name in ("a", "b"):
        order.report(name, 10, 1.0)
    assert order.next(1.0) == ["a", "b"]
    order.end("a")  # stopped at 10
    assert process_due(order) == ["b"]
    order.report("b", 20, 2.0)
    assert process_due(order, 2.0) == [], "c has yet to come, and may report at the same time"
    order.report("c", 10, 4.0)
    assert process_due(order, 4.0) == ["b", "c"]


def test_reports_wait_once_for_a_trial_that_is_behind() -> None:
    order = begun("a", "b")
    order.report("a", 10, 100.0)
    assert process_due(order, 100.0 + MIN_PATIENCE_S - 1) == []
    assert process_due(order, 100.0 + MIN_PATIENCE_S) == ["a"]
    order.report("a", 20, 200.0)
    assert process_due(order, 200.0) == ["a"], "a report has waited for b in vain once"
    order.report("b", 10, 201.0)
    assert process_due(order, 201.0) == ["b"]
    order.report("a", 30, 300.0, ran_s=1000.0)
    assert process_due(order, 300.0 + PATIENCE * 1000.0 - 1) == [], (
        "b is back, so a waits for it again, and longer in a long trial"
    )
    assert process_due(order, 300.0 + PATIENCE * 1000.0) == ["a"]


def test_reports_do_not_wait_for_a_much_slower_trial() -> None:
    order = begun("fast", "slow", "similar")
    for name, ran_s in (("fast", 10.0), ("slow", 40.0), ("similar", 15.0)):
        order.report(name, 10, 0.0, ran_s)
    assert process_due(order) == ["fast", "slow", "similar"]
    order.report("fast", 20, 0.0, 20.0)
    assert process_due(order) == []
    order.report("similar", 20, 0.0, 30.0)
    assert process_due(order) == ["fast", "similar"]


def test_reports_wait_only_for_a_while_for_trials_that_never_come() -> None:
    order = begun("a", num_slots=2, num_trials=5)
    order.report("a", 10, 1.0)
    assert process_due(order, 1.0) == []
    assert process_due(order, 1.0 + MIN_PATIENCE_S) == ["a"]


def sweep(draw: random.Random, decide: Callable[[str, int], str]) -> list[tuple[str, int]]:
    """Return what the scheduler sees of eight trials on three slots of uneven speed; `decide` says which ones stop."""
    names, lengths = [f"t{i}" for i in range(8)], [40, 40, 20, 40, 30, 40, 40, 20]
    order, done, processed = ReportOrder(3, len(names)), dict.fromkeys(names, 0), []
    for name in names:
        order.add(name)
    running, waiting, to_begin = list[str](), set[str](), list(names)
    while to_begin or running:
        while to_begin and len(running) < 3:
            running.append(to_begin.pop(0))
        free = [name for name in running if name not in waiting]
        if free:
            name = draw.choice(free)
            done[name] += 10
            if done[name] == lengths[names.index(name)]:
                order.end(name, done[name])  # Tune's scheduler does not see the last step
                running.remove(name)
            else:
                order.report(name, done[name], 0.0)
                waiting.add(name)
        while names_due := order.next(0.0):
            for name in names_due:
                processed.append((name, done[name]))
                waiting.discard(name)
                if decide(name, done[name]) == "stop":
                    order.end(name)
                    running.remove(name)
                else:
                    order.processed(name)
    return processed


@pytest.mark.parametrize("stopped", [(), ("t0", "t3", "t6"), ("t1", "t2", "t4", "t5")])
def test_the_order_does_not_depend_on_speed(stopped: tuple[str, ...]) -> None:
    def decide(name: str, step: int) -> str:
        return "stop" if name in stopped and step == 20 else "go on"

    first = sweep(random.Random(0), decide)
    assert len(first) > 10
    for seed in range(1, 200):
        assert sweep(random.Random(seed), decide) == first


def test_no_report_waits_for_trials_that_will_not_come() -> None:
    order = ReportOrder(num_slots=2, num_trials=9)
    for name in "ab":
        order.add(name)
    order.report("a", 10, now_s=0.0)
    order.report("b", 10, now_s=0.0)
    assert order.next(0.0) == ["a", "b"]
    order.end("b")
    order.processed("a")
    order.report("a", 20, now_s=1.0)
    assert order.next(1.0) == [], "a third trial should have taken the slot of the second"
    order.await_no_more()
    assert order.next(1.0) == ["a"]

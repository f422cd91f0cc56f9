"""Requests to the driver of a sweep: their files, their order, the wait for an answer, and how a trial is named."""

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from orchestrator.errors import RecordError, RequestError
from orchestrator.record import SweepPaths, read_sweep, write_info
from orchestrator.record.ask import ask
from orchestrator.record.find_trial import find_trial
from orchestrator.record.lock import driver_state, only_driver
from orchestrator.record.models import time_now
from orchestrator.record.requests import (
    RequestAnswer,
    await_answer,
    read_answer,
    read_request,
    share_folder,
    unanswered,
    write_answer,
    write_request,
)

Make = Any


@pytest.fixture
def paths(tmp_path: Path, make_sweep: Make) -> SweepPaths:
    made: SweepPaths = make_sweep(tmp_path / "s", {"abc_00001": ("RUNNING", 0.5), "abc_00002": ("COMPLETE", 0.4)})
    return made


def answer(name: str, is_accepted: bool = True, text: str = "done") -> RequestAnswer:
    return RequestAnswer(name=name, is_accepted=is_accepted, text=text, answered=time_now())


def test_a_request_says_what_who_and_when_and_has_a_name_of_its_own(paths: SweepPaths) -> None:
    request = write_request(paths, "stop", trial_id="abc_00001")
    assert read_request(paths, request.name) == request
    assert "@" in request.by
    assert request.asked.endswith("+00:00")
    assert len(request.new_trial) == 8
    assert [file.name for file in paths.requests.iterdir()] == [f"{request.name}.json"], "nothing half written is left"


def test_many_may_ask_at_once_and_requests_are_taken_in_their_order(paths: SweepPaths) -> None:
    with ThreadPoolExecutor(8) as people:
        asked = [*people.map(lambda number: write_request(paths, "add", values={"n": number}), range(40))]
    assert len({request.name for request in asked}) == 40
    assert unanswered(paths) == sorted(request.name for request in asked)
    later = write_request(paths, "stop", trial_id="abc_00001")
    assert unanswered(paths)[-1] == later.name


def test_an_answered_request_is_not_taken_up_again(paths: SweepPaths) -> None:
    first, second = (write_request(paths, "pause", trial_id="abc_00001") for _ in range(2))
    assert read_answer(paths, first) is None
    write_answer(paths, answer(first.name))
    assert unanswered(paths) == [second.name]
    assert read_answer(paths, first) == answer(first.name).model_copy(
        update={"answered": read_answer(paths, first).answered}
    )


def test_a_damaged_request_is_named(paths: SweepPaths) -> None:
    request = write_request(paths, "stop", trial_id="abc_00001")
    (paths.requests / f"{request.name}.json").write_text("{")
    with pytest.raises(RecordError, match="is damaged or of another version"):
        read_request(paths, request.name)


def test_without_a_driver_a_request_is_kept_and_the_message_says_what_takes_it_up(paths: SweepPaths) -> None:
    began = time.monotonic()
    said = ask(read_sweep(paths.root), "stop", trial_id="abc_00001")
    assert said == f"no driver is running; the request is kept, and this takes it up: orchestrator resume {paths.root}"
    assert time.monotonic() - began < 5
    assert len(unanswered(paths)) == 1


def test_a_live_driver_is_waited_for_and_its_refusal_is_an_error(paths: SweepPaths) -> None:
    record = read_sweep(paths.root)

    def reply() -> None:
        while not unanswered(paths):
            time.sleep(0.01)
        write_answer(paths, answer(unanswered(paths)[0], False, "the trial has ended already"))

    with only_driver(paths), ThreadPoolExecutor() as driver:
        driver.submit(reply)
        with pytest.raises(RequestError, match="stop: refused by the driver: the trial has ended already"):
            ask(record, "stop", trial_id="abc_00001")
        request = write_request(paths, "stop", trial_id="abc_00001")
        assert await_answer(paths, request, 0.3) is None
        assert "has not answered within 0 s" in ask(record, "pause", wait_s=0.1, trial_id="abc_00001")


def test_a_trial_is_named_by_its_folder_or_by_sweep_and_name(paths: SweepPaths) -> None:
    root = paths.root
    for named in (f"{root}/abc_00001", f"{root}/trials/abc_00001", f"{root}/trials/abc_00001/", "s/abc_00001"):
        record, trial = find_trial(named, root.parent)
        assert (record.paths.root, trial) == (root, "abc_00001")


def test_an_unknown_trial_has_a_suggestion(paths: SweepPaths) -> None:
    with pytest.raises(RecordError, match="has no such trial") as error:
        find_trial(f"{paths.root}/abc_0001", "runs")
    assert "Did you mean abc_00001?" in str(error.value)
    with pytest.raises(RecordError, match="orchestrator status"):
        find_trial(f"{paths.root}/zzz", "runs")
    with pytest.raises(RecordError, match="is not written as SWEEP/TRIAL"):
        find_trial("abc_00001", "runs")


@pytest.mark.parametrize(
    ("verb", "fields", "why"),
    [
        ("halt", {}, "halt: verb: "),
        ("extend", {"trials": 9}, "extend: trials: Extra inputs are not permitted"),
        ("extend", {"num_trials": "many"}, "extend: num_trials: "),
        ("add", {"values": {"lora.rank": object()}}, "add: .*object"),
    ],
)
def test_what_is_no_request_is_refused_by_an_error_of_the_project(
    verb: Any, fields: dict[str, Any], why: str, paths: SweepPaths
) -> None:
    with pytest.raises(RequestError, match=why):
        ask(read_sweep(paths.root), verb, **fields)
    assert unanswered(paths) == []


@pytest.mark.parametrize(("mode", "is_open"), [(0o2775, True), (0o777, True), (0o755, False), (0o1777, False)])
def test_whoever_shares_the_output_folder_may_ask(mode: int, is_open: bool, paths: SweepPaths) -> None:
    paths.root.parent.chmod(mode)
    share_folder(paths)
    assert paths.requests.is_dir() == is_open
    if is_open:
        assert paths.requests.stat().st_mode & 0o7777 == mode
        assert paths.requests.stat().st_gid == paths.root.parent.stat().st_gid
    write_request(paths, "stop", trial_id="abc_00001")
    assert bool(paths.requests.stat().st_mode & 0o020) == is_open


def test_an_account_that_may_not_try_the_lock_goes_by_the_last_sign(
    paths: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_driver(paths):
        with monkeypatch.context() as patched:
            patched.setattr("os.open", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
            assert driver_state(paths).is_running
        assert driver_state(paths).is_running
    with monkeypatch.context() as patched:
        patched.setattr("os.open", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
        assert not driver_state(paths).is_running, "the driver has left"


def test_trials_that_run_again_take_no_requests(paths: SweepPaths, make_sweep: Make) -> None:
    for inside in (paths.repeats, paths.audits / "2-trials-seed-0"):
        make_sweep(inside, {"abc_00001": ("RUNNING", 0.5)})
        with pytest.raises(RequestError, match=f"s/{inside.name}: holds trials that run again"):
            ask(read_sweep(inside), "stop", trial_id="abc_00001")
    make_sweep(paths.root.parent / "repeats", {})  # a sweep of this name
    assert "no driver is running" in ask(read_sweep(paths.root.parent / "repeats"), "add", values={"lora.rank": 8})


def test_a_driver_whose_trials_have_ended_takes_no_more_requests(
    paths: SweepPaths, make_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.record.ask._LAST_S", 0.1)
    ended = make_sweep(paths.root.parent / "ended", {"a": ("COMPLETE", 0.5)}, num_trials=1)
    with only_driver(ended):
        said = ask(read_sweep(ended.root), "add", values={"lora.rank": 8})
    assert "the driver takes no more requests" in said
    assert f"once the driver has ended: orchestrator resume {ended.root}" in said


def test_a_single_trial_takes_no_requests(paths: SweepPaths) -> None:
    write_info(paths, read_sweep(paths.root).info.model_copy(update={"is_single_trial": True}))
    with pytest.raises(RequestError, match="takes no requests"):
        ask(read_sweep(paths.root), "stop", trial_id="abc_00001")

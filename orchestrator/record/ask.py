"""Ask the driver of a sweep for something, and wait for its answer."""

from typing import Any

from orchestrator.errors import RequestError
from orchestrator.record.lock import driver_state
from orchestrator.record.requests import Verb, await_answer, write_request
from orchestrator.record.sweep_record import SweepRecord

WAIT_S = 60.0
"""How long a command waits for the driver's answer, in seconds."""


def ask(record: SweepRecord, verb: Verb, wait_s: float = WAIT_S, **fields: Any) -> str:
    """Write a request, and wait for the answer if a driver runs.

    Args:
        record: the sweep.
        verb: what is asked.
        wait_s: how long to wait, in seconds.
        fields: fields of `Request`.

    Returns:
        What has become of the request, for the user.

    Raises:
        RequestError: the driver refuses it, or the sweep has one trial without a driver that takes requests up.
        RecordError: the sweep's folder cannot be written to.
    """
    root = record.paths.root
    if record.info.is_single_trial:
        raise RequestError(
            f"{root}: is a single trial, which takes no requests", "Ctrl-C ends it, `orchestrator resume` continues it."
        )
    request = write_request(record.paths, verb, **fields)
    answer = await_answer(record.paths, request, wait_s)
    if answer is None and driver_state(record.paths).is_running:
        return (
            f"the driver has not answered within {wait_s:.0f} s; it takes the request up later "
            f"(requests/{request.name}.json)"
        )
    if answer is None:
        return f"no driver is running; the request is kept, and this takes it up: orchestrator resume {root}"
    if not answer.is_accepted:
        raise RequestError(f"{verb}: refused by the driver: {answer.text}")
    return answer.text

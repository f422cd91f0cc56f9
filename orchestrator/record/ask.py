"""Ask the driver of a sweep for something, and wait for its answer."""

from typing import Any

from orchestrator.errors import RequestError
from orchestrator.record.lock import driver_state
from orchestrator.record.paths import SweepPaths
from orchestrator.record.requests import Request, Verb, await_answer, read_answer, write_request
from orchestrator.record.standing import have_ended
from orchestrator.record.sweep_record import SweepRecord, read_sweep

WAIT_S = 60.0
"""How long a command waits for the driver's answer, in seconds."""
_LAST_S = 5.0
"""How long it waits where all trials have ended: the driver then answers at once, or no more."""


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
        RequestError: the driver refuses it, its fields do not fit, or the sweep has no driver that takes requests up.
        RecordError: the sweep's folder cannot be written to.
    """
    request, now = leave(record, verb, **fields), read_sweep(record.paths.root)
    has_ended = have_ended(now.info, now.trials(), now.why_over())
    if await_answer(record.paths, request, min(wait_s, _LAST_S) if has_ended else wait_s) is not None:
        return outcome(record, request)
    resume = f"orchestrator resume {record.paths.root}"
    if not driver_state(record.paths).is_running:
        return f"no driver is running; the request is kept, and this takes it up: {resume}"
    if has_ended:  # finalists run again, or the winner is measured
        return (
            "the trials of the search have ended, and the driver takes no more requests; the request is kept, and this "
            f"takes it up once the driver has ended: {resume}"
        )
    return (
        f"the driver has not answered within {wait_s:.0f} s; it takes the request up later "
        f"(requests/{request.name}.json)"
    )


def leave(record: SweepRecord, verb: Verb, **fields: Any) -> Request:
    """Write a request, and do not wait for the answer.

    Raises:
        RequestError: its fields do not fit, or the sweep has no driver that takes requests up.
        RecordError: the sweep's folder cannot be written to.
    """
    root, name = record.paths.root, record.paths.name
    if record.info.is_single_trial:
        raise RequestError(
            f"{root}: is a single trial, which takes no requests", "Ctrl-C ends it, `orchestrator resume` continues it."
        )
    for outer in (SweepPaths(root.parent), SweepPaths(root.parent.parent)):
        if outer.sweep.is_file() and (root == outer.repeats or root.parent == outer.audits):
            raise RequestError(
                f"{outer.name}/{name}: holds trials that run again, and takes no requests",
                "Ctrl-C ends the command that runs them, which continues them later.",
            )
    return write_request(record.paths, verb, **fields)


def outcome(record: SweepRecord, request: Request) -> str:
    """Return what the driver has made of a request that it has answered.

    Raises:
        RequestError: the driver has refused it.
        RecordError: there is no answer that can be read.
    """
    answer = read_answer(record.paths, request)
    if answer is None:
        raise RequestError(
            f"{request.verb}: no driver has taken the request up",
            f"It is kept; this takes it up: orchestrator resume {record.paths.root}",
        )
    if not answer.is_accepted:
        raise RequestError(f"{request.verb}: refused by the driver: {answer.text}")
    return answer.text

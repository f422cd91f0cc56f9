"""What people ask of a running sweep. Each request is a file in the sweep's folder, and so is the driver's answer.

A request is written in one atomic step under a name of its own, so any number of people may ask at once. The driver
takes requests up in the order of their names, which begin with the time.
"""

import getpass
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from orchestrator.errors import RecordError, RequestError
from orchestrator.record.checked import DamagedError, read_record, write_record
from orchestrator.record.lock import driver_state
from orchestrator.record.models import Record, time_now
from orchestrator.record.names import Name
from orchestrator.record.paths import SweepPaths

Verb = Literal["stop", "pause", "go-on", "extend", "add", "clone"]

_ANSWER = ".answer.json"
_LOOK_S = 0.2
"""Seconds between two looks for an answer."""


class Request(Record):
    """One request, in `requests/NAME.json`."""

    name: Name
    """Time in nanoseconds since 1970, and 8 random hexadecimal digits."""
    verb: Verb
    asked: str
    """Time in UTC, ISO 8601."""
    by: str
    """Who has asked, as user@host."""
    trial_id: Name | None = None
    """Trial that is stopped, paused, continued or cloned; None for a request about the whole sweep."""
    values: dict[str, Any] = {}
    """Dotted field -> value, for a trial that is added."""
    warm: bool = False
    """Whether a clone begins with the adapter of its donor."""
    num_trials: int | None = None
    """New total number of trials."""
    budget: list[str] = []
    """New limits, as LIMIT=V."""

    @property
    def new_trial(self) -> str:
        """Name of the trial that the request adds. It is the same if the request is taken up again after a kill."""
        return self.name.rpartition("-")[2]


class RequestAnswer(Record):
    """What has become of a request, in `requests/NAME.answer.json`."""

    name: Name
    """Name of the request."""
    is_accepted: bool
    text: str
    """What has been done or will be done, or why the request is refused."""
    answered: str
    """Time in UTC, ISO 8601."""
    trial_id: Name | None = None
    """Trial that was added."""


def write_request(paths: SweepPaths, verb: Verb, **fields: Any) -> Request:
    """Write a request into a sweep's folder.

    Args:
        paths: of the sweep.
        verb: what is asked.
        fields: fields of `Request` that belong to it.

    Raises:
        RequestError: there is no such verb or field, or a value does not fit.
        RecordError: the folder cannot be written to.
    """
    name = f"{time.time_ns():020d}-{uuid4().hex[:8]}"
    known = {"name": name, "verb": verb, "asked": time_now(), "by": _who()}
    try:
        request = Request.model_validate(fields | known)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(
            f"{verb}: {where}: {first['msg']}",
            f"The verbs are {', '.join(get_args(Verb))}; the fields {', '.join(Request.model_fields.keys() - known)}.",
        ) from error
    file = paths.requests / f"{name}.json"
    try:
        share_folder(paths)
        write_record(file, request)
    except PydanticSerializationError as error:
        raise RequestError(f"{verb}: {error}", "Give values of JSON: numbers, strings, booleans, lists.") from error
    except OSError as error:
        raise RecordError(
            f"{file}: cannot be written: {error.strerror}",
            "Ask from an account that may write into the sweep's folder.",
        ) from error
    return request


def share_folder(paths: SweepPaths) -> None:
    """Let whoever may begin sweeps beside this one ask it for something: make the folder of the requests for them.

    It gets the group of the folder that holds the sweeps, and its permissions. Nothing is made where only its owner may
    write into that folder, or where it has the sticky bit, as /tmp has: there, accounts may not touch each other's
    files.

    Raises:
        OSError: the folder cannot be made.
    """
    shared = paths.root.parent.stat()
    is_shared = shared.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not shared.st_mode & stat.S_ISVTX
    if not is_shared or paths.requests.is_dir():
        return
    paths.requests.mkdir(exist_ok=True)
    with suppress(PermissionError):  # this account is not in that group
        os.chown(paths.requests, -1, shared.st_gid)
        paths.requests.chmod(stat.S_IMODE(shared.st_mode))


def read_request(paths: SweepPaths, name: str) -> Request:
    """Return one request.

    Raises:
        DamagedError: it is damaged, or has another name than its file.
    """
    file = paths.requests / f"{name}.json"
    try:
        request = read_record(Request, file)
    except DamagedError as error:
        raise DamagedError(error.message, "Ask again with the command.") from error
    except (FileNotFoundError, PermissionError) as error:
        raise RecordError(f"{file}: cannot be read: {error.strerror}", "Ask again with the command.") from error
    if request.name != name:
        raise DamagedError(f"{file}: is a request of another name, {request.name}", "Ask again with the command.")
    return request


def unanswered(paths: SweepPaths) -> list[str]:
    """Return the names of the requests without an answer, in their order. It reads one folder and no file."""
    try:
        names = {file.name for file in paths.requests.iterdir() if file.suffix == ".json" and file.name[0] != "."}
    except FileNotFoundError:
        return []
    asked = {name.removesuffix(".json") for name in names if not name.endswith(_ANSWER)}
    return sorted(name for name in asked if name + _ANSWER not in names)


def write_answer(paths: SweepPaths, answer: RequestAnswer) -> None:
    """Write the answer to a request."""
    write_record(_answer_file(paths, answer.name), answer)


def read_answer(paths: SweepPaths, request: Request) -> RequestAnswer | None:
    """Return the answer to a request; None if there is none yet.

    Raises:
        DamagedError: it is damaged.
    """
    try:
        return read_record(RequestAnswer, _answer_file(paths, request.name))
    except FileNotFoundError:
        return None


def await_answer(paths: SweepPaths, request: Request, timeout_s: float) -> RequestAnswer | None:
    """Wait for the answer to a request, as long as a driver runs.

    Returns:
        The answer; None if no driver runs, or if none has come within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        is_running = driver_state(paths).is_running
        answer = read_answer(paths, request)
        if answer is not None or not is_running or time.monotonic() > deadline:
            return answer
        time.sleep(_LOOK_S)


def _answer_file(paths: SweepPaths, name: str) -> Path:
    return paths.requests / f"{name}{_ANSWER}"


def _who() -> str:
    user = "unknown"
    with suppress(OSError, KeyError, ImportError):  # a container may have no entry for its user
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"

"""Send what libraries print to the trial's log file, so that the terminal shows only our own lines."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from orchestrator.tracking.secrets import traceback_of


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append this process's standard output and error to `log`. File descriptors 1 and 2 are redirected."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        for number, stream, original in zip((1, 2), (sys.stdout, sys.stderr), saved, strict=True):
            _flush(stream, number)
            os.dup2(original, number)
            os.close(original)
        os.close(target)


def _flush(stream: TextIO, number: int) -> None:
    """Flush a stream. Output that a full disk refuses is dropped, for it must not appear on the terminal later."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        stream.flush()


def log_traceback() -> None:
    """Print the traceback of the error that is being handled, without secrets. On a full disk nothing is printed."""
    error = sys.exception()
    assert error is not None
    with suppress(OSError):
        print(traceback_of(error), file=sys.stderr, end="")

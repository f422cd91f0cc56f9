"""A person sees our lines; what libraries say goes to the trial's log file."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send this process's standard output and error, at the level of file descriptors, to the end of `log`."""
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
    """Write out what a stream holds back. What a full disk does not take is dropped: it belongs to nobody else."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        stream.flush()


def log_traceback() -> None:
    """Print the error that is being handled. A log on a full disk goes without it."""
    with suppress(OSError):
        traceback.print_exc()

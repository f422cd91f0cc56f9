"""Recognize storage faults. A full or failing disk is not a trial's fault, so the interrupted work can be resumed."""

import errno
import os

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)

# Libraries written in Rust or C++ raise their own errors; the text holds the operating system's message or number.
_WORDS = (
    *(os.strerror(number) for number in _NUMBERS),
    *(f"(os error {number})" for number in _NUMBERS),
    "database or disk is full",  # SQLite
    "the local disk's utilization is over capacity",  # Ray, when it spills objects to disk
)

# torch reports a short write as an inconsistency in its own file (2.13, `caffe2/serialize/inline_container.cc`).
_TORCH = ("PytorchStreamWriter", "inline_container.cc")


def storage_fault(error: BaseException | None) -> str | None:
    """Find a storage fault in an error or in one of the errors that caused it.

    Args:
        error: the error as raised. An error that Ray passes on from another process holds the original in `cause`.

    Returns:
        The storage's message, such as "No space left on device: /runs/s/progress.json"; None for any other error.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            place = f": {error.filename}" if error.filename else ""
            return f"{os.strerror(error.errno)}{place}"
        text = str(error)
        if not isinstance(error, OSError):
            if found := next((words for words in _WORDS if words in text), None):
                line = next(line for line in text.splitlines() if found in line)
                return line.strip()
            if any(words in text for words in _TORCH):
                return f"a file could not be written completely: {text.splitlines()[0]}"
        passed_on = getattr(error, "cause", None)  # an exception in Ray's errors; a string in this project's own
        error = passed_on if isinstance(passed_on, BaseException) else error.__cause__ or error.__context__
    return None

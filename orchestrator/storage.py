"""Faults of the storage: a full or failing disk is no fault of a trial, and what was interrupted by it can go on."""

import errno
import os

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)

# Libraries written in Rust or C++ raise errors of their own, with the operating system's words or number in them.
_WORDS = (
    *(os.strerror(number) for number in _NUMBERS),
    *(f"(os error {number})" for number in _NUMBERS),
    "database or disk is full",  # SQLite
    "the local disk's utilization is over capacity",  # Ray, which keeps objects that do not fit into memory there
)

# torch tells a short write by what it met in its own file (2.13, `caffe2/serialize/inline_container.cc`).
_TORCH = ("PytorchStreamWriter", "inline_container.cc")


def storage_fault(error: BaseException | None) -> str | None:
    """Tell whether an error, or one that caused it, is a fault of the storage.

    Args:
        error: as it was raised; one that Ray has passed on from another process holds the cause in `cause`.

    Returns:
        What the storage said, such as "No space left on device: /runs/s/progress.json"; None for any other error.
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
                return f"a file could not be written whole: {text.splitlines()[0]}"
        passed_on = getattr(error, "cause", None)  # Ray's; an error of ours has a word there
        error = passed_on if isinstance(passed_on, BaseException) else error.__cause__ or error.__context__
    return None

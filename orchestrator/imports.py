"""Imports of heavy libraries, made lighter: seconds of the start of each process."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Python's collector rests: all that an import makes stays, and it would look at that again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def leave_out_compiler() -> None:
    """Keep torch's compiler out of this process, where nothing calls it; unless the environment says otherwise.

    bitsandbytes asks for it at its import (0.50, `backends/default/ops.py`), for functions that no CPU or GPU of ours
    uses: a fifth of all imports. Not for a process that is another's, nor inherited from one that starts others.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

"""Imports of heavy libraries, made lighter: seconds of the start of each process."""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

_AT_MOST_S = 30.0


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


def leave_out_wandb() -> None:
    """Keep W&B out of this process, which writes no run of it.

    transformers and trl import it wherever it is installed (transformers 5.23, `integrations/integration_utils.py`; trl
    1.16, `extras/profiling.py`): two thirds of trl's import.
    """
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # Python's own way to say that it is not there


def begin(imports: Callable[[], None]) -> Thread:
    """Make imports beside what waits for other processes.

    Join it before anything imports parts of the same packages: what two threads import from different ends of a circle,
    one of them sees half made. The end of the process waits too, for C++ aborts one that ends in the middle of imports;
    but not for ever, for a Ctrl-C can leave Python's own lock on imports taken (3.11), and the thread then never ends.
    """
    thread = Thread(target=imports, name="imports", daemon=True)
    thread.start()
    atexit.register(thread.join, _AT_MOST_S)
    return thread

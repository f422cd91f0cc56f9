"""Tell when the Ray that this process has started dies: Ray would end the process without a word (2.60).

After the death of the raylet that takes some 13 s, after the death of the GCS 60 s.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.errors import RayLostError
from orchestrator.upstream import local_ray_processes

_PERIOD_S = 0.5

OnLost = Callable[[RayLostError], None]
"""Called from a thread once Ray is lost."""


def _say_lost(error: RayLostError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


_on_lost: list[OnLost] = [_say_lost]


@contextmanager
def when_ray_is_lost(handle: OnLost) -> Iterator[None]:
    """Have `handle` called, instead of a message on standard error, if a Ray that starts in this block dies."""
    _on_lost.append(handle)
    try:
        yield
    finally:
        _on_lost.pop()


@contextmanager
def watching_local_ray() -> Iterator[None]:
    """Watch the raylet and the GCS that this process has started."""
    stopped = threading.Event()

    def watch() -> None:
        processes, handle = local_ray_processes(), _on_lost[-1]
        while not stopped.wait(_PERIOD_S):
            for name, process in processes:
                if (code := process.poll()) is not None and not stopped.is_set():
                    handle(_lost(name, code))
                    return

    thread = threading.Thread(target=watch, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()


def _lost(name: str, code: int) -> RayLostError:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return RayLostError(
        f"Ray on this machine has died: its {name} {how}",
        "Often memory was short, and the system ended it (see `dmesg`). Its logs: /tmp/ray/session_latest/logs",
    )

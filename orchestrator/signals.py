"""Signals that ask this process to end: Ctrl-C (SIGINT), SIGTERM and SIGHUP."""

import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals
from types import FrameType

SIGNALS = (Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP)

_Handler = Callable[[Signals], None]


class Signalled(KeyboardInterrupt):
    """One of `SIGNALS`, raised in the main thread wherever that was."""

    def __init__(self, number: Signals) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """Whether this process has been asked to end. Work that polls it can come to a good end by itself."""

    def __init__(self) -> None:
        self.signal: Signals | None = None
        """The first signal that has come."""
        self.defers = True
        """Whether the first signal only sets `signal`; otherwise it raises `Signalled`, as each further one does."""
        self._has_come = threading.Event()

    def take(self, number: Signals) -> None:
        """Handle a signal.

        Raises:
            Signalled: it is the second, or nobody polls at this moment.
        """
        if self.signal is not None or not self.defers:
            raise Signalled(number)
        self.signal = number
        self._has_come.set()

    def announce(self, say: Callable[[str], None]) -> None:
        """Wait for the first signal, and say what is done about it. Run it in a thread: a handler must not print."""
        self._has_come.wait()
        if self.signal is not None:
            say(f"{signal_name(self.signal)}: writing checkpoints; once more stops at once")

    def end(self) -> None:
        """Release whoever waits to announce a signal."""
        self._has_come.set()


def signal_name(number: Signals) -> str:
    """What a person calls a signal."""
    return "Ctrl-C" if number == Signals.SIGINT else number.name


@contextmanager
def raising_signals() -> Iterator[None]:
    """Raise `Signalled` on each signal, so that whatever was begun is left by its `finally`."""

    def handle(number: Signals) -> None:
        raise Signalled(number)

    with _handling(handle):
        yield


@contextmanager
def deferred_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Let the work in this block find out by itself that it is to end. A second signal ends it at once.

    Args:
        say: told once that the first signal has come; called from another thread.
    """
    request = StopRequest()
    threading.Thread(target=request.announce, args=(say,), name="signals", daemon=True).start()
    try:
        with _handling(request.take):
            yield request
    finally:
        request.end()


@contextmanager
def shielding_children() -> Iterator[None]:
    """Have processes that start in this block never see SIGTERM and SIGHUP; keep this process's own handlers.

    `timeout`, systemd, Slurm and a terminal that is closed signal all processes together. Ray's would die at once, and
    the driver could not reach the workers any more to have them write checkpoints. A process inherits the signals that
    are blocked when it starts. What comes meanwhile is handled at the end of the block, by the handlers of before: Ray
    sets its own of SIGTERM (2.60, `ray.init`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    on_term = signal.getsignal(Signals.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {Signals.SIGTERM, Signals.SIGHUP})
    try:
        yield
    finally:
        if callable(on_term):
            signal.signal(Signals.SIGTERM, on_term)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handling(handler: _Handler) -> Iterator[None]:
    """Set a handler for all signals but those that this process ignores; only the main thread may do that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        if number == Signals.SIGHUP:
            leave_dead_terminal()
        handler(Signals(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number] or signal.SIG_DFL)


def leave_dead_terminal() -> None:
    """Point every descriptor of a terminal that is gone at nowhere; printing to it would raise EIO."""
    for each in list(Path("/dev/fd").iterdir()):
        descriptor = int(each.name)
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_RDWR)
                with suppress(OSError):
                    os.dup2(nowhere, descriptor)
                os.close(nowhere)

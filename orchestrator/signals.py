"""Handle the signals that ask this process to end: Ctrl-C (SIGINT), SIGTERM, SIGHUP, and SIGUSR1 of Slurm.

Slurm sends SIGUSR1 some time before it ends a job (`sbatch --signal=B:USR1@60`), so that the job can be requeued.
"""

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

SIGNALS = (Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP, Signals.SIGUSR1)

_Handler = Callable[[Signals], None]


class Signalled(KeyboardInterrupt):
    """One of `SIGNALS` has arrived. Raised in the main thread, at whatever point it has reached."""

    def __init__(self, number: Signals) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """A request to end this process. Work that polls it can stop in an orderly way."""

    def __init__(self) -> None:
        self.signal: Signals | None = None
        """The first signal that has arrived."""
        self.defers = True
        """Whether the first signal only sets `signal`. If not, it raises `Signalled`, like every later signal."""
        self._has_arrived = threading.Event()

    def take(self, number: Signals) -> None:
        """Handle a signal.

        Raises:
            Signalled: it is the second signal, or `defers` is False.
        """
        if self.signal is not None or not self.defers:
            raise Signalled(number)
        self.signal = number
        self._has_arrived.set()

    def announce(self, say: Callable[[str], None], describe: Callable[[], str]) -> None:
        """Wait for the first signal, then say how it is handled. Run in a thread: a signal handler must not print."""
        self._has_arrived.wait()
        if self.signal is not None:
            say(f"{signal_name(self.signal)}: {describe()}; a second signal stops at once")

    def end(self) -> None:
        """Release the thread that waits in `announce`."""
        self._has_arrived.set()


def signal_name(number: Signals) -> str:
    """Return the everyday name of a signal."""
    return "Ctrl-C" if number == Signals.SIGINT else number.name


@contextmanager
def raising_signals() -> Iterator[None]:
    """Raise `Signalled` on each signal, so that `finally` clauses run."""

    def handle(number: Signals) -> None:
        raise Signalled(number)

    with _handling(handle):
        yield


@contextmanager
def deferred_signals(
    say: Callable[[str], None],
    describe: Callable[[], str] = lambda: "stopping at the next step, 1 checkpoint to write",
) -> Iterator[StopRequest]:
    """Let the work in this block poll whether it should end. A second signal ends it at once.

    Args:
        say: called once with a message when the first signal arrives, from another thread.
        describe: returns what the work does now, for the message; called from that thread.
    """
    request = StopRequest()
    threading.Thread(target=request.announce, args=(say, describe), name="signals", daemon=True).start()
    try:
        with _handling(request.take):
            yield request
    finally:
        request.end()


@contextmanager
def shielding_children() -> Iterator[None]:
    """Start processes in this block with all `SIGNALS` but SIGINT blocked, and keep this process's own handlers.

    `timeout`, systemd, Slurm and a closing terminal signal all processes together. Ray's processes would die at once,
    and the driver could no longer reach its workers to have them write checkpoints. A new process inherits the set of
    blocked signals. A signal that arrives during the block is handled at its end, by the handlers from before the
    block: Ray sets its own handler for SIGTERM (2.60, `ray.init`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    on_term = signal.getsignal(Signals.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS) - {Signals.SIGINT})
    try:
        yield
    except SystemExit as error:  # by Ray's handler, because a thread in which the signal is not blocked has taken it
        if error.code != Signals.SIGTERM:
            raise
        signal.raise_signal(Signals.SIGTERM)  # handled at the end of the block
    finally:
        if callable(on_term):
            signal.signal(Signals.SIGTERM, on_term)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handling(handler: _Handler) -> Iterator[None]:
    """Set a handler for all signals that this process does not ignore. Does nothing outside the main thread.

    A handler that raises while Ray waits in its own code ends that wait by a plain KeyboardInterrupt (2.60, `_raylet`
    `check_status`). It becomes a `Signalled` again here, with the signal that arrived last.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    arrived: list[Signals] = []

    def handle(number: int, _: FrameType | None) -> None:
        if number == Signals.SIGHUP:
            leave_dead_terminal()
        arrived.append(Signals(number))
        handler(arrived[-1])

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Signalled) or not arrived:
            raise
        raise Signalled(arrived[-1]) from error
    finally:
        for number in ours:
            signal.signal(number, before[number] or signal.SIG_DFL)


def leave_dead_terminal() -> None:
    """Redirect every descriptor of a closed terminal to /dev/null, because printing to it would raise EIO."""
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

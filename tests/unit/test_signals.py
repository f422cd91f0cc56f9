"""Signals are raised if no work polls for them, and deferred if it does."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from signal import Signals

import pytest

from orchestrator.signals import (
    SIGNALS,
    Signalled,
    deferred_signals,
    leave_dead_terminal,
    raising_signals,
    shielding_children,
)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Begin with Python's own handlers, which must be there again after each test.

    A process that was started in the background, or by `nohup`, ignores some of these signals.
    """
    inherited = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == Signals.SIGINT else signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    for number, handler in inherited.items():
        signal.signal(number, handler)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda each: each.name)
def test_a_signal_is_raised_as_an_interrupt_that_holds_its_number(number: Signals) -> None:
    with pytest.raises(KeyboardInterrupt) as raised, raising_signals():
        signal.raise_signal(number)
    assert isinstance(raised.value, Signalled)
    assert raised.value.signal == number


@pytest.mark.parametrize("number", SIGNALS, ids=lambda each: each.name)
def test_the_first_signal_is_deferred_and_announced_once_and_the_second_is_raised(number: Signals) -> None:
    said: list[str] = []
    with deferred_signals(said.append, lambda: "stopping, 2 checkpoints to write") as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
        wait_for(lambda: len(said) == 1)
        with pytest.raises(Signalled):
            signal.raise_signal(Signals.SIGTERM)
    name = "Ctrl-C" if number == Signals.SIGINT else number.name
    assert said == [f"{name}: stopping, 2 checkpoints to write; a second signal stops at once"]


def test_a_signal_is_raised_at_once_while_nothing_defers() -> None:
    with deferred_signals(lambda _: None) as stop:
        stop.defers = False
        with pytest.raises(Signalled):
            signal.raise_signal(Signals.SIGTERM)
    assert stop.signal is None


def test_without_a_signal_nothing_is_announced_and_no_thread_stays() -> None:
    said: list[str] = []
    with deferred_signals(said.append):
        (waiting,) = [each for each in threading.enumerate() if each.name == "signals"]
    waiting.join(10)
    assert not waiting.is_alive()
    assert said == []


def interrupt_as_ray_does(*before: Signals) -> None:
    """Raise what is left of a signal that arrives, after others, while Ray waits in its own code."""
    for each in before:
        signal.raise_signal(each)
    try:
        signal.raise_signal(Signals.SIGTERM)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


def test_a_signal_that_a_library_turns_into_a_plain_interrupt_keeps_its_name() -> None:
    with pytest.raises(Signalled) as raised, raising_signals():
        interrupt_as_ray_does()
    assert raised.value.signal == Signals.SIGTERM
    with pytest.raises(Signalled) as raised, deferred_signals(lambda _: None):
        interrupt_as_ray_does(Signals.SIGINT)  # the first one only asks for a stop
    assert raised.value.signal == Signals.SIGTERM
    with pytest.raises(KeyboardInterrupt) as plain, raising_signals():
        raise KeyboardInterrupt
    assert not isinstance(plain.value, Signalled), "no signal has arrived"


def test_a_signal_that_rays_own_handler_has_taken_as_ray_starts_keeps_its_name() -> None:
    with pytest.raises(Signalled) as raised, raising_signals(), shielding_children():
        sys.exit(Signals.SIGTERM)
    assert raised.value.signal == Signals.SIGTERM
    with pytest.raises(SystemExit), raising_signals(), shielding_children():
        sys.exit(2)


def test_an_ignored_signal_stays_ignored() -> None:
    """SIGHUP is ignored under nohup."""
    before = signal.signal(Signals.SIGHUP, signal.SIG_IGN)
    try:
        with raising_signals():
            signal.raise_signal(Signals.SIGHUP)
    finally:
        signal.signal(Signals.SIGHUP, before)


def test_shielded_children_do_not_receive_signals_and_the_parent_handles_them_later() -> None:
    """A library that sets its own handler in the block does not replace the parent's handler."""
    handled: list[int] = []

    with raising_signals():
        signal.signal(Signals.SIGTERM, lambda number, _: handled.append(number))
        with shielding_children():
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            signal.signal(Signals.SIGTERM, lambda *_: sys.exit(15))
            signal.raise_signal(Signals.SIGTERM)
            assert handled == [], "the signal waits for the end of the block"
        assert handled == [Signals.SIGTERM]
    child.send_signal(Signals.SIGTERM)
    child.send_signal(Signals.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.kill()
    assert child.wait() == -Signals.SIGKILL


def test_descriptors_of_a_closed_terminal_are_redirected_and_others_are_not() -> None:
    ours, theirs = pty.openpty()
    copy = os.dup(theirs)
    reader, writer = os.pipe()
    leave_dead_terminal()
    assert os.isatty(theirs), "the terminal is still open"
    os.close(ours)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(theirs, b"x")
    leave_dead_terminal()
    assert os.write(theirs, b"x") == os.write(copy, b"x") == 1
    os.write(writer, b"y")
    assert os.read(reader, 1) == b"y"
    for descriptor in (theirs, copy, reader, writer):
        os.close(descriptor)


def test_other_threads_run_without_handlers() -> None:
    faults: list[BaseException] = []

    def run() -> None:
        try:
            with raising_signals(), deferred_signals(lambda _: None), shielding_children():
                pass
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert faults == []

"""Where a command prints while libraries print into a log, and how it ends after a signal or a fault."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.frame import console_on
from orchestrator.errors import Interrupted, RayLostError, StorageError
from orchestrator.signals import Signalled, raising_signals, signal_name
from orchestrator.storage import storage_fault

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def screen(root: Path, descriptor: int = 1) -> Iterator["Console"]:
    """Yield a console for the command's own lines. Output of libraries goes to `driver.log` in the sweep's folder.

    If the Ray of this process dies, the process ends with a message and a code of its own.

    Args:
        root: the sweep's folder.
        descriptor: where the console prints: 1 for standard output, 2 for standard error.
    """
    from orchestrator.ray_watch import when_ray_is_lost
    from orchestrator.training.attempt.log_file import output_to

    errors = os.dup(2)
    with tempfile.TemporaryDirectory() as folder, os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as own:
        log = Path(folder) / "driver.log"

        def keep_log() -> None:
            if (root / "sweep.json").is_file():  # otherwise nothing was started, and nothing is written
                # The command itself reports a full disk or a folder that cannot be written.
                with suppress(OSError), (root / "driver.log").open("ab") as kept:
                    kept.write(log.read_bytes())

        def end(error: RayLostError) -> None:
            keep_log()
            resume = f" Continue with: orchestrator resume {root}" if (root / "sweep.json").is_file() else ""
            with suppress(OSError):
                os.write(errors, f"error: {error}.{resume}\n".encode())
            os._exit(error.exit_code)  # Ray's client can no longer end in good order

        try:
            with output_to(log), when_ray_is_lost(end):
                yield console_on(own)
        finally:
            keep_log()
            os.close(errors)


@contextmanager
def until_signal() -> Iterator[None]:
    """Let a view last until it ends or a signal arrives. Ctrl-C is its ordinary end, with exit code 0."""
    try:
        with raising_signals():
            yield
    except Signalled as signalled:
        raise typer.Exit(0 if signalled.signal == Signals.SIGINT else 128 + signalled.signal) from None


@contextmanager
def resumable(folder: Path, command: str = "") -> Iterator[None]:
    """Turn a signal or a storage fault into an error that says how to resume, each with its own exit code.

    Args:
        folder: the sweep's folder.
        command: what continues it; default `resume`.
    """

    def remedy() -> str:
        resume = command or f"orchestrator resume {folder}"
        return f"Continue with: {resume}" if (folder / "sweep.json").is_file() else ""

    try:
        with raising_signals():
            yield
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, Signalled) else Signals.SIGINT
        kept = "all measurements are kept" if remedy() else "nothing was started"
        raise Interrupted(f"interrupted by {signal_name(number)}; {kept}", remedy(), 128 + number) from None
    except OSError as error:
        if fault := storage_fault(error):
            raise StorageError(
                f"{folder}: its storage fails: {fault}", f"Free space or repair the storage. {remedy()}"
            ) from error
        raise

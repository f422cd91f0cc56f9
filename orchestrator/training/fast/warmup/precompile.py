"""Compiles kernels ahead: another process fills Triton's cache while this one imports libraries and loads its base.

On a cold cache, compiling takes as long as the imports, and neither needs the other. If the guessed shapes are wrong,
the probe compiles the missing kernels itself. Several processes of a machine, such as a driver and its workers, may
start the same task: one does it, and the others wait for it.
"""

import atexit
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from orchestrator.spec import TrialConfig

_TIMEOUT_S = 90.0
"""How long the probe waits before it compiles by itself."""

_log = logging.getLogger(__name__)

_running: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None
"""The other process, and its output."""


def start(configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Start to compile for the GPU that this process sees, if the fast engine may hold any of the trials.

    Args:
        configs: the trials on the base, or trials that represent them.
        num_slots: trials at a time.
    """
    global _running
    stop()
    eligible = [each for each in configs if each.training.engine != "trl" and each.fast_unsupported_reason() is None]
    if not eligible:
        return
    command = [sys.executable, "-P", "-m", "orchestrator.training.fast.warmup.precompile_worker", str(num_slots)]
    try:
        output = TemporaryFile()  # noqa: SIM115  `stop` closes it
        with TemporaryFile() as request:
            request.write(json.dumps([config.model_dump(mode="json") for config in eligible]).encode())
            request.seek(0)
            # The process finds packages where this one does, for example where Ray has told a worker to look.
            paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
            environment = os.environ | {"PYTHONPATH": paths}
            _running = subprocess.Popen(command, stdin=request, stdout=output, stderr=output, env=environment), output
    except OSError as error:  # a full disk, or no process left: the probe compiles
        _log.warning("kernels are not compiled ahead: %s; the first trial compiles them", error)


def join() -> None:
    """Wait until the other process has ended; return at once where none was started. For one thread only."""
    if _running is None:
        return
    process, output = _running
    try:
        if process.wait(_TIMEOUT_S):
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
            _log.warning("kernels were not compiled ahead (exit code %d): %s", process.returncode, text[-2000:])
    except subprocess.TimeoutExpired:
        _log.warning("kernels were not compiled ahead: it took longer than %g s", _TIMEOUT_S)
    finally:
        stop()


@atexit.register
def stop() -> None:
    """End the other process, if it still runs."""
    global _running
    if _running is None:
        return
    (process, output), _running = _running, None
    with output:
        process.kill()
        process.wait()

"""Kernels compiled ahead: while a process imports and loads its base, another fills Triton's cache for it.

On a cold cache that takes as long as the imports, and neither needs the other. Where the shapes that are guessed there
are not the real ones, the probe compiles what is missing, as it would without this. Several processes of a machine may
begin the same, a driver and its workers: one does it, the others then find it done.
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

_PATIENCE_S = 90.0
"""That the probe waits; then it compiles by itself."""

_log = logging.getLogger(__name__)

_running: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None
"""The other process, and what it prints."""


def start(configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Begin to compile for the GPU that this process sees, if the fast engine may hold any of these trials.

    Args:
        configs: the trials on the base, or some that stand for them.
        num_slots: trials at a time.
    """
    global _running
    stop()
    held = [each for each in configs if each.training.engine != "trl" and each.fast_unsupported_reason() is None]
    if not held:
        return
    command = [sys.executable, "-P", "-m", "orchestrator.training.fast.warmup.precompile_worker", str(num_slots)]
    try:
        said = TemporaryFile()  # noqa: SIM115  `stop` closes it
        with TemporaryFile() as asked:
            asked.write(json.dumps([config.model_dump(mode="json") for config in held]).encode())
            asked.seek(0)
            # It finds packages where this process does, such as where Ray has told a worker to look.
            paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
            environment = os.environ | {"PYTHONPATH": paths}
            _running = subprocess.Popen(command, stdin=asked, stdout=said, stderr=said, env=environment), said
    except OSError as error:  # no room, no process: the probe compiles
        _log.warning("kernels are not compiled ahead: %s", error)


def join() -> None:
    """Wait until what was started has done what it can; at once where nothing was. For one thread."""
    if _running is None:
        return
    process, said = _running
    try:
        if process.wait(_PATIENCE_S):
            said.seek(0)
            text = said.read().decode(errors="replace").strip()
            _log.warning("kernels were not compiled ahead (%d): %s", process.returncode, text[-2000:])
    except subprocess.TimeoutExpired:
        _log.warning("kernels were not compiled ahead: it took longer than %g s", _PATIENCE_S)
    finally:
        stop()


@atexit.register
def stop() -> None:
    """End what was started, where it still runs."""
    global _running
    if _running is None:
        return
    (process, said), _running = _running, None
    with said:
        process.kill()
        process.wait()

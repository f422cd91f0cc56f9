"""Kernels compiled ahead: while a process imports and loads its base, another fills Triton's cache for it.

On a cold cache that takes as long as the imports, and neither needs the other. Where the shapes that are guessed there
are not the real ones, the probe compiles what is missing, as it would without this.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import IO

from orchestrator.spec import TrialConfig

_PATIENCE_S = 90.0
"""That the probe waits; then it compiles by itself."""

_running: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None
"""The other process, and what it prints."""


def start(configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Begin to compile for the GPU that this process sees.

    Args:
        configs: the trials, or some that stand for them.
        num_slots: trials at a time.
    """
    global _running
    said = TemporaryFile()  # noqa: SIM115  `join` closes it
    with TemporaryFile() as asked:
        asked.write(json.dumps([config.model_dump(mode="json") for config in configs]).encode())
        asked.seek(0)
        command = [sys.executable, "-m", "orchestrator.training.fast.skeleton", str(num_slots)]
        _running = subprocess.Popen(command, stdin=asked, stdout=said, stderr=said), said


def join() -> None:
    """Wait until what was started has done what it can; at once where nothing was."""
    global _running
    if _running is None:
        return
    (process, said), _running = _running, None
    try:
        code = process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    with said:
        if code:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()
            logging.getLogger(__name__).warning("kernels were not compiled ahead (%d): %s", code, text[-2000:])

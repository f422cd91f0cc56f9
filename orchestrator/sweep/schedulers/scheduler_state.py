"""Convert a scheduler's state to bytes and back.

Tune saves no scheduler state with a sweep (ray 2.60, `TuneController.__getstate__`): rungs, brackets and medians would
be empty after each resume. Schedulers refer to Tune's trials, which Tune restores itself; here a trial is written as
its id.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any

from ray import cloudpickle
from ray.tune import Checkpoint
from ray.tune.experiment import Trial

from orchestrator.upstream import pending_checkpoint_type

_GONE = ("gone", "")
_CHECKPOINTS = (Checkpoint, pending_checkpoint_type())


def freeze(state: Any) -> bytes:
    """Pickle state in which each trial is its id and each checkpoint is None.

    Paths of checkpoints are valid only in this folder and for this driver.
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(state)
    return buffer.getvalue()


def thaw(frozen: bytes, trials: Mapping[str, Any]) -> Any:
    """Unpickle state of `freeze`, with `trials` (id -> trial) in place of the ids."""
    return _Unpickler(io.BytesIO(frozen), trials).load()


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # mypy skips ray
    def persistent_id(self, value: Any) -> tuple[str, str] | None:
        if isinstance(value, Trial):
            return "trial", value.trial_id
        return _GONE if isinstance(value, _CHECKPOINTS) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, trials: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._trials = trials

    def persistent_load(self, name: Any) -> Any:
        return None if name == _GONE else self._trials[name[1]]

"""A scheduler's state in bytes. Tune saves none with a sweep (ray 2.60, `TuneController.__getstate__`): rungs, brackets
and medians would be empty after each resume.

Schedulers hold Tune's trials, which are restored by Tune itself: here they are written as their names.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any

from ray import cloudpickle
from ray.train._internal.session import _FutureTrainingResult
from ray.tune import Checkpoint
from ray.tune.experiment import Trial

_GONE = ("gone", "")


def freeze(state: Any) -> bytes:
    """State in which each trial is a name. Checkpoints become None: their paths are those of this place and driver."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(state)
    return buffer.getvalue()


def thaw(frozen: bytes, trials: Mapping[str, Any]) -> Any:
    """State of `freeze`, with these trials in the places of their names."""
    return _Unpickler(io.BytesIO(frozen), trials).load()


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # mypy skips ray
    def persistent_id(self, thing: Any) -> tuple[str, str] | None:
        if isinstance(thing, Trial):
            return "trial", thing.trial_id
        return _GONE if isinstance(thing, Checkpoint | _FutureTrainingResult) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, trials: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._trials = trials

    def persistent_load(self, name: Any) -> Any:
        return None if name == _GONE else self._trials[name[1]]

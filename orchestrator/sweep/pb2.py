"""Population based bandits as they are in Ray Tune, which needs scikit-learn for them."""

from typing import Any

from ray.tune.schedulers.pb2 import PB2

from orchestrator.sweep.population import Cloning


class Pb2(Cloning, PB2):  # type: ignore[misc]  # ray is untyped
    """See Tune."""


def make_pb2(**settings: Any) -> Pb2:
    """`settings` are those of `Cloning`."""
    return Pb2(**settings)

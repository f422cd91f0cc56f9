"""Fixtures of the trackers' tests: trials to record, and servers on the loopback."""

from collections.abc import Callable, Iterator

import pytest
from loopback import MlflowServer, Serve, WandbServer, serving

from orchestrator.record import TrialPaths, TrialResult, TrialState
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.tracking.protocol import TrialIdentity

Identify = Callable[..., TrialIdentity]


@pytest.fixture
def identify() -> Identify:
    """Return a function that describes a trial which continues after a step: `identify(paths, spec, step=20)`."""

    def make(paths: TrialPaths, spec: SweepSpec, step: int = 0, config: TrialConfig | None = None) -> TrialIdentity:
        start = TrialResult(
            trial_id=paths.trial_id,
            state=TrialState.RUNNING,
            config=config or spec.trial_config({}),
            metric=spec.search.metric,
            mode=spec.search.resolved_mode,
            step=step,
        )
        return TrialIdentity(paths, start, spec)

    return make


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server of a given behavior and returns its address."""
    with serving() as start:
        yield start


@pytest.fixture
def mlflow_server() -> type[MlflowServer]:
    """Return the class of a server for MLflow: `mlflow_server("name", "password")`."""
    return MlflowServer


@pytest.fixture
def wandb_server(serve: Serve) -> WandbServer:
    """A running server for W&B that answers."""
    server = WandbServer()
    server.address = serve(server.answer)
    return server

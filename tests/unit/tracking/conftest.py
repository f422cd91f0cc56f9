"""Shared by the trackers' tests: trials to record, and servers on the loopback."""

from collections.abc import Callable, Iterator

import pytest
from loopback import MlflowServer, Serve, WandbServer, serving

from orchestrator.record import TrialPaths, TrialResult, TrialState
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.tracking.protocol import TrialIdentity

Identify = Callable[..., TrialIdentity]


@pytest.fixture
def identify() -> Identify:
    """`identify(paths, spec, step=20, config=...)`: a trial that goes on from a step."""

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
    """See `serving`."""
    with serving() as start:
        yield start


@pytest.fixture
def mlflow_server() -> type[MlflowServer]:
    """`mlflow_server("name", "password")`."""
    return MlflowServer


@pytest.fixture
def wandb_server(serve: Serve) -> WandbServer:
    """One that answers."""
    server = WandbServer()
    server.address = serve(server.answer)
    return server

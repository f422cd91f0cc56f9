"""Fixtures of the trackers' tests: servers on the loopback."""

from collections.abc import Iterator

import pytest
from loopback import MlflowServer, Serve, WandbServer, serving


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

"""Fixtures of the integration tests."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import DEMO, TINY

from orchestrator.record import SweepPaths
from orchestrator.spec import SweepSpec, load_spec

# Exact results are those of a CPU, so CUDA is hidden before it starts. tests/gpu runs in another process.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def tiny() -> Callable[..., SweepSpec]:
    """Return a function for a short version of the demo experiment with overrides: `tiny("lora.rank=4", ...)`."""
    return lambda *overrides: load_spec(DEMO, [*TINY, *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> SweepPaths:
    """The paths of a sweep folder that does not exist yet."""
    return SweepPaths(tmp_path / "runs" / "tiny")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that this machine has: the environment variable CHROMIUM names it, else it is looked for."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


# For tests of the worker and of engines that trials share


@pytest.fixture(scope="module")
def inputs() -> Any:
    """The `TrialInputs` of the demo's base and rows."""
    from shared_engine import open_inputs

    return open_inputs()


@pytest.fixture(scope="module")
def worker_spec() -> SweepSpec:
    """A sweep of trials with six steps each, which can share an engine."""
    from followed_worker import SIX_STEPS
    from shared_engine import COMMON

    space = "search.space={lora.rank: {choice: [4, 8]}, lora.dropout: {choice: [0.1, 0.3]}}"
    return load_spec(DEMO, [*COMMON, *SIX_STEPS, space, "search.num_trials=4"])


@pytest.fixture
def worker(worker_spec: SweepSpec, inputs: Any, tmp_path: Path) -> Iterator[Any]:
    """A `FollowedWorker` of two slots."""
    from followed_worker import FollowedWorker

    made = FollowedWorker(tmp_path / "sweep", worker_spec, inputs.data)
    yield made
    made.close()


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trials step jointly, as they do on a GPU."""
    from orchestrator.training.worker import compatibility

    monkeypatch.setattr(compatibility, "steps_separately", lambda _: False)

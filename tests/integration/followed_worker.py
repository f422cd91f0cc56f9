"""A worker runtime whose trials are followed as a sweep's recording processes follow them."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data import PreparedData
from orchestrator.record import SweepPaths, TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.attempt.events import END, Event, Logged, Noted
from orchestrator.training.trial import trial_so_far
from orchestrator.training.worker.runtime import WorkerRuntime

SIX_STEPS = ["lora.rank=8", "training.steps=6", "training.eval_steps=3", "training.save_steps=3"]


@dataclass
class FollowedTrial:
    """A trial in a worker, and the events that have been received."""

    lease: str
    paths: TrialPaths
    start: TrialResult
    events: list[Event] = field(default_factory=list)

    @property
    def end(self) -> Event | None:
        """The last event, once the trial has ended."""
        return self.events[-1] if self.events and isinstance(self.events[-1], END) else None

    def of(self, *kinds: type[Event]) -> list[Any]:
        """The events of these classes."""
        return [event for event in self.events if isinstance(event, kinds)]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of all `Noted` events."""
        noted: dict[str, Any] = {}
        for event in self.of(Noted):
            noted |= event.fields
        return noted


class FollowedWorker:
    """A worker runtime, by default with two slots, and the trials started in it."""

    def __init__(self, folder: Path, spec: SweepSpec, data: PreparedData, slots: int = 2, gpus: float = 0) -> None:
        self.spec = spec
        self.lost = threading.Event()
        self.runtime = WorkerRuntime(spec, data, slots, gpus, on_lost=self.lost.set)
        self._slots = slots
        self.paths = SweepPaths(folder)
        self.all: list[FollowedTrial] = []

    def config(self, **training: Any) -> TrialConfig:
        """The experiment's own values, with these fields of training."""
        return self.spec.trial_config({}).model_copy(
            update={"training": self.spec.training.model_copy(update=training)} if training else {}
        )

    def start(
        self, name: str, config: TrialConfig | None = None, again: bool = False, waits: bool = True
    ) -> FollowedTrial | None:
        """Start a trial. Return None if no slot is free, or gets free soon: a last event comes before the slot is."""
        paths = self.paths.trial(name)
        lease = f"lease-{name}-{len(self.all)}"
        if not again:
            paths.root.mkdir(parents=True, exist_ok=True)
        start = trial_so_far(config or self.spec.trial_config({}), self.spec, paths)
        deadline = time.monotonic() + 20 * waits
        while not self.runtime.start(lease, start, paths):
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)
        followed = FollowedTrial(lease, paths, start)
        self.all.append(followed)
        return followed

    def follow(self, until: Callable[[], object], *without: FollowedTrial | None, timeout_s: float = 200) -> None:
        """Take the events of all trials but `without`, until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, [followed.events[-1:] for followed in self.all]
            for followed in self.all:
                if not followed.end and followed not in without:
                    followed.events += self.runtime.events(followed.lease, 0.02)

    def follow_more_steps(self, followed: FollowedTrial) -> None:
        """Follow all trials until this one has made some more steps."""
        done = len(followed.of(Logged))
        self.follow(lambda: len(followed.of(Logged)) > done + 30)

    def has_free(self) -> bool:
        return self.runtime.free_slots() > 0

    def close(self) -> None:
        """End the trials that still run, because the tests share the base."""
        for followed in self.all:
            self.runtime.release(followed.lease)
        deadline = time.monotonic() + 30
        while self.runtime.free_slots() < self._slots and not self.lost.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        for thread in threading.enumerate():
            if thread.name == "writer":
                thread.join(30)

"""A host of trials, followed as a sweep's relays follow it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data import PreparedData
from orchestrator.record import SweepPaths, TrialPaths, TrialResult
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.training.attempt.events import END, Event, Noted
from orchestrator.training.trial import trial_so_far
from orchestrator.training.worker.runtime import WorkerRuntime

HOSTED = ["lora.rank=8", "training.steps=6", "training.eval_steps=3", "training.save_steps=3"]


@dataclass
class Followed:
    """A trial on a host, and its events."""

    lease: str
    paths: TrialPaths
    start: TrialResult
    events: list[Event] = field(default_factory=list)

    @property
    def end(self) -> Event | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], END) else None

    def of(self, *kinds: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    @property
    def fields(self) -> dict[str, Any]:
        """What was noted."""
        noted: dict[str, Any] = {}
        for event in self.of(Noted):
            noted |= event.fields
        return noted


class Hosted:
    """A host of two slots, followed as a relay would."""

    def __init__(self, folder: Path, spec: SweepSpec, data: PreparedData, slots: int = 2, gpus: float = 0) -> None:
        self.spec = spec
        self.lost = threading.Event()
        self.host = WorkerRuntime(spec, data, slots, gpus, on_lost=self.lost.set)
        self._slots = slots
        self._paths = SweepPaths(folder)
        self.all: list[Followed] = []

    def start(
        self, name: str, config: TrialConfig | None = None, again: bool = False, waits: bool = True
    ) -> Followed | None:
        """A trial in a slot, or None where none is free, or becomes free soon: a last event comes before that."""
        paths = self._paths.trial(name)
        lease = f"lease-{name}-{len(self.all)}"
        if not again:
            paths.root.mkdir(parents=True, exist_ok=True)
        start = trial_so_far(config or self.spec.trial_config({}), self.spec, paths)
        deadline = time.monotonic() + 20 * waits
        while not self.host.start(lease, start, paths):
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)
        followed = Followed(lease, paths, start)
        self.all.append(followed)
        return followed

    def follow(self, until: Callable[[], object], *without: Followed | None, timeout_s: float = 200) -> None:
        """Take the events of all, until this is so."""
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, [followed.events[-1:] for followed in self.all]
            for followed in self.all:
                if not followed.end and followed not in without:
                    followed.events += self.host.events(followed.lease, 0.02)

    def has_free(self) -> bool:
        return self.host.free_slots() > 0

    def close(self) -> None:
        """End what still runs: the base is shared by the tests."""
        for followed in self.all:
            self.host.release(followed.lease)
        deadline = time.monotonic() + 30
        while self.host.free_slots() < self._slots and not self.lost.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        for thread in threading.enumerate():
            if thread.name == "writer":
                thread.join(30)

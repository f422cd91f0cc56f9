"""The supervisor opens workers, ends those that hang, retires those whose node goes away, and gives up."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from orchestrator.errors import SweepError
from orchestrator.record import SweepPaths
from orchestrator.record.faults import read_faults
from orchestrator.spec.sections import ResourcesSection
from orchestrator.sweep.workers import supervisor as module
from orchestrator.sweep.workers.pulse import ProcessId, Pulse
from orchestrator.sweep.workers.supervisor import Supervisor, hang_s
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.upstream import ActorState

N1, N2 = "1" * 56, "2" * 56
KILLED = "Worker unexpectedly exits with a connection error code 2. End of file."
OPEN = {"is_open": True, "is_busy": True, "idle_s": 1.0, "longest_s": 2.0, "has_stepped": True, "has_evaluated": True}


class Answer:
    """A reference of Ray that resolves when it is told to."""

    def __init__(self, value: Any = None, is_done: bool = True) -> None:
        self.value = value
        self.is_done = is_done


class FakeWorker:
    """A worker whose state and answers a test sets."""

    def __init__(self) -> None:
        self.num_restarts, self.state, self.cause, self.node = 0, "ALIVE", "", N1
        self.fields: dict[str, Any] = dict(OPEN)
        self.answers = True
        self.calls: list[tuple[str, Any]] = []
        self.pulse = SimpleNamespace(remote=lambda: Answer(self._pulse(), self.answers))
        self.open = SimpleNamespace(remote=lambda *_: self._call("open", None))
        self.retire = SimpleNamespace(remote=lambda why, _: self._call("retire", why))

    def _pulse(self) -> Pulse:
        return Pulse(ProcessId("host", 100 + self.num_restarts, 1.0), **self.fields)

    def _call(self, name: str, argument: Any) -> Answer:
        self.calls.append((name, argument))
        return Answer()

    def die(self, cause: str = KILLED) -> None:
        self.num_restarts, self.cause = self.num_restarts + 1, cause


class Stage:
    """Supervises fake workers, second by second."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, **resources: Any) -> None:
        self.workers = [FakeWorker() for _ in range(number)]
        self.said: list[str] = []
        self.draining: set[str] = set()
        self.killed: list[tuple[str, Any]] = []
        self.paths = SweepPaths(folder)
        self.paths.workers.mkdir(parents=True)
        monkeypatch.setattr(module.upstream, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(
            module.upstream, "actor_state", lambda w: ActorState(w.state, w.num_restarts, 1, w.node, w.cause)
        )
        monkeypatch.setattr(module.ray, "wait", lambda refs, **_: ([r for r in refs if r.is_done], []))
        monkeypatch.setattr(module.ray, "get", self._get)
        monkeypatch.setattr(module.ray, "kill", lambda _, no_restart=True: self.killed.append(("kill", no_restart)))
        task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._end))
        monkeypatch.setattr(module.ray, "remote", lambda **_: lambda _: task)
        workers = Workers(self.workers, [], None, self.paths.workers)
        self.supervisor = Supervisor(workers, self.paths, ResourcesSection(**resources), self.said.append)
        self.now = self.supervisor._looked

    @staticmethod
    def _get(reference: Answer) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def _end(self, process: ProcessId) -> Answer:
        self.killed.append(("process", process.pid))
        return Answer()

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            self.supervisor.look(self.now)


def test_a_worker_is_opened_and_again_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, 1)
    (worker,) = stage.workers
    worker.fields["is_open"] = False
    stage.run(3)
    assert worker.calls[0] == ("open", None)
    worker.fields["is_open"] = True
    stage.run(3)
    worker.die()
    stage.run(1)
    (fault,) = read_faults(stage.paths)
    assert (fault.worker, fault.trial_id, fault.step) == ("host:100", None, None)
    assert fault.cause.startswith("its process died: killed")
    assert stage.said == [f"worker host:100: {fault.cause}; restarts"]
    assert stage.supervisor.fault() is None


def test_a_worker_that_dies_at_its_start_is_opened_ever_later_and_then_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, 1, max_restarts=3)
    (worker,) = stage.workers
    worker.fields |= {"is_open": False, "is_busy": False, "has_stepped": False, "has_evaluated": False}
    (stage.paths.workers / "host-1.log").write_text("loading\n\nMemoryError: no memory for the base\n")
    opened = []
    for _ in range(3):
        worker.die("Task was killed due to the node running low on memory.")
        stage.run(1)
        before = stage.now
        worker.calls.clear()
        while not worker.calls:
            stage.run(1)
        opened.append(stage.now - before)
    assert opened[0] < opened[1] < opened[2], "exponential back-off"
    assert [fault.then for fault in read_faults(stage.paths)] == [
        "restarts in 1 s",
        "restarts in 2 s",
        "restarts in 4 s",
    ]
    worker.die("Task was killed due to the node running low on memory.")
    stage.run(1)
    fault = stage.supervisor.fault()
    assert isinstance(fault, SweepError)
    assert fault.message == (
        "no worker is left; the last one died 4 times in a row without a step: the memory of its node ran short, and "
        "Ray ended it\n    loading\n    MemoryError: no memory for the base"
    )
    assert f"orchestrator resume {tmp_path}" in fault.remedy


def test_steps_reset_the_count_and_one_bad_worker_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, 2, max_restarts=1)
    good, bad = stage.workers
    bad.fields |= {"has_stepped": False}
    for _ in range(4):
        stage.run(3)
        good.die()
        bad.die()
    stage.run(3)
    thens = [fault.then for fault in read_faults(stage.paths)]
    assert thens.count("restarts") == 4, "the good one has made steps each time"
    assert thens.count("given up: it died 2 times in a row without a step") == 1
    assert stage.killed == [("kill", True)]
    assert stage.supervisor.fault() is None


@pytest.mark.parametrize("answers", [True, False], ids=["no step", "no answer"])
def test_a_worker_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    stage = Stage(tmp_path, monkeypatch, 1, hang_minutes=1)
    (worker,) = stage.workers
    stage.run(3)
    assert stage.killed == []
    if answers:
        worker.fields["idle_s"] = 61.0
        stage.run(3)
    else:
        worker.answers = False
        stage.run(70)
    assert stage.killed[:2] == [("process", 100), ("kill", False)]
    assert "it hangs: " in stage.said[0]
    worker.fields["idle_s"], worker.answers = 0.0, True
    worker.die()
    stage.run(1)
    (fault,) = read_faults(stage.paths)
    assert fault.cause.startswith("it hung: no ")


def test_a_driver_that_was_stopped_ends_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, 1, hang_minutes=1)
    stage.run(3)
    stage.workers[0].answers = False
    stage.run(2)
    stage.now += 3600  # SIGSTOP, then SIGCONT
    stage.run(30)
    assert stage.killed == []


def test_trials_of_a_draining_node_write_checkpoints_and_the_worker_starts_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, 1)
    (worker,) = stage.workers
    stage.run(3)
    stage.draining = {N1}
    stage.run(2)
    assert worker.calls == [("retire", "its node is about to go away (drained or preempted)")]
    assert stage.killed == [("kill", False)]
    worker.node = N2
    worker.die("the actor is dead because it was killed by `ray.kill`")
    stage.run(2)
    (fault,) = read_faults(stage.paths)
    assert fault.cause == "its node is about to go away (drained or preempted)"
    assert fault.then == "restarts"


def test_an_actor_that_is_lost_between_two_looks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, 1)
    lost = SimpleNamespace(remote=lambda: Answer(RayActorError()))
    stage.workers[0].pulse = lost
    stage.run(4)
    assert stage.said == []


def test_the_time_without_progress_that_counts_as_a_hang() -> None:
    def pulse(**changes: Any) -> Pulse:
        return Pulse(ProcessId("host", 1, 1.0), **(OPEN | changes))

    assert hang_s(2.5, pulse()) == 150
    assert hang_s(2.5, None) == hang_s(2.5, pulse(has_stepped=False)) == 1800, "it loads the base, or compiles"
    assert hang_s(60.0, None) == 3600
    assert hang_s("auto", None) == hang_s("auto", pulse(has_evaluated=False)) == 1800
    assert hang_s("auto", pulse()) == 600
    assert hang_s("auto", pulse(longest_s=100.0)) == 2000

"""The supervisor opens workers, ends those that hang, retires those whose node goes away, and gives up."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from orchestrator.errors import RequestError, StorageError, SweepError
from orchestrator.record import SweepPaths
from orchestrator.record.faults import read_faults
from orchestrator.spec.sections import ResourcesSection
from orchestrator.sweep.workers import supervisor as module
from orchestrator.sweep.workers.pulse import ProcessId, Pulse
from orchestrator.sweep.workers.supervisor import Supervisor, hang_s
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.training.fast.shard.place import GroupLost
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
        self.opened: Any = (2, "")
        self.has_retired = True
        self.pulse = SimpleNamespace(remote=lambda: Answer(self._pulse(), self.answers))
        self.open = SimpleNamespace(remote=lambda *_: self._call("open", None, self.opened))
        self.retire = SimpleNamespace(remote=lambda why, _: self._call("retire", why, is_done=self.has_retired))

    def _pulse(self) -> Pulse:
        return Pulse(ProcessId("host", 100 + self.num_restarts, 1.0), **self.fields)

    def refuse(self, error: Exception) -> None:
        """Answer `open` with this error, as Ray passes it on."""
        self.opened = RayTaskError("open", "the traceback", error).as_instanceof_cause()

    def _call(self, name: str, argument: Any, value: Any = None, is_done: bool = True) -> Answer:
        self.calls.append((name, argument))
        return Answer(value, is_done)

    def die(self, cause: str = KILLED) -> None:
        self.num_restarts, self.cause = self.num_restarts + 1, cause


class Stage:
    """Supervises fake workers, second by second."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, num_shards: int = 1, **resources: Any
    ) -> None:
        self.workers = [FakeWorker() for _ in range(number)]
        self.said: list[str] = []
        self.draining: set[str] = set()
        self.killed: list[tuple[str, Any]] = []
        self.ended: list[int] = []
        """Numbers of the workers that were killed."""
        self.paths = SweepPaths(folder)
        self.paths.workers.mkdir(parents=True)
        monkeypatch.setattr(module.upstream, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(
            module.upstream, "actor_state", lambda w: ActorState(w.state, w.num_restarts, 1, w.node, w.cause)
        )
        monkeypatch.setattr(module.ray, "wait", lambda refs, **_: ([r for r in refs if r.is_done], []))
        monkeypatch.setattr(module.ray, "get", self._get)
        monkeypatch.setattr(module.ray, "kill", lambda worker, no_restart=True: self._kill(worker, no_restart))
        task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._end))
        monkeypatch.setattr(module.ray, "remote", lambda **_: lambda _: task)
        workers = Workers(self.workers, [], None, self.paths.workers)
        self.supervisor = Supervisor(workers, self.paths, ResourcesSection(**resources), self.said.append, num_shards)
        self.now = self.supervisor._looked

    @staticmethod
    def _get(reference: Answer) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def _kill(self, worker: FakeWorker, no_restart: bool) -> None:
        self.killed.append(("kill", no_restart))
        self.ended.append(self.workers.index(worker))

    def _end(self, process: ProcessId) -> Answer:
        self.killed.append(("process", process.pid))
        return Answer()

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            self.supervisor.look(self.now)


def test_each_worker_has_its_own_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large GPU, a small one, one that waits for a machine, and one whose process still loads the base."""
    stage = Stage(tmp_path, monkeypatch, 4)
    large, small, waiting, loading = stage.workers
    large.opened, small.opened, waiting.state = (6, ""), (2, "memory"), "PENDING_CREATION"
    loading.open = SimpleNamespace(remote=lambda *_: Answer(is_done=False))
    for member in stage.supervisor._members:
        member.opening = member.handle.open.remote()
    stage.run(1)
    began = time.monotonic()
    assert stage.supervisor.all_slots(0.3) == [6, 2, 6, 6]
    assert time.monotonic() - began >= 0.3, "it waits for the process that loads the base"
    loading.state = "PENDING_CREATION"
    stage.supervisor._members[3].is_gone = True
    assert stage.supervisor.all_slots(60.0) == [6, 2, 6]


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


def test_the_first_answer_of_an_open_worker_is_the_number_of_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, 2)
    for worker in stage.workers:
        worker.fields |= {"is_open": False}
    stage.workers[0].opened = RayActorError()
    stage.workers[1].opened = (3, "memory")
    stage.run(4)
    assert stage.supervisor.first_slots() == (3, "memory")
    assert len(stage.workers[0].calls) > 1, "it is opened again"


def test_a_worker_that_dies_as_it_is_opened_first_has_pauses_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, 1, max_restarts=2)
    (worker,) = stage.workers
    worker.fields |= {"is_open": False, "has_stepped": False}
    worker.opened = RayActorError()
    for _ in range(3):
        worker.die()
        stage.run(6)
    with pytest.raises(SweepError, match="no worker is left; the last one died 3 times in a row without a step"):
        stage.supervisor.first_slots()
    assert [fault.then for fault in read_faults(stage.paths)][:2] == ["restarts in 1 s", "restarts in 2 s"]


@pytest.mark.parametrize("error", [RequestError("base.model: no such folder"), ValueError("damaged\nweights")])
def test_a_worker_that_cannot_be_opened_is_given_up_and_ends_the_sweep_only_if_it_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stage = Stage(tmp_path, monkeypatch, 2)
    for worker in stage.workers:
        worker.fields |= {"is_open": False}
    stage.workers[0].refuse(error)
    stage.run(4)
    assert stage.ended == [0]
    assert stage.supervisor.fault() is None
    (fault,) = read_faults(stage.paths)
    assert fault.then == "given up: it could not be opened"
    stage.workers[1].refuse(error)
    stage.workers[1].die()
    stage.run(4)
    last = stage.supervisor.fault()
    if isinstance(error, RequestError):
        assert last == error
    else:
        assert isinstance(last, SweepError)
        assert last.message.startswith("no worker is left; the last one could not be opened: ")


def test_full_storage_ends_the_sweep_as_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, 2)
    stage.workers[0].fields |= {"is_open": False}
    stage.workers[0].refuse(OSError(28, "No space left on device", "worker.log"))
    stage.run(4)
    fault = stage.supervisor.fault()
    assert isinstance(fault, StorageError)
    assert fault.exit_code == 74


def test_an_error_of_the_supervisor_itself_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, 1)
    monkeypatch.setattr(module, "_FIRST_PERIOD_S", 0.01)

    def fail(_: Any) -> None:
        raise KeyError("NodeID")

    monkeypatch.setattr(module.upstream, "actor_state", fail)
    stage.supervisor.start()
    with pytest.raises(SweepError, match=r"the supervision of the workers has failed in fail, line \d+: KeyError"):
        stage.supervisor.first_slots()
    stage.supervisor.stop()


def test_workers_of_a_group_retire_together_and_end_only_once_all_have_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each needs the others for the steps that its trials still make."""
    stage = Stage(tmp_path, monkeypatch, 4, num_shards=2)
    stage.run(3)
    stage.workers[0].fields["is_retired"] = True  # it got SIGTERM
    stage.workers[1].has_retired = False
    stage.run(3)
    assert [[name for name, _ in worker.calls] for worker in stage.workers] == [["retire"], ["retire"], [], []]
    assert stage.ended == []
    for member in stage.supervisor._members[:2]:
        member.retiring.is_done = True
    stage.run(1)
    assert stage.ended == [0, 1]


def test_a_group_that_has_lost_a_worker_for_good_is_given_up_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, 4, num_shards=2)
    stage.run(3)
    stage.workers[2].state = "DEAD"
    stage.run(2)
    assert sorted(stage.ended) == [2, 3]
    assert stage.supervisor.fault() is None
    (fault,) = read_faults(stage.paths)
    assert fault.then == "given up: Ray does not restart it, with the workers that hold the other pieces of its base"


def test_a_worker_whose_group_has_not_come_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, 2, num_shards=2)
    worker = stage.workers[1]
    worker.fields |= {"is_open": False, "has_stepped": False}
    worker.refuse(GroupLost("process 1 of 2 has not found the first one"))
    stage.run(3)
    assert stage.killed[0] == ("kill", False)
    assert stage.supervisor.fault() is None
    worker.opened = (2, "")
    worker.die("the actor is dead because it was killed by `ray.kill`")
    stage.run(1)
    (fault,) = read_faults(stage.paths)
    assert (fault.cause, fault.then) == ("process 1 of 2 has not found the first one", "restarts in 1 s")

"""The Slurm script, with Slurm, Ray and the sweep replaced by programs that record how they are called."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "sweep.sbatch"

FAKES = {
    "scontrol": """
        if [[ $1 == show ]]; then printf '%s\\n' n1 n2 n3; else record "scontrol $*"; fi""",
    # Run the program on this machine, whichever node was asked for.
    "srun": """
        record "srun $*"
        while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && export NODE=${1#*=}; shift; done
        exec "$@" """,
    "ray": """
        case $1 in
            start)
                record "ray on $NODE: $*"; record "token on $NODE: $RAY_AUTH_MODE $RAY_AUTH_TOKEN"
                [[ -n ${NO_HEAD:-} ]] || exec sleep 60 ;;
            health-check) grep -q '^token on n1' "$CALLS" && [[ -z ${NO_HEAD:-} ]] ;;
        esac""",
    "python": """
        cat > "$CALLS.py"; record "python $*"; [[ -z ${MISSING_NODES:-} ]] || exit 1
        until (($(grep -c '^token on' "$CALLS") == 3)); do sleep 0.02; done""",
    # Run until a signal comes and a little longer, and count the signals; or end at once with $ENDS.
    "orchestrator": """
        record "orchestrator $*"; record "driver: $RAY_ADDRESS $RAY_AUTH_MODE $RAY_AUTH_TOKEN"
        [[ -z ${ENDS:-} ]] || exit "$ENDS"
        code=-1
        trap 'record "driver got TERM"; code=${INTERRUPTED:-143}' TERM
        record ready
        until ((code >= 0)); do sleep 0.02; done
        for _ in {1..40}; do sleep 0.02; done
        exit "$code" """,
}


class Job:
    """One start of the script by Slurm."""

    def __init__(self, folder: Path, **environment: str) -> None:
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        self._calls = folder / "calls"
        self._calls.write_text("")
        for name, body in FAKES.items():
            program = programs / name
            program.write_text('#!/bin/bash\nrecord() { echo "$*" >> "$CALLS"; }\n' + body + "\n")
            program.chmod(0o755)
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), "mine.yaml", "mine", "--set", "search.num_trials=3 4"],
            cwd=folder,
            env={
                "PATH": f"{programs}:/usr/bin:/bin",
                "CALLS": str(self._calls),
                "SLURM_JOB_ID": "12345",
                "SLURM_JOB_NODELIST": "n[1-3]",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def calls(self, beginning: str = "") -> list[str]:
        return [line for line in self._calls.read_text().splitlines() if line.startswith(beginning)]

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while "ready" not in self.calls():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, self.calls()
            time.sleep(0.02)

    def end(self) -> int:
        self.said, _ = self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(**environment: str) -> Job:
        jobs.append(Job(tmp_path, **environment))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)


def begin_sweep(folder: Path) -> None:
    (folder / "runs" / "mine").mkdir(parents=True)
    (folder / "runs" / "mine" / "sweep.json").write_text("{}")


def test_it_is_valid_shell() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_slurm_reads_its_options() -> None:
    """Slurm reads options only above the first command."""
    head = SCRIPT.read_text(encoding="utf-8").partition("\nset -uo")[0].splitlines()
    assert all(line.startswith("#") or not line for line in head)
    options = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH")}
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append", "--no-kill"} <= options


def test_the_first_start_runs_the_sweep_on_all_nodes(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start(ENDS="0")
    assert job.end() == 0
    assert sorted(job.calls("ray on")) == [
        "ray on n1: start --head --port=22345 --block",
        "ray on n2: start --address=n1:22345 --block",
        "ray on n3: start --address=n1:22345 --block",
    ]
    assert job.calls("orchestrator") == [
        f"orchestrator sweep mine.yaml --name mine --output {tmp_path}/runs --address auto --set search.num_trials=3 4"
    ]
    assert job.calls("python") == ["python - 3 300"]
    assert job.calls("scontrol") == []


def test_one_token_of_the_job_reaches_each_node_and_no_command_line(start: Callable[..., Job]) -> None:
    tokens = set()
    for _ in range(2):
        job = start(ENDS="0")
        job.end()
        lines = job.calls("token on") + job.calls("driver:")
        assert [line.split()[2] for line in sorted(lines)[1:]] == ["n1:", "n2:", "n3:"]
        assert all(line.split()[-2] == "token" for line in lines)
        (token,) = {line.split()[-1] for line in lines}
        assert len(token) == 64
        assert not any(token in call for call in job.calls("srun") + job.calls("ray") + job.calls("orchestrator"))
        assert token not in job.said
        tokens.add(token)
    assert len(tokens) == 2


def test_the_wait_for_nodes_is_valid_python(start: Callable[..., Job], tmp_path: Path) -> None:
    start(ENDS="0").end()
    compile((tmp_path / "calls.py").read_text(), "wait", "exec")


def test_a_requeued_job_resumes(start: Callable[..., Job], tmp_path: Path) -> None:
    begin_sweep(tmp_path)
    job = start(ENDS="0", SLURM_RESTART_COUNT="1", RESUME_OPTIONS="--trust-remote-code --trials 9")
    assert job.end() == 0
    assert job.calls("orchestrator") == [
        f"orchestrator resume mine --output {tmp_path}/runs --address auto --trust-remote-code --trials 9"
    ]


def test_a_job_that_was_requeued_before_its_sweep_began_begins_it(start: Callable[..., Job]) -> None:
    job = start(ENDS="0", SLURM_RESTART_COUNT="1")
    job.end()
    assert job.calls("orchestrator")[0].startswith("orchestrator sweep")


@pytest.mark.parametrize(("environment", "verb"), [({}, "sweep"), ({"RESUME": "1"}, "resume")])
def test_a_new_job_resumes_only_if_asked(
    environment: dict[str, str], verb: str, start: Callable[..., Job], tmp_path: Path
) -> None:
    """Without RESUME the sweep is refused, because its name is taken."""
    begin_sweep(tmp_path)
    job = start(ENDS="2", **environment)
    assert job.end() == 2
    assert job.calls("orchestrator")[0].startswith(f"orchestrator {verb}")


def test_the_signal_before_the_time_limit_requeues_the_job(start: Callable[..., Job]) -> None:
    job = start()
    job.wait_until_ready()
    job.process.send_signal(signal.SIGUSR1)  # Slurm signals the batch shell alone
    assert job.end() == 143
    assert job.calls("driver got") == ["driver got TERM"]
    assert job.calls("scontrol") == ["scontrol requeue 12345"]
    assert "it will resume the sweep" in job.said


@pytest.mark.parametrize(("code", "calls"), [("130", ["scontrol requeue 12345"]), ("0", []), ("1", [])])
def test_only_a_sweep_that_is_interrupted_at_the_time_limit_is_requeued(
    code: str, calls: list[str], start: Callable[..., Job]
) -> None:
    """The sweep may also have ended or failed at that moment."""
    job = start(INTERRUPTED=code)
    job.wait_until_ready()
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == int(code)
    assert job.calls("scontrol") == calls


@pytest.mark.parametrize("to_all", [False, True])
def test_the_driver_gets_sigterm_once(to_all: bool, start: Callable[..., Job]) -> None:
    """A second signal would stop it at once. Slurm signals all processes of the job, or the batch shell alone."""
    job = start()
    job.wait_until_ready()
    if to_all:
        os.killpg(job.process.pid, signal.SIGTERM)
    else:
        job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143
    assert job.calls("driver got") == ["driver got TERM"]
    assert job.calls("scontrol") == []


def test_a_driver_that_got_the_signal_itself_is_requeued(start: Callable[..., Job]) -> None:
    job = start(ENDS="138")
    assert job.end() == 138
    assert job.calls("scontrol") == ["scontrol requeue 12345"]


@pytest.mark.parametrize("code", ["1", "3", "69"])
def test_other_ends_are_not_requeued(code: str, start: Callable[..., Job]) -> None:
    job = start(ENDS=code)
    assert job.end() == int(code)
    assert job.calls("scontrol") == []


def test_a_head_that_does_not_start_is_told(start: Callable[..., Job]) -> None:
    job = start(NO_HEAD="1")
    assert job.end() == 1
    assert "node n1: the head of the Ray cluster did not start" in job.said
    assert job.calls("orchestrator") == []


def test_no_sweep_starts_before_all_nodes_have_joined(start: Callable[..., Job]) -> None:
    job = start(MISSING_NODES="1")
    assert job.end() == 1
    assert job.calls("orchestrator") == []


def test_arguments_are_required() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "mine.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")

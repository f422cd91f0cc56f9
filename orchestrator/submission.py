"""Submit a sweep to a Ray cluster as a job, which goes on when the submitting machine is switched off."""

import logging
import os
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.data.files import matching_files
from orchestrator.errors import ClusterError, RequestError
from orchestrator.spec import SweepSpec
from orchestrator.spec.optional_packages import require_package

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_MOST_BYTES = 200 * 2**20
"""Most bytes of data files that travel with a job. Ray takes at most 500 MiB, and keeps them in its head's memory."""
_STEADY_S = 30.0
"""Time after which a job counts as started: a wrong output or too few GPUs end it earlier."""
_LONGEST_WAIT_S = 120.0
_POLL_S = 0.5


def submit_sweep(
    spec: SweepSpec,
    name: str,
    output: str,
    address: str,
    options: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> str:
    """Submit a new sweep, with the experiment and those of its data files that are on this machine.

    Args:
        spec: the experiment, with all overrides applied.
        name: name of the sweep's folder.
        output: parent folder of sweeps on the cluster.
        address: HTTP address of the cluster's dashboard, such as http://HOST:8265.
        options: further options of `orchestrator sweep`.
        say: called with a line of text about what is being done.

    Returns:
        The id of the job, once it has run for some seconds, or still waits after two minutes.

    Raises:
        RequestError: the address or the output cannot be used, or the data files are too large to be sent.
        ClusterError: the cluster cannot be reached, refuses the job, or the job ended at once.
    """
    _require_on_cluster(output)
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as folder:
        document = spec.model_dump(mode="json")
        _send_data(document["data"], Path(folder))
        (Path(folder) / "experiment.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        command = ["sweep", "experiment.yaml", "--name", name, "--output", output, "--address", "auto", *options]
        return _submit(client, command, name, output, say, folder)


def submit_resume(
    name: str, output: str, address: str, options: Sequence[str] = (), say: Callable[[str], None] = print
) -> str:
    """Submit the resume of a sweep; arguments, result and errors are those of `submit_sweep`."""
    _require_on_cluster(output)
    command = ["resume", name, "--output", output, "--address", "auto", *options]
    return _submit(_connect(address), command, name, output, say)


def _require_on_cluster(output: str) -> None:
    """Raise RequestError for a relative output, which would lie in the job's own folder and end with the cluster."""
    if "://" not in output and not Path(output).is_absolute():
        raise RequestError(
            f"output {output}: --submit needs an absolute path, of a folder that all nodes of the cluster share",
            "Give --output /shared/runs, for example.",
        )


def _connect(address: str) -> "JobSubmissionClient":
    if not address.startswith(("http://", "https://")):
        raise RequestError(
            f"--submit {address}: must be the address of the cluster's dashboard, such as http://HOST:8265",
            "From outside, use a tunnel: `ray dashboard cluster.yaml`, or `ssh -L 8265:127.0.0.1:8265 HEAD`.",
        )
    require_package("aiohttp", "--submit", "submit")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it writes a line for each upload
    try:
        with _only_address(address):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(
            f"Ray at {address} refuses this machine: {error.args[0].splitlines()[0]}",
            "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token.",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"Ray's job server at {address} cannot be reached: {error}",
            "It runs on the head node, where ray[default] is installed; its port is that of the dashboard (8265).",
        ) from error


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Keep Ray from using RAY_ADDRESS instead (`get_address_for_submission_client` in ray/dashboard/utils.py)."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        yield
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _send_data(data: dict[str, Any], folder: Path) -> None:
    """Copy data files of this machine into `folder`, and write the paths of the copies into the section `data`.

    A path that does not exist here is left as it is: it may be one on the cluster.

    Raises:
        RequestError: the files are too large.
    """
    for part, section in {"train": data, "held_out": data["held_out"], "test": data["test"]}.items():
        if section is None:
            continue
        section["source"] = _copied(section["source"], folder, part)
        for i, each in enumerate(section["mix"] or []):
            each["source"] = _copied(each["source"], folder, f"{part}-{i}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > _MOST_BYTES:
        raise RequestError(
            f"data: the files on this machine have {size / 2**20:,.0f} MiB; a job takes at most {_MOST_BYTES >> 20}",
            "Copy them to the cluster's shared storage, and give their path there as data.source.",
        )


def _copied(source: str | None, folder: Path, part: str) -> str | None:
    """Copy a file, a folder or the files of a glob to `folder`/`part`; return the path, relative to `folder`."""
    if source is None or not Path(source).is_absolute():
        return source
    if Path(source).exists():
        target = folder / part / Path(source).name
        target.parent.mkdir()
        copy = shutil.copytree if Path(source).is_dir() else shutil.copyfile
        copy(source, target)
        return f"./{part}/{target.name}"
    matched = matching_files(Path(source))
    if not matched:
        return source
    (folder / part).mkdir()
    for i, file in enumerate(matched):
        shutil.copyfile(file, folder / part / f"{i:05d}-{file.name}")
    return f"./{part}/*{Path(source).suffix}"


def _submit(
    client: "JobSubmissionClient",
    command: Sequence[str],
    name: str,
    output: str,
    say: Callable[[str], None],
    folder: str | None = None,
) -> str:
    """Submit `orchestrator` with the arguments `command`, and wait until it runs."""
    try:
        job_id: str = client.submit_job(
            entrypoint=shlex.join(["orchestrator", *command]),
            submission_id=f"{name}-{uuid.uuid4().hex[:8]}",
            runtime_env={} if folder is None else {"working_dir": folder},
            metadata={"sweep": name, "output": output},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"the cluster does not take the job: {error}") from error
    say(f"submitted as job {job_id}; waiting until it runs")
    _await_start(client, job_id, say)
    return job_id


def _await_start(client: "JobSubmissionClient", job_id: str, say: Callable[[str], None]) -> None:
    """Pass the job's output to `say` until it has run for `_STEADY_S` or has succeeded, or for `_LONGEST_WAIT_S`.

    Raises:
        ClusterError: the job has ended before, or the connection broke.
    """
    begun: float | None = None
    give_up = time.monotonic() + _LONGEST_WAIT_S
    num_shown = 0
    while time.monotonic() < give_up:
        try:
            info = client.get_job_info(job_id)
            log = client.get_job_logs(job_id)
        except (OSError, RuntimeError) as error:
            raise ClusterError(
                f"the connection broke after job {job_id} was submitted: {error}",
                f"It goes on. See `ray job status {job_id}`.",
            ) from error
        status = str(info.status)
        lines = log.splitlines()
        for line in lines[num_shown:]:
            say(f"  | {line}")
        num_shown = len(lines)
        if status == "STOPPED":
            raise ClusterError(f"job {job_id} was stopped")
        if status == "FAILED":
            reason = f"with exit code {info.driver_exit_code}" if info.driver_exit_code else f"early: {info.message}"
            raise ClusterError(f"job {job_id} ended {reason}", "Its output is above.")
        if status == "RUNNING":
            begun = begun or time.monotonic()
        if status == "SUCCEEDED" or (begun and time.monotonic() - begun >= _STEADY_S):
            return
        time.sleep(_POLL_S)

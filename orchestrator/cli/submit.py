"""Commands that are sent to a cluster instead of being run here: sweep --submit and resume --submit."""

import shlex
from collections.abc import Sequence

from orchestrator.errors import RequestError
from orchestrator.record.new_sweep import chosen_name
from orchestrator.spec import SweepSpec
from orchestrator.submission import submit_resume, submit_sweep


def submitted_sweep(
    spec: SweepSpec,
    file: str,
    name: str | None,
    output: str | None,
    warm_from: Sequence[str],
    address: str | None,
    url: str,
) -> None:
    """Submit a new sweep, and print what can be done with it. Arguments are those of the command."""
    _refuse_address(address)
    name, output = chosen_name(spec, file, name), output or spec.output.folder
    options = [part for each in warm_from for part in ("--warm-from", each)]
    _say(submit_sweep(spec, name, output, url, options), name, output, url)


def submitted_resume(
    name: str,
    output: str,
    trials: int | None,
    budget: Sequence[str],
    trust: bool,
    trust_state: bool,
    address: str | None,
    url: str,
) -> None:
    """Submit the resume of a sweep, and print what can be done with it. Arguments are those of the command."""
    _refuse_address(address)
    options = [] if trials is None else ["--trials", str(trials)]
    options += [part for each in budget for part in ("--budget", each)]
    options += ["--trust-remote-code"] if trust else []
    options += ["--trust-state"] if trust_state else []
    _say(submit_resume(name, output, url, options), name, output, url)


def _refuse_address(address: str | None) -> None:
    if address is not None:
        raise RequestError("--address and --submit exclude each other", "A submitted sweep runs on its job's cluster.")


def _say(job_id: str, name: str, output: str, url: str) -> None:
    """Print the commands that follow, stop and resume a submitted sweep."""
    place = "" if "://" in output else "    # on a machine that has this folder"
    print(
        f"{name} goes on on the cluster, also without this machine.\n"
        f"  log:     ray job logs --address {url} --follow {job_id}\n"
        f"  stop:    ray job stop --address {url} {job_id}\n"
        f"  resume:  orchestrator resume {name} --output {output} --submit {url}\n"
        f"  state:   orchestrator status {shlex.quote(f'{output}/{name}')}{place}"
    )

"""The command that job schedulers start: it begins a sweep once, and resumes it after that."""

import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "deploy" / "sweep-or-resume"


def call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with a program `orchestrator` that prints its arguments and its process, and ends with code 7."""
    fake = folder / "bin" / "orchestrator"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/bash\nprintf "[%s]" "$@"; echo " $$"; exit 7\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:/usr/bin:/bin"
    return subprocess.run(
        [str(PROGRAM), *arguments], env={"PATH": path, **environment}, capture_output=True, text=True, cwd=folder
    )


def test_the_first_call_begins_the_sweep(tmp_path: Path) -> None:
    done = call(tmp_path, "mine.yaml", "mine", "runs", "--set", "a=1 2")
    expected = "[sweep][mine.yaml][--name][mine][--output][runs][--address][auto][--set][a=1 2] "
    assert done.stdout.startswith(expected)
    assert done.returncode == 7


def test_later_calls_resume_it(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "sweep.json").write_text("{}")
    done = call(tmp_path, "mine.yaml", "mine", "runs", "--set", "a=1", RESUME_OPTIONS="--trust-remote-code --trials 9")
    expected = "[resume][mine][--output][runs][--address][auto][--trust-remote-code][--trials][9] "
    assert done.stdout.startswith(expected)


@pytest.mark.parametrize(("status", "verb"), [(0, "resume"), (2, "sweep")])
def test_a_sweep_in_an_object_store_is_looked_up_there(status: int, verb: str, tmp_path: Path) -> None:
    call(tmp_path, "mine.yaml")  # makes the program
    fake = tmp_path / "bin" / "orchestrator"
    fake.write_text(f'#!/bin/bash\nprintf "[%s]" "$@"\n[[ $1 != status ]] || exit {status}\n')
    done = subprocess.run(
        [str(PROGRAM), "mine.yaml", "mine", "s3://b/runs"],
        env={"PATH": f"{fake.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"[{verb}][m"), done.stdout
    assert "[--output][s3://b/runs]" in done.stdout


@pytest.mark.parametrize(("address", "options"), [("none", ""), ("head:6379", "[--address][head:6379]")])
def test_the_address_is_given_by_the_environment(address: str, options: str, tmp_path: Path) -> None:
    done = call(tmp_path, "mine.yaml", "mine", "runs", ADDRESS=address)
    assert done.stdout.startswith(f"[sweep][mine.yaml][--name][mine][--output][runs]{options} ")


def test_the_sweep_takes_the_place_of_the_shell(tmp_path: Path) -> None:
    """A signal to the started process must reach the sweep."""
    with subprocess.Popen(["bash", "-c", f'echo $$; exec "{PROGRAM}" m.yaml m runs'], **pipes(tmp_path)) as process:
        shell, program = process.communicate()[0].splitlines()
    assert program.split()[-1] == shell


def pipes(folder: Path) -> dict[str, object]:
    call(folder, "m.yaml", "m", "runs")  # makes the program
    return {"env": {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}, "stdout": subprocess.PIPE, "text": True, "cwd": folder}


def test_arguments_are_required(tmp_path: Path) -> None:
    done = call(tmp_path, "mine.yaml", "mine")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sweep-or-resume")

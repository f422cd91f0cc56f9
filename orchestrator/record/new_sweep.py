"""Claim the folder of a new sweep, and describe the sweep before its first trial starts."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

from orchestrator.errors import RequestError
from orchestrator.record.models import BadRows, ExperimentSource, PriorSweep, SourceRows, SweepInfo
from orchestrator.record.paths import SweepPaths
from orchestrator.record.versions import installed_versions
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import NAME_PATTERN

_LONGEST_NAME = 80
"""Characters of a file's name that a default name has; the time follows."""


@contextmanager
def claim_folder(spec: SweepSpec, source: str, name: str | None, output: str | None) -> Iterator[SweepPaths]:
    """Make the folder of a new sweep. No other process can then have it: `mkdir` succeeds once.

    The path is `--output`/`--name`, or the experiment's output section, or the file's name and the time. A name made
    of the time gets a number if several sweeps begin in the same second. If no sweep has begun in the folder when the
    block ends, the folder is removed again, with the parents that were made for it.

    Args:
        spec: the experiment.
        source: name of its file, for the default name.
        name: overrides `output.name`.
        output: overrides `output.folder`.

    Raises:
        RequestError: the folder already exists, cannot be made, or is a URI.
    """
    folder = output or spec.output.folder
    if "://" in folder:
        raise RequestError(
            f"output {folder}: must be a folder, not a URI", "Mount the storage on every node and give the mount."
        )
    _require_valid(name)
    parent = Path(folder).resolve()
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RequestError(f"output {folder}: {existing} is not a writable folder; give another one")
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    chosen = name or spec.output.name
    try:
        if chosen is not None:
            root = parent / chosen
            if not _make(root):
                raise already_exists(root)
        else:
            dated = _dated_name(source)
            candidates = chain([dated], (f"{dated}-{number}" for number in count(2)))
            root = next(parent / candidate for candidate in candidates if _make(parent / candidate))
    except OSError as error:
        raise RequestError(f"output {folder}: cannot be written: {error}", "Give another --output.") from error
    paths = SweepPaths(root)
    try:
        yield paths
    finally:
        if not paths.sweep.is_file():
            for path in (root, *made):
                with suppress(OSError):  # another sweep may have begun in the parent
                    path.rmdir()


def chosen_name(spec: SweepSpec, source: str, name: str | None) -> str:
    """Return the name of a new sweep whose folder is made elsewhere; the arguments are those of `claim_folder`.

    Raises:
        RequestError: `name` cannot be the name of a folder.
    """
    _require_valid(name)
    return name or spec.output.name or _dated_name(source)


def _require_valid(name: str | None) -> None:
    if name is not None and not re.match(NAME_PATTERN, name):
        raise RequestError(
            f"--name {name!r}: must be letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )


def _dated_name(source: str) -> str:
    return f"{_name_of(source)}-{datetime.now():%m%d-%H%M%S}"


def _name_of(source: str) -> str:
    """Return the name of a file as a name that `--name` takes: other characters become a hyphen."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._")[:_LONGEST_NAME] or "sweep"


def _make(folder: Path) -> bool:
    """Make a folder and its parents; return False if the name is taken."""
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            return False
        except FileNotFoundError:  # another process has just removed the parent, because it began no sweep in it
            continue
        return True


def already_exists(root: Path) -> RequestError:
    """Return the error for a folder that cannot be used for a new sweep."""
    if SweepPaths(root).sweep.is_file():
        remedy = f"`orchestrator resume {root}` continues that sweep; --name gives the new one another name."
    elif root.is_dir() and not any(root.iterdir()):
        remedy = (
            "It is empty: another process is starting a sweep there, or was killed while it did. "
            "Give another --name, or remove the folder."
        )
    else:
        remedy = "It holds no sweep. Give another --name."
    return RequestError(f"{root}: already exists", remedy)


def describe_sweep(
    spec: SweepSpec,
    paths: SweepPaths,
    source: ExperimentSource | None,
    *,
    is_single_trial: bool,
    data_fingerprint: str,
    num_train: int,
    num_held_out: int,
    num_test: int,
    num_truncated: int,
    num_dropped: int,
    num_shared: int,
    num_sequences: int | None,
    sources: list[SourceRows],
    bad_rows: list[BadRows],
    prior_sweeps: Sequence[PriorSweep] = (),
) -> SweepInfo:
    """Return the sweep's record, with the versions and the commit it runs on."""
    return SweepInfo(
        name=paths.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=spec,
        source=source,
        is_single_trial=is_single_trial,
        data_fingerprint=data_fingerprint,
        num_train=num_train,
        num_held_out=num_held_out,
        num_test=num_test,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_shared=num_shared,
        num_sequences=num_sequences,
        sources=sources,
        bad_rows=bad_rows,
        prior_sweeps=[*prior_sweeps],
        versions=installed_versions(),
        git_commit=_git_commit(),
    )


def source_of(file: Path, overrides: Sequence[str]) -> ExperimentSource:
    """Describe where an experiment is read from in this process."""
    return ExperimentSource(file=str(file.resolve()), overrides=[*overrides], folder=str(Path.cwd()))


def _git_commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or not in a checkout
        return None

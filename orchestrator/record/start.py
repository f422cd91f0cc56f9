"""What is known of a sweep before its first trial starts."""

import os
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.errors import RequestError
from orchestrator.record.models import BadRows, ExperimentSource, SourceRows, SweepInfo
from orchestrator.record.paths import SweepPaths
from orchestrator.record.versions import installed_versions
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import NAME_PATTERN


def choose_folder(spec: SweepSpec, source: str, name: str | None, output: str | None) -> SweepPaths:
    """Where a new sweep goes: `--output`/`--name`, else the experiment's output section, else file name and time.

    Args:
        spec: the experiment.
        source: name of its file, for the default name.
        name: overrides `output.name`.
        output: overrides `output.folder`.

    Raises:
        RequestError: the folder exists already, cannot be made, or is a URI.
    """
    folder = output or spec.output.folder
    if "://" in folder:
        raise RequestError(
            f"output {folder}: must be a folder, not a URI", "Mount the storage on every node and give the mount."
        )
    if name is not None and not re.match(NAME_PATTERN, name):
        raise RequestError(
            f"--name {name!r}: must be letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )
    chosen = name or spec.output.name or f"{Path(source).stem}-{datetime.now():%m%d-%H%M%S}"
    paths = SweepPaths((Path(folder) / chosen).resolve())
    if paths.root.exists():
        raise RequestError(
            f"{paths.root}: already exists",
            f"`orchestrator resume {paths.root}` goes on with it; --name gives this one another name.",
        )
    standing = next(path for path in paths.root.parents if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise RequestError(f"output {folder}: {standing} is not a folder that can be written to")
    return paths


def describe_sweep(
    spec: SweepSpec,
    paths: SweepPaths,
    source: ExperimentSource | None,
    *,
    is_single_trial: bool,
    data_fingerprint: str,
    num_train: int,
    num_held_out: int,
    num_truncated: int,
    num_dropped: int,
    num_shared: int,
    num_sequences: int | None,
    sources: list[SourceRows],
    bad_rows: list[BadRows],
) -> SweepInfo:
    """The sweep's record, with the versions and the commit it runs on."""
    return SweepInfo(
        name=paths.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=spec,
        source=source,
        is_single_trial=is_single_trial,
        data_fingerprint=data_fingerprint,
        num_train=num_train,
        num_held_out=num_held_out,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_shared=num_shared,
        num_sequences=num_sequences,
        sources=sources,
        bad_rows=bad_rows,
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

"""The library of priors: a file in which a team keeps the best values of its sweeps, by base and data.

It is a YAML file, so that it can lie in a repository and be reviewed. `search.prior: auto` reads it, and
`orchestrator priors` adds, lists and removes rows.
"""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from orchestrator.documents import MAX_YAML_BYTES, load_yaml, read_text
from orchestrator.errors import RequestError
from orchestrator.priors.kinship import Kin
from orchestrator.rate_prior import RANK, begin_at, nearest
from orchestrator.record import SweepRecord, TrialResult, TrialState
from orchestrator.record.files import write_atomic
from orchestrator.spec import SweepSpec
from orchestrator.spec.search import RATE
from orchestrator.user_folders import config_folder
from orchestrator.words import counted

VARIABLE: Final = "ORCHESTRATOR_PRIORS"
"""Environment variable with the path of the library."""
AUTO: Final = "auto"
"""Value of `search.prior` for the library of `library_path`."""
PATIENCE_S: Final = 30.0
"""Seconds to wait for another process that changes the library."""
NEAR: Final = 0.02
"""Trials whose result is worse than the best by at most this share are about as good; their rates give the spread."""


class PriorRow(BaseModel):
    """The best values of one sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    """model_type of the base."""
    width: PositiveInt
    """Size of the base's hidden states."""
    data: str
    """Kind of the data."""
    rate: float = Field(gt=0, allow_inf_nan=False)
    """Learning rate of the best trial."""
    rank: PositiveInt
    """Rank of the best trial."""
    spread: float = Field(ge=1, allow_inf_nan=False)
    """Factor by which rates of about as good trials differ from each other: their geometric standard deviation."""
    trials: PositiveInt
    """Finished trials of the sweep."""
    sweep: str
    """Name of the sweep."""
    date: str
    """Day on which it began."""

    @property
    def kin(self) -> Kin:
        """The base and the data of the row."""
        return Kin(self.family, self.width, self.data)


def library_path(written: str | None = None) -> Path:
    """Return the path of the library: the one that is given, else that of the environment, else the user's own."""
    if found := written or os.environ.get(VARIABLE):
        return Path(found).expanduser()
    return config_folder() / "priors.yaml"


def read_library(path: Path) -> list[PriorRow]:
    """Return the rows of a library; none if there is no such file.

    Raises:
        RequestError: the file cannot be read, or is no list of rows.
    """
    try:
        document = load_yaml(read_text(path, MAX_YAML_BYTES)) or []
        if not isinstance(document, list):
            raise ValueError("it must be a list of rows")
        return [PriorRow.model_validate(row) for row in document]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, yaml.YAMLError) as error:  # pydantic's ValidationError is a ValueError
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            why = str(error).splitlines()[0]
        raise RequestError(
            f"{path}: is not a library of priors: {why}",
            "Correct the file; or move it away, and write it anew with `orchestrator priors add`.",
        ) from error


def write_library(path: Path, rows: Sequence[PriorRow]) -> None:
    """Replace a library in one step. JSON is YAML too, but one row a block reads better in a review.

    Raises:
        RequestError: the file cannot be written.
    """
    text = yaml.safe_dump([row.model_dump() for row in rows], sort_keys=False)
    try:
        write_atomic(path.resolve(), text)  # replaces the file that a symbolic link names, not the link
    except OSError as error:
        raise _cannot_be_written(path, error) from error


def change_library(path: Path, change: Callable[[list[PriorRow]], list[PriorRow]]) -> None:
    """Replace the rows of a library by those that `change` makes of them. Processes change it one after another.

    Raises:
        RequestError: the file is no library or cannot be written, or another process does not finish its change.
    """
    file = path.resolve()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=PATIENCE_S, fallback_to_soft=False)
        lock.acquire()
    except Timeout:
        raise RequestError(f"{path}: another process is changing this library", "Try again later.") from None
    except OSError as error:
        raise _cannot_be_written(path, error) from error
    try:
        write_library(path, change(read_library(path)))
    finally:
        lock.release()


def _cannot_be_written(path: Path, error: OSError) -> RequestError:
    return RequestError(f"{path}: cannot be written: {error}", f"Give --file, or set {VARIABLE}.")


def row_of(record: SweepRecord) -> PriorRow:
    """Return the row of a sweep.

    Raises:
        RequestError: the family of its base is not known, or no trial has run to its end.
    """
    kin = Kin.of(record.info.spec)
    if kin is None:
        raise RequestError(
            f"{record.paths.root}: the family of its base is not known, as config.json is not here or does not give it",
            f"Fetch the base first: {record.info.spec.base.model}",
        )
    trials = [
        trial
        for trial in record.finished()
        if trial.state == TrialState.COMPLETE and trial.best and math.isfinite(trial.best.value)
    ]
    if not trials:
        raise RequestError(f"{record.paths.root}: no trial has run to its end", "Add it once one has.")
    best = trials[0]
    rates = [math.log(trial.config.training.learning_rate) for trial in trials if _is_near(trial, best)]
    return PriorRow(
        family=kin.family,
        width=kin.width,
        data=kin.data,
        rate=best.config.training.learning_rate,
        rank=best.config.lora.rank,
        spread=float(f"{math.exp(statistics.pstdev(rates)):.3g}"),
        trials=len(trials),
        sweep=record.info.name,
        date=record.info.created[:10],
    )


def _is_near(trial: TrialResult, best: TrialResult) -> bool:
    assert trial.best is not None
    assert best.best is not None
    return abs(trial.best.value - best.best.value) <= NEAR * abs(best.best.value)


def add_rows(rows: Sequence[PriorRow], new: Sequence[PriorRow]) -> list[PriorRow]:
    """Return rows with new ones at the end. A sweep that is added again, or given twice, replaces its row."""
    latest = {(row.sweep, row.date): row for row in new}
    return [*(row for row in rows if (row.sweep, row.date) not in latest), *latest.values()]


def remove_rows(rows: Sequence[PriorRow], sweeps: Sequence[str]) -> list[PriorRow]:
    """Return rows without those of some sweeps.

    Raises:
        RequestError: a sweep has no row.
    """
    names = {row.sweep for row in rows}
    if missing := [sweep for sweep in sweeps if sweep not in names]:
        raise RequestError(f"{missing[0]}: has no row in the library", f"Rows: {', '.join(sorted(names)) or 'none'}.")
    return [row for row in rows if row.sweep not in sweeps]


def with_library(spec: SweepSpec) -> tuple[SweepSpec, list[str]]:
    """Replace `search.prior: auto` or a path by the values of the library's rows that fit the experiment.

    The rate is the geometric mean of the rows' rates, weighted by their trials. The rank is that of the row with the
    most trials.

    Returns:
        The experiment, and what to tell the user.

    Raises:
        RequestError: the path that is given has no file, or the file is no library.
    """
    written = spec.search.prior
    if not isinstance(written, str):
        return spec, []
    path = library_path(None if written == AUTO else written)
    if written != AUTO and not path.is_file():
        raise RequestError(
            f"search.prior {written}: there is no such file",
            f"Write it with: orchestrator priors add SWEEP --file {written}; or set search.prior: auto.",
        )
    kin = Kin.of(spec)
    rows = [row for row in read_library(path) if kin is not None and row.kin.difference(kin) is None]
    found = begin_at(spec, _prior_of(spec, rows) if rows else {})
    if not rows:
        return found, [f"search.prior: no row of {path} fits {kin or 'this base'}; the search begins as without it"]
    sweeps = ", ".join(row.sweep for row in rows)
    return found, [f"search.prior: the search begins at {counted(len(rows), 'row')} of {path} ({sweeps})"]


def _prior_of(spec: SweepSpec, rows: Sequence[PriorRow]) -> dict[str, float]:
    weights = [row.trials for row in rows]
    rate = math.exp(sum(math.log(row.rate) * row.trials for row in rows) / sum(weights))
    rank = max(rows, key=lambda row: row.trials).rank
    space = spec.search.space
    return {path: nearest(space[path], value) for path, value in ((RATE, rate), (RANK, rank)) if path in space}

"""Copies of sweeps that were pulled from an object store. They hold all records, but only the adapters asked for."""

from pathlib import Path

from orchestrator.errors import RecordError
from orchestrator.record.checked import read_record, write_record
from orchestrator.record.models import Record
from orchestrator.record.paths import SweepPaths


class Pulled(Record):
    """The content of `.pulled.json`."""

    uri: str
    """Where the sweep lies."""


class NotPulledError(RecordError):
    """Something was left out when a sweep was pulled: it is not damaged."""


def read_pulled(paths: SweepPaths) -> Pulled | None:
    """Return where a sweep was pulled from; None for a sweep that was not pulled.

    Raises:
        DamagedError: the record is damaged.
    """
    try:
        return read_record(Pulled, paths.pulled)
    except FileNotFoundError:
        return None


def write_pulled(paths: SweepPaths, uri: str) -> None:
    """Note in a folder where its sweep is pulled from."""
    write_record(paths.pulled, Pulled(uri=uri))


def require_pulled(paths: SweepPaths, file: Path, what: str, option: str) -> None:
    """Check that a part of a pulled sweep is here. Do nothing for a sweep that was not pulled.

    Args:
        paths: the sweep.
        file: the file of this part that is pulled last.
        what: the part and its verb, for the message: `its rows were`.
        option: the option of `orchestrator pull` that fetches it.

    Raises:
        NotPulledError: it was left out.
    """
    pulled = None if file.is_file() else read_pulled(paths)
    if pulled is not None:
        raise NotPulledError(
            f"{what} not pulled from {pulled.uri}",
            f"Fetch it with: orchestrator pull {pulled.uri} {option} --to {paths.root}",
        )

"""Where a sweep in an object store lies, and which folders of this machine belong to it."""

import os
from pathlib import Path

from orchestrator.errors import RequestError
from orchestrator.spec.output_uri import is_uri, uri_fault
from orchestrator.user_folders import cache_folder

CACHE_VARIABLE = "ORCHESTRATOR_CACHE"
"""Environment variable that names the folder for copies of sweeps. On a cluster, all nodes must share it."""


def find_uri(sweep: str | Path, output: str | Path) -> str | None:
    """Return the URI of a sweep that is named by its URI, or by its name together with an output that is one.

    Raises:
        RequestError: the URI is none of a supported store.
    """
    if is_uri(str(sweep)):
        return checked_uri(str(sweep))
    return checked_uri(f"{str(output).rstrip('/')}/{sweep}") if is_uri(str(output)) else None


def checked_uri(uri: str) -> str:
    """Return a URI without a slash at its end.

    Raises:
        RequestError: it is none of a supported store.
    """
    if fault := uri_fault(uri):
        shown = f"{uri.partition('://')[0]}://..." if "@" in uri else uri
        raise RequestError(f"{shown}: {fault}")
    return uri.rstrip("/")


def driver_copy(uri: str) -> Path:
    """Return the folder into which a driver on this machine writes the sweep or the output at a URI."""
    return _drivers() / uri.replace("://", "/")


def pulled_copy(uri: str) -> Path:
    """Return the folder into which commands on this machine pull the sweep or the output at a URI."""
    return _cache() / "pulled" / uri.replace("://", "/")


def uri_of(folder: Path) -> str | None:
    """Return the URI of the sweep whose driver writes into a folder; None for any other folder."""
    drivers = _drivers()
    if not folder.resolve().is_relative_to(drivers):
        return None
    scheme, *rest = folder.resolve().relative_to(drivers).parts
    return f"{scheme}://{'/'.join(rest)}"


def _drivers() -> Path:
    return _cache() / "drivers"


def _cache() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    return (Path(named).expanduser() if named else cache_folder()).resolve()

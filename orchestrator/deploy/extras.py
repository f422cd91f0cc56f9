"""Packages that only some need."""

from importlib import import_module

from orchestrator.errors import RequestError


def require_package(name: str, needed_by: str, extra: str) -> None:
    """Find out before the work begins whether a package is there.

    Args:
        name: as it is imported.
        needed_by: what the person asked for.
        extra: of this project, which installs it.

    Raises:
        RequestError: it is missing.
    """
    try:
        import_module(name)
    except ImportError as error:
        raise RequestError(
            f"{needed_by} needs the package {name}: {error}", f"pip install 'qlora-orchestrator[{extra}]'"
        ) from error

"""Packages that only some need: each belongs to an extra of this project, and is looked for before the work begins."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from orchestrator.spec.sweep_spec import SweepSpec


def require_extras(spec: "SweepSpec") -> None:
    """Look for all that an experiment asks for beyond this package's own installation. A record of one needs none.

    Raises:
        RequestError: a package is missing.
    """
    if spec.tracking.mlflow:
        require_package("mlflow", "tracking.mlflow", "mlflow")
    if spec.tracking.trackio:
        require_package("trackio", "tracking.trackio", "trackio")


def require_package(name: str, needed_by: str, extra: str) -> None:
    """Look whether a package is there; nothing of it is imported.

    Args:
        name: as it is imported.
        needed_by: what the person asked for.
        extra: of this project, which installs it.

    Raises:
        RequestError: it is missing.
    """
    if find_spec(name) is None:
        raise missing_package(name, needed_by, extra)


def missing_package(name: str, needed_by: str, extra: str) -> RequestError:
    """What is said of a package that is not installed, or not whole; arguments as above."""
    return RequestError(
        f"{needed_by} needs the package {name}, which is not installed", f"pip install 'qlora-orchestrator[{extra}]'"
    )

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
    search, scheduler = spec.search, spec.scheduler
    if search.algorithm == "hyperopt":
        require_package("hyperopt", "search.algorithm hyperopt", "hyperopt")
    if search.algorithm == "bohb":
        for package in ("hpbandster", "ConfigSpace"):
            require_package(package, "search.algorithm bohb", "bohb", "one of its packages needs a C compiler")
    if search.sampler == "cmaes":
        require_package("cmaes", "search.sampler cmaes", "cmaes")
    if scheduler.kind == "pb2":
        require_package("sklearn", "scheduler.kind pb2", "pb2")
    if spec.tracking.mlflow:
        require_package("mlflow", "tracking.mlflow", "mlflow")
    if spec.tracking.trackio:
        require_package("trackio", "tracking.trackio", "trackio")


def require_package(name: str, needed_by: str, extra: str, hint: str = "") -> None:
    """Look whether a package is there; nothing of it is imported.

    Args:
        name: as it is imported.
        needed_by: what the person asked for.
        extra: of this project, which installs it.
        hint: on how that may fail.

    Raises:
        RequestError: it is missing.
    """
    if find_spec(name) is None:
        raise missing_package(name, needed_by, extra, hint)


def missing_package(name: str, needed_by: str, extra: str, hint: str = "") -> RequestError:
    """What is said of a package that is not installed, or not whole; arguments as above."""
    remedy = f"pip install 'qlora-orchestrator[{extra}]'"
    return RequestError(
        f"{needed_by} needs the package {name}, which is not installed", f"{remedy} ({hint})" if hint else remedy
    )

"""Optional packages: each belongs to an extra of this project, and is looked for before the work begins."""

from importlib.util import find_spec

from orchestrator.errors import RequestError
from orchestrator.spec.sweep_spec import SweepSpec


def require_extras(spec: SweepSpec) -> None:
    """Look for all packages that an experiment needs beyond this project's own dependencies.

    Reading the record of an experiment needs none of them.

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
    if search.stop.gain is not None:
        require_package("scipy", "search.stop.gain", "pb2")
    if scheduler.kind == "pb2":
        require_package("sklearn", "scheduler.kind pb2", "pb2")
    if spec.tracking.mlflow:
        require_package("mlflow", "tracking.mlflow", "mlflow")
    if spec.tracking.trackio:
        require_package("trackio", "tracking.trackio", "trackio")


def require_package(name: str, needed_by: str, extra: str, hint: str = "") -> None:
    """Check that a package is installed, without importing it.

    Args:
        name: the package's import name.
        needed_by: what the person asked for.
        extra: the extra of this project that installs it.
        hint: why the installation may fail.

    Raises:
        RequestError: the package is missing.
    """
    if find_spec(name) is None:
        raise missing_package(name, needed_by, extra, hint)


def missing_package(name: str, needed_by: str, extra: str, hint: str = "") -> RequestError:
    """Return the error for a package that is not installed, or not complete. Arguments as in `require_package`."""
    remedy = f"pip install 'qlora-orchestrator[{extra}]'"
    return RequestError(
        f"{needed_by} needs the package {name}, which is not installed", f"{remedy} ({hint})" if hint else remedy
    )

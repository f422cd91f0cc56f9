"""Packages that only some experiments need. Looked for, not imported: this room knows no library."""

from importlib.util import find_spec

from orchestrator.errors import SpecError
from orchestrator.spec.sweep_spec import SweepSpec


def require_extras(spec: SweepSpec) -> None:
    """See that what the search needs is installed.

    Raises:
        SpecError: it is not; the remedy installs it.
    """
    search, scheduler = spec.search, spec.scheduler
    needed: list[tuple[str, str, tuple[str, ...]]] = []
    if search.algorithm == "hyperopt":
        needed.append(("search.algorithm hyperopt", "hyperopt", ("hyperopt",)))
    if search.algorithm == "bohb":
        needed.append(("search.algorithm bohb", "bohb", ("hpbandster", "ConfigSpace")))
    if search.sampler == "cmaes":
        needed.append(("search.sampler cmaes", "cmaes", ("cmaes",)))
    if scheduler.kind == "pb2":
        needed.append(("scheduler.kind pb2", "pb2", ("sklearn",)))
    for field, extra, packages in needed:
        for package in packages:
            if find_spec(package) is None:
                raise SpecError(
                    f"{field} needs the package {package}, which is not installed",
                    f"pip install 'qlora-orchestrator[{extra}]'"
                    + (" (one of its packages is compiled: it needs a C compiler)" if extra == "bohb" else ""),
                )

"""Versions of the packages that results depend on."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "ray",
    "qlora-orchestrator",
)


@cache
def installed_versions() -> dict[str, str]:
    """Return package -> version in this process. Cached, because each lookup takes a millisecond."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found

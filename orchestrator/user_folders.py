"""Folders of the user, outside every sweep, by the XDG Base Directory Specification."""

import os
from pathlib import Path


def config_folder() -> Path:
    """Return the folder for what the user has set: the key of sweeps, the library of priors."""
    return _folder("XDG_CONFIG_HOME", "~/.config")


def cache_folder() -> Path:
    """Return the folder for copies that can be made again."""
    return _folder("XDG_CACHE_HOME", "~/.cache")


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or default).expanduser() / "orchestrator"

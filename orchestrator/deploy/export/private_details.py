"""Notes on details of a bundle that are valid only on this machine, for users who publish it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import Facts
from orchestrator.adapters.peft_config import CONFIG, read_peft_config
from orchestrator.base_folder import hub_id


def base_notes(folder: Path, facts: Facts) -> list[str]:
    """List what other users will lack when they load this adapter on its base. Empty for other formats.

    Args:
        folder: the bundle.
        facts: the facts of its manifest, or those to be written.
    """
    if facts.format != "adapter":
        return []
    config = read_peft_config(folder)
    model, named = str(facts.base["model"]), config.get("base_model_name_or_path")
    if hub_id(model) is None:
        return [
            f"the base is not on the hub: {CONFIG} names {named}, a folder of this machine; other users must load "
            "their own copy of the base (`PeftModel.from_pretrained(base, ...)`)"
        ]
    if named != model:
        return [f"{CONFIG} names {named} as the base, but the adapter was trained on {model}"]
    if not config.get("revision"):
        return [f"{CONFIG} names no revision of {model}: other users get the current state of its main branch"]
    return []


def path_notes(folder: Path, facts: Facts) -> list[str]:
    """List the paths of this machine, of base and data, that a bundle's configuration discloses."""
    files = " and ".join(["manifest.json", *(["trial.json"] if (folder / "trial.json").is_file() else [])])
    return [f"{path}, a path of this machine, is in {files}" for path in sorted({*_paths([facts.base, facts.config])})]


def _paths(value: Any) -> Iterator[str]:
    """Yield the absolute paths in a configuration."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _paths(each)
    elif isinstance(value, list):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, str) and "\n" not in value and Path(value).is_absolute():
        yield value

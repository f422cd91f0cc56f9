"""What in a bundle means something on this machine alone, and what of its base is not told to others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import CONFIG, Facts
from orchestrator.base import hub_id


def about_base(folder: Path, facts: Facts) -> list[str]:
    """What others will miss who load this adapter on its base; nothing of a bundle of another format.

    Args:
        folder: the bundle.
        facts: of its manifest, or those that it will have.
    """
    if facts.format != "adapter":
        return []
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model, named = str(facts.base["model"]), config.get("base_model_name_or_path")
    if hub_id(model) is None:
        return [
            f"its base is not on the hub: {CONFIG} names {named}, a folder of this machine; others give PEFT a base of "
            "their own (`PeftModel.from_pretrained(base, ...)`)"
        ]
    if named != model:
        return [f"{CONFIG} names {named} as its base, but it was trained on {model}"]
    if not config.get("revision"):
        return [f"{CONFIG} names no revision of {model}: others get what its main branch holds by then"]
    return []


def paths_named(folder: Path, facts: Facts) -> list[str]:
    """Paths of this machine, of base and data, that a bundle's configuration tells to others."""
    files = " and ".join(["manifest.json", *(["trial.json"] if (folder / "trial.json").is_file() else [])])
    return [
        f"{path}, a path of this machine, stands in {files}" for path in sorted({*_paths([facts.base, facts.config])})
    ]


def _paths(value: Any) -> Iterator[str]:
    """Absolute paths in a configuration."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _paths(each)
    elif isinstance(value, list):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, str) and "\n" not in value and Path(value).is_absolute():
        yield value

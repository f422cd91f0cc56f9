"""Read an experiment file: every bad field dies here, before any GPU second is spent."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import SpecError
from orchestrator.spec.dotted import read_path, write_keys
from orchestrator.spec.extras import require_extras
from orchestrator.spec.messages import describe
from orchestrator.spec.search import SearchSection
from orchestrator.spec.sections import GLOB, file_kind
from orchestrator.spec.sections.scheduler import FIELDS_OF_KIND
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.spec.template import is_chat_template

_Parent: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PATH_FIELDS = ("base.model", "data.source", "data.held_out.source")
_LISTS_OF_PATHS = ("data.mix", "data.held_out.mix")
_TEMPLATE = "data.chat_template"
# These maps have dotted names as keys, so the rest of an override's path is one key.
_FLAT_MAPS = ("search.space.", "search.tied.", "lora.rank_pattern.", "lora.alpha_pattern.")


class _Loader(_Parent):  # type: ignore[misc]
    """YAML where `5e-5` is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in named]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = named[i].start_mark
                raise SpecError(f"line {mark.line + 1}: {key!r} is given twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# YAML 1.1 wants a point in a float: without this, 5e-5 is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_spec(file: str | Path, overrides: Sequence[str] = (), folder: Path | None = None) -> SweepSpec:
    """Read, override and validate an experiment file.

    Relative paths in the file count from the file's folder, those in overrides from `folder`.

    Args:
        file: YAML experiment file.
        overrides: `dotted.field=value` strings; values are read as YAML. A searched or tied field is then fixed.
        folder: default the working directory.

    Raises:
        SpecError: the file cannot be read, or a field is unknown, missing or out of its bounds.
        RequestError: it asks for a package that is not installed.
    """
    path = Path(file)
    document = _read_yaml(path)
    _anchor_paths(document, path.resolve().parent)
    return override_spec(document, overrides, str(path), folder)


def override_spec(
    document: dict[str, Any], overrides: Sequence[str], source: str, folder: Path | None = None
) -> SweepSpec:
    """Override and validate a document whose paths are absolute; `source` names it in messages.

    Relative paths in overrides count from `folder`, by default the working directory.

    Raises:
        SpecError, RequestError: as `load_spec`.
    """
    searched = _num_searched(document)
    for override in overrides:
        _apply_override(document, override, folder or Path.cwd())
    if _num_searched(document) < searched and not any(each.startswith("search.num_trials=") for each in overrides):
        _keep_to_points(document["search"])
    spec = parse_spec(document, source)
    require_extras(spec)
    return spec


def parse_spec(document: dict[str, Any], source: str = "spec") -> SweepSpec:
    """Validate a document that is already in memory; `source` names it in messages.

    Raises:
        SpecError: a field is unknown, missing or out of its bounds.
    """
    try:
        return SweepSpec.model_validate(document)
    except ValueError as error:
        faults = describe(error, SweepSpec)
        raise SpecError(f"{source}: " + f"\n{source}: ".join(faults)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SpecError(f"{path}: there is no such experiment file", "Examples lie in experiments/.")
    if file_kind(path) not in (None, ".json"):  # JSON is YAML too
        raise SpecError(
            f"{path}: holds rows, and is no experiment file",
            f"Name it in one, as data.source; `orchestrator data {path}` shows what a model would see of it.",
        )
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not UTF-8 text") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error.message}") from error
    except RecursionError as error:
        raise SpecError(f"{path}: is nested too deep") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise SpecError(f"{path}:{line} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path}: must hold sections such as base and data, got {type(document).__name__}")
    return document


def _apply_override(document: dict[str, Any], override: str, folder: Path) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise SpecError(f"--set {override}: must be written dotted.field=value")
    try:
        value = yaml.load(text, _Loader)
    except SpecError as error:
        raise SpecError(f"--set {override}: {error.message}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(
            f"--set {override}: the value is not YAML",
            f"Text with such signs stands in quotes: --set '{path}=\"...\"'.",
        ) from error
    flat = next((flat for flat in _FLAT_MAPS if path.startswith(flat)), None)
    keys = [*flat.rstrip(".").split("."), path.removeprefix(flat)] if flat else path.split(".")
    alone: dict[str, Any] = {}
    write_keys(alone, keys, value)
    _anchor_paths(alone, folder)
    for key in keys:
        value = alone = alone[key]
    try:
        write_keys(document, keys, value)
        for searched in ("space", "tied"):  # a field that is set is fixed
            (document.get("search") or {}).get(searched, {}).pop(path, None)
        if path == "scheduler.kind":
            _keep_fields_of_kind(document["scheduler"], value)
    except (TypeError, AttributeError) as error:
        raise SpecError(f"--set {override}: {path} lies under a field that holds a value, not a section") from error


def _num_searched(document: dict[str, Any]) -> int:
    search = document.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    return len(space) if isinstance(space, dict) else 0


def _keep_to_points(search: dict[str, Any]) -> None:
    """Lower the number of trials to that of the points which are left once a field was fixed."""
    try:
        left = SearchSection.model_validate(search).num_points
    except ValueError:  # the whole is validated next, with a message that names its place
        return
    if isinstance(asked := search.get("num_trials"), int) and asked > left:
        search["num_trials"] = int(left)


def _keep_fields_of_kind(scheduler: dict[str, Any], kind: Any) -> None:
    """A scheduler of another kind takes over the fields that it has too; those of the former one go with it."""
    if not isinstance(kind, str) or kind not in FIELDS_OF_KIND:
        return
    for name in [*scheduler]:
        if name not in FIELDS_OF_KIND[kind] and any(name in fields for fields in FIELDS_OF_KIND.values()):
            del scheduler[name]


def _anchor_paths(document: dict[str, Any], folder: Path) -> None:
    """Make local paths absolute, and put the text of a template file in its place."""
    for field in _PATH_FIELDS:
        if (value := _look_up(document, field)) is not None:
            write_keys(document, field.split("."), _anchored(field, value, folder))
    for field in _LISTS_OF_PATHS:
        sources = _look_up(document, field)
        for i, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict) and "source" in source:
                source["source"] = _anchored(f"{field}.{i}.source", source["source"], folder)
    value = _look_up(document, _TEMPLATE)
    if isinstance(value, str) and not is_chat_template(value):
        write_keys(document, _TEMPLATE.split("."), _read_template(value, folder))


def _look_up(document: dict[str, Any], field: str) -> Any:
    try:
        return read_path(document, field)
    except (KeyError, TypeError):
        return None


def _anchored(field: str, value: Any, folder: Path) -> Any:
    """A local path, or a glob, from the root on. A hub id stays as it is, unless a file of that name is in `folder`.

    What is no file of that very name is read as a glob: `folder` itself is none then, whatever signs are in its name.
    """
    if not isinstance(value, str) or value in ("", "embedded") or Path(value).is_absolute():
        return value
    if "://" in value:
        raise SpecError(f"{field}: {value!r:.80} is a URL", "Give a path on this machine, or a hub id (owner/name).")
    try:
        local = folder / Path(value).expanduser()
        is_path = value.startswith((".", "~")) or file_kind(value) is not None or GLOB.search(value) is not None
        exists = local.exists()
        if not exists and field != "base.model":
            local = Path(glob.escape(str(folder))) / Path(value).expanduser()
        return str(local.resolve()) if is_path or exists else value
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a zero byte
        raise SpecError(f"{field}: {value!r:.80} is not a path: {error}") from error


def _read_template(value: str, folder: Path) -> str:
    try:
        return (folder / Path(value).expanduser()).read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"{_TEMPLATE}: {value!r:.80} cannot be read: {reason}", "Give a file with a Jinja template."
        ) from error

"""Read an experiment file: every invalid field is refused here, before any GPU second is spent."""

import glob
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.documents import MAX_YAML_BYTES, DocumentError, load_yaml, read_text
from orchestrator.errors import SpecError
from orchestrator.spec.dotted import read_path, write_keys
from orchestrator.spec.messages import describe
from orchestrator.spec.optional_packages import require_extras
from orchestrator.spec.search import SearchSection
from orchestrator.spec.sections import GLOB, OwnMetric, file_kind
from orchestrator.spec.sections.scheduler import FIELDS_OF_KIND
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.spec.template import is_chat_template

_Parent: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PATH_FIELDS = ("base.model", "data.source", "data.held_out.source", "data.test.source")
_MIX_FIELDS = ("data.mix", "data.held_out.mix", "data.test.mix")
_TEMPLATE = "data.chat_template"
_METRICS = "evaluation.metrics"
# The keys of these maps are dotted names, so the rest of an override's path is one key.
_FLAT_MAPS = ("search.space.", "search.tied.", "lora.rank_pattern.", "lora.alpha_pattern.")


class _Loader(_Parent):  # type: ignore[misc]
    """A YAML loader that reads `5e-5` as a number and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen = set()
        for node_of_key in named:
            key = self.construct_object(node_of_key, deep=True)
            if not isinstance(key, Hashable):  # an error of the parent class
                continue
            if key in seen:
                raise SpecError(f"line {node_of_key.start_mark.line + 1}: {key!r} is given twice")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# YAML 1.1 requires a point in a float: without this resolver, 5e-5 would be a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_spec(file: str | Path, overrides: Sequence[str] = (), folder: Path | None = None) -> SweepSpec:
    """Read an experiment file, apply the overrides and validate the result.

    A `trial.json` of a trial or an adapter is an experiment too, with the values of that trial.

    Relative paths in the file start at the file's folder, those in overrides at `folder`.

    Args:
        file: YAML experiment file.
        overrides: `dotted.field=value` strings; values are read as YAML. A field that is set here is no longer
            searched or tied.
        folder: defaults to the working directory.

    Raises:
        SpecError: the file cannot be read, or a field is unknown, missing or out of bounds.
        RequestError: the experiment needs a package that is not installed.
    """
    path = Path(file)
    document = _read_yaml(path)
    document.pop("varied", None)  # a trial's own file, trial.json, has it beside its sections
    _anchor_paths(document, path.resolve().parent)
    return override_spec(document, overrides, str(path), folder)


def override_spec(
    document: dict[str, Any], overrides: Sequence[str], source: str, folder: Path | None = None
) -> SweepSpec:
    """Apply overrides to a document whose paths are absolute, and validate it.

    Args:
        document: changed in place.
        overrides: as in `load_spec`.
        source: the document's name in messages.
        folder: where relative paths in overrides start; defaults to the working directory.

    Raises:
        SpecError, RequestError: as in `load_spec`.
    """
    num_axes = _num_axes(document)
    for override in overrides:
        _apply_override(document, override, folder or Path.cwd())
    gives_trials = any(each.startswith(("search.num_trials=", "search=")) for each in overrides)
    if _num_axes(document) < num_axes and not gives_trials:
        _limit_trials_to_points(document["search"])
    spec = parse_spec(document, source)
    require_extras(spec)
    return spec


def parse_spec(document: dict[str, Any], source: str = "spec") -> SweepSpec:
    """Validate a document that is already in memory; `source` names it in messages.

    Raises:
        SpecError: a field is unknown, missing or out of bounds.
    """
    try:
        return SweepSpec.model_validate(document)
    except ValueError as error:
        faults = describe(error, SweepSpec)
        raise SpecError(f"{source}: " + f"\n{source}: ".join(faults)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SpecError(f"{path}: there is no such experiment file", "Examples are in experiments/.")
    if file_kind(path) not in (None, ".json"):  # JSON is YAML too
        raise SpecError(
            f"{path}: holds rows, and is not an experiment file",
            f"Name it in an experiment, as data.source. `orchestrator data {path}` shows what a model would see of it.",
        )
    try:
        document = load_yaml(read_text(path, MAX_YAML_BYTES), _Loader)
    except DocumentError as error:
        raise SpecError(f"{path}: {error}") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error.message}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise SpecError(f"{path}:{line} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path}: must hold sections such as base and data, got {type(document).__name__}")
    document.pop("crc32", None)  # a trial's own file is an experiment too, and ends with its checksum
    return document


def parse_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Return dotted field -> value of overrides that are written as `a.b=v`.

    Raises:
        SpecError: an override is not written so, or its value is not YAML.
    """
    return dict(map(_parse_override, overrides))


def _parse_override(override: str) -> tuple[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise SpecError(f"--set {override}: must be written dotted.field=value")
    try:
        value = load_yaml(text, _Loader)
    except SpecError as error:
        raise SpecError(f"--set {override}: {error.message}") from error
    except DocumentError as error:
        raise SpecError(f"--set {path}: the value {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(
            f"--set {override}: the value is not YAML",
            f"Quote text with special characters: --set '{path}=\"...\"'.",
        ) from error
    return path, value


def _apply_override(document: dict[str, Any], override: str, folder: Path) -> None:
    path, value = _parse_override(override)
    flat = next((flat for flat in _FLAT_MAPS if path.startswith(flat)), None)
    keys = [*flat.rstrip(".").split("."), path.removeprefix(flat)] if flat else path.split(".")
    written: dict[str, Any] = {}
    write_keys(written, keys, value)
    _anchor_paths(written, folder)
    for key in keys:
        value = written = written[key]
    try:
        write_keys(document, keys, value)
        for section in ("space", "tied"):  # a field that is set is neither searched nor tied any more
            (document.get("search") or {}).get(section, {}).pop(path, None)
        if path == "scheduler.kind":
            _drop_fields_of_other_kinds(document["scheduler"], value)
    except (TypeError, AttributeError) as error:
        raise SpecError(f"--set {override}: {path} is below a field that holds a value, not a section") from error


def _num_axes(document: dict[str, Any]) -> int:
    search = document.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    return len(space) if isinstance(space, dict) else 0


def _limit_trials_to_points(search: dict[str, Any]) -> None:
    """Lower the number of trials to the number of points that are left after a field was set."""
    try:
        left = SearchSection.model_validate(search).num_points
    except ValueError:  # the whole document is validated next, with a message that names the field
        return
    if isinstance(asked := search.get("num_trials"), int) and asked > left:
        search["num_trials"] = int(left)


def _drop_fields_of_other_kinds(scheduler: dict[str, Any], kind: Any) -> None:
    """Drop fields of the former scheduler that the new kind does not have."""
    if not isinstance(kind, str) or kind not in FIELDS_OF_KIND:
        return
    for name in [*scheduler]:
        if name not in FIELDS_OF_KIND[kind] and any(name in fields for fields in FIELDS_OF_KIND.values()):
            del scheduler[name]


def _anchor_paths(document: dict[str, Any], folder: Path) -> None:
    """Make local paths absolute, and replace the path of a chat template or of a metric's file by the file's text."""
    for field in _PATH_FIELDS:
        if (value := _look_up(document, field)) is not None:
            write_keys(document, field.split("."), _anchored(field, value, folder))
    for field in _MIX_FIELDS:
        sources = _look_up(document, field)
        for i, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict) and "source" in source:
                source["source"] = _anchored(f"{field}.{i}.source", source["source"], folder)
    metrics = _look_up(document, _METRICS)
    for i, metric in enumerate(metrics if isinstance(metrics, list) else []):
        if isinstance(metric, str):
            metrics[i] = _read_metric(f"{_METRICS}.{i}", metric, folder)
    value = _look_up(document, _TEMPLATE)
    if isinstance(value, str) and not is_chat_template(value):
        write_keys(document, _TEMPLATE.split("."), _read_template(value, folder))


def _look_up(document: dict[str, Any], field: str) -> Any:
    try:
        return read_path(document, field)
    except (KeyError, TypeError):
        return None


def _anchored(field: str, value: Any, folder: Path) -> Any:
    """Return the absolute form of a local path or glob. A hub id stays as it is, unless `folder` has such a file.

    A name without a file is read as a glob. Special characters in the name of `folder` itself are escaped.
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
    except (OSError, RuntimeError, ValueError) as error:  # a path too long, an unknown user, a null byte
        raise SpecError(f"{field}: {value!r:.80} is not a path: {error}") from error


def _read_template(value: str, folder: Path) -> str:
    try:
        return (folder / Path(value).expanduser()).read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"{_TEMPLATE}: {value!r:.80} cannot be read: {reason}", "Give a file with a Jinja template."
        ) from error


def _read_metric(field: str, written: str, folder: Path) -> str | dict[str, str]:
    """Return a metric that is written as FILE.py:FUNCTION with the text of its file; any other one as it is."""
    try:
        metric = OwnMetric.read(written, folder)
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"{field}: {written!r:.80} cannot be read: {reason}", "Give a Python file and the name of a function in it."
        ) from error
    except ValueError as error:
        raise SpecError(f"{field}: {describe(error)[0].removeprefix(': ')}") from error
    return written if metric is None else metric.model_dump()

"""Export an adapter: write it beside the target, load it back, compare it with the adapter, then rename it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from orchestrator.adapters.bundle import PICKLES, Facts, Format, has_manifest, read_manifest, seal
from orchestrator.adapters.card import merged_card
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.dtypes import DTYPES, Dtype, default_dtype
from orchestrator.deploy.export import gguf, parity, ray_serve
from orchestrator.deploy.export.check import NotEnoughMemoryError, check_parity
from orchestrator.deploy.export.memory_limit import readable
from orchestrator.deploy.export.merge import Merge, Onto, plan_merge
from orchestrator.deploy.export.parity import Parity, rounding
from orchestrator.deploy.export.private_details import base_notes
from orchestrator.deploy.scoring.evaluate import own_rows, rows_of_file
from orchestrator.errors import ExportError, RequestError
from orchestrator.record.files import building_beside, refuse_links, sync, sync_tree
from orchestrator.record.manifest import MANIFEST
from orchestrator.record.versions import installed_versions

_OTHER_FILES_BYTES = 32 << 20
"""Disk space reserved for tokenizer, configurations and manifest."""

_INT8_NOTE = (
    "note: LLM.int8() also quantizes activations, a merged model does not; the comparison excludes that difference "
    "(`evaluate --as adapter,merged` includes it)"
)


@dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    folder: Path
    format: Format
    parity: Parity
    """The comparison with the adapter."""
    files: list[str]
    """Paths relative to the folder."""
    num_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the export as plain JSON values."""
        return {
            "folder": str(self.folder.resolve()),
            "format": self.format,
            "parity": self.parity.as_dict(),
            "files": self.files,
            "bytes": self.num_bytes,
        }


def export(
    adapter: AdapterRef,
    target: Path,
    format: Format,
    dtype: Dtype | None = None,
    onto: Onto | None = None,
    data: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Export an adapter, either completely or not at all.

    Args:
        adapter: the adapter.
        target: a folder that does not exist yet or is empty, or a link to such a folder.
        format: `adapter`: the PEFT folder; `merged`: one model; `gguf`: the merged model as llama.cpp's file;
            `ray-serve`: the merged model with the config file of a Ray Serve LLM application.
        dtype: type of merged weights; default `default_dtype` of the base.
        onto: merge into the weights that the adapter was trained on (`dequantized`, the default), or into the base's
            original weights.
        data: file, folder or glob with rows to compare on; default the adapter's own held-out rows.
        say: reports progress.

    Raises:
        RecordError: the adapter folder contains a symbolic link, whose target would be exported.
        RequestError: the target exists or its disk is too full, adapter and base do not match, a tool is missing, or
            there are no rows. Nothing is left behind.
        ExportError: the export does not answer as the adapter does; nothing is left behind. Or there is not enough
            memory for the comparison, or the target was taken meanwhile; then the export is kept beside the target.
    """
    if not has_manifest(adapter.folder):
        say(f"note: {adapter.folder} is unverified: it has no {MANIFEST}, by which its files could be checked")
    target = _resolved(target)
    _require_target(target, format, dtype, onto)
    refuse_links(adapter.folder)
    dtype = dtype or default_dtype(adapter.base)
    onto = onto or "dequantized"
    converter = gguf.find_converter() if format == "gguf" else None
    if format == "ray-serve":
        ray_serve.require_ray_serve()
    rows = (rows_of_file(adapter, data, parity.NUM_ROWS) if data else own_rows(adapter, parity.NUM_ROWS)).tokens
    merge = None if format == "adapter" else plan_merge(adapter, dtype, onto)
    with _building_folder(target, _needed_bytes(adapter, merge, format)) as building:
        say(f"writing {format}" + (f", {dtype}, onto the {onto} base" if merge else ""))
        _write(building, target, adapter, merge, format, converter, say)
        try:
            found = check_parity(building, adapter, format, dtype, onto, rows, say)
        except NotEnoughMemoryError as error:
            if format == "ray-serve":
                with suppress(OSError):  # without the config file, the model is still useful
                    ray_serve.write_config(building, _unchecked_folder(target), adapter.name, dtype)
            raise _keep_unchecked(building, target, error) from error
        say(str(found))
        found.require(parity.SAME if merge is None else rounding(DTYPES[dtype], adapter.base.compute_dtype))
        if not found.is_seen:
            say("note: the adapter moves the logits no more than rounding does, so the check cannot detect it")
        if merge is not None and onto == "dequantized" and adapter.base.quantization == "int8":
            say(_INT8_NOTE)
        try:
            if merge is not None and adapter.config is not None:
                card = merged_card(adapter.config, adapter.name, dtype, onto, str(found))
                (building / "README.md").write_text(card, encoding="utf-8")
            facts = _facts(adapter, format, {"dtype": dtype, "onto": onto} if merge else {}, found)
            for note in base_notes(building, facts):
                say(f"note: {note}")
            seal(building, facts)
            sizes = {path.relative_to(building).as_posix(): path.stat().st_size for path in _files(building)}
        except OSError as error:
            raise RequestError(f"{target}: cannot be written: {error}", "Nothing was left behind.") from error
    _rename_to_target(building, target)
    return ExportResult(target, format, found, sorted(sizes), sum(sizes.values()))


def _resolved(target: Path) -> Path:
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself: RuntimeError up to Python 3.12
        raise RequestError(f"{target}: cannot be resolved: {error}", "Give another folder.") from error


def _require_target(target: Path, format: Format, dtype: Dtype | None, onto: Onto | None) -> None:
    for option, value in (("--dtype", dtype), ("--onto", onto)):
        if format == "adapter" and value is not None:
            raise RequestError(
                f"{option} {value}: is an option of merging, but --format adapter does not merge",
                f"Use `--format merged`, or leave {option} out.",
            )
    if target.exists() and (not target.is_dir() or any(target.iterdir()) or target.samefile(Path.cwd())):
        raise RequestError(f"{target}: already exists", "Give a folder that does not exist yet.")
    if target.is_mount():
        raise RequestError(
            f"{target}: is a mount point, which a rename cannot replace", "Give a folder in it, or another one."
        )
    if _unchecked_folder(target).exists():
        raise RequestError(
            f"{_unchecked_folder(target)}: already exists, left by an export that could not be checked",
            "Remove it first.",
        )


def _needed_bytes(adapter: AdapterRef, merge: Merge | None, format: Format) -> int:
    """Return the disk space that the export needs while it is made."""
    if merge is None:
        return sum(path.stat().st_size for path in _files(adapter.folder))
    return (merge.num_bytes + _OTHER_FILES_BYTES) * (2 if format == "gguf" else 1)


@contextmanager
def _building_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """Make a new folder beside the target, and remove it on an error.

    Raises:
        RequestError: the folder cannot be created, or its disk has fewer than `num_bytes` free bytes.
    """
    with ExitStack() as stack:
        try:
            building = stack.enter_context(building_beside(target))
        except OSError as error:
            raise RequestError(f"{target}: cannot be created: {error}") from error
        free = shutil.disk_usage(building).free
        if free < num_bytes:
            raise RequestError(
                f"{target}: the disk is too full: this export needs {readable(num_bytes)}, but only {readable(free)} "
                "is free",
                "Free some space, or give a folder on another disk.",
            )
        yield building


def _unchecked_folder(target: Path) -> Path:
    """Return where an export is kept if there is not enough memory to check it."""
    return target.with_name(f"{target.name}.unchecked")


def _keep_unchecked(building: Path, target: Path, error: NotEnoughMemoryError) -> ExportError:
    kept = _unchecked_folder(target)
    building.rename(kept)
    return ExportError(
        f"{target}: was written, but cannot be compared with the adapter: there is not enough memory: {error}",
        f"It is kept in {kept}, unchecked and without a manifest. Export again on a machine with more memory.",
    )


def _rename_to_target(building: Path, target: Path) -> None:
    try:
        sync_tree(building)
        building.replace(target)  # also replaces an empty folder
        sync(target.parent)
    except OSError as error:
        raise ExportError(
            f"{target}: was exported and checked, but cannot be renamed to its final name: {error}",
            f"The complete export is in {building}: rename that folder.",
        ) from error


def _write(
    building: Path,
    target: Path,
    adapter: AdapterRef,
    merge: Merge | None,
    format: Format,
    converter: Path | None,
    say: Callable[[str], None],
) -> None:
    from safetensors import SafetensorError

    try:
        match format:
            case "adapter":
                _copy_adapter(adapter.folder, building, say)
            case "merged":
                assert merge is not None
                merge.write(building)
            case "gguf":
                assert merge is not None
                assert converter is not None
                with tempfile.TemporaryDirectory(dir=building) as folder:
                    merge.write(Path(folder))
                    gguf.convert(converter, Path(folder), building, merge.dtype, adapter.name, merge.stop_tokens)
            case "ray-serve":
                assert merge is not None
                (building / ray_serve.MODEL).mkdir()
                merge.write(building / ray_serve.MODEL)
                ray_serve.write_config(building, target, adapter.name, merge.dtype)
            case _:
                assert_never(format)
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"{target}: cannot be written: {error}",
            f"This export needs {readable(_needed_bytes(adapter, merge, format))}; nothing was left behind.",
        ) from error
    for path in _files(building):
        path.chmod(0o644)  # safetensors 0.8 creates files that only their owner can read


def _copy_adapter(folder: Path, building: Path, say: Callable[[str], None]) -> None:
    for path in _files(folder):
        if path == folder / MANIFEST:
            continue  # it would declare the copy verified before the check
        if path.suffix.lower() in PICKLES:
            say(f"{path.name} is left out: a pickle runs code when it is loaded")
            continue
        copy = building / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _facts(adapter: AdapterRef, format: Format, merge_options: dict[str, str], found: Parity) -> Facts:
    """Combine the facts of the adapter's manifest with the new measurements."""
    if (adapter.folder / MANIFEST).is_file():
        known = read_manifest(adapter.folder).facts
    else:
        known = Facts(format=format, base=adapter.base.model_dump(mode="json"), versions={}, metrics={})
    measured = {"format": format, "versions": installed_versions(), "parity": merge_options | found.as_dict()}
    return known.model_copy(update=measured)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]

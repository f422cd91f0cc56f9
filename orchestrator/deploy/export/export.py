"""An adapter in the form it ships in: written aside, loaded back, held against its source, then put in its place."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import MANIFEST, PICKLES, Facts, read_manifest, seal
from orchestrator.adapters.card import merged_card
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export import gguf, parity, ray_serve
from orchestrator.deploy.export.check import Format, NoMemoryError, hold_against_source
from orchestrator.deploy.export.memory_limit import readable
from orchestrator.deploy.export.merge import DTYPES, Dtype, Merge, Onto, default_dtype, plan_merge
from orchestrator.deploy.export.parity import Parity, rounding
from orchestrator.deploy.export.private_details import about_base
from orchestrator.deploy.scoring.evaluate import own_rows, rows_of_file
from orchestrator.errors import ExportError, RequestError
from orchestrator.record.files import building_beside, refuse_links
from orchestrator.record.versions import installed_versions

_SPARE_BYTES = 32 << 20
"""For tokenizer, configurations and manifest."""

_ROUNDED_INPUTS = (
    "note: 8-bit products round their inputs as well, which the merged model's do not; that is left out of this "
    "comparison (`evaluate --as adapter,merged` scores both as they are)"
)


@dataclass(frozen=True)
class Exported:
    """What was exported, and how near it comes to its source."""

    folder: Path
    format: Format
    parity: Parity
    files: list[str]
    """By name relative to the folder."""
    num_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder.resolve()),
            "format": self.format,
            "parity": self.parity.as_dict(),
            "files": self.files,
            "bytes": self.num_bytes,
        }


def export(
    subject: AdapterRef,
    target: Path,
    format: Format,
    dtype: Dtype | None = None,
    onto: Onto | None = None,
    data: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export an adapter, complete or not at all.

    Args:
        subject: the adapter.
        target: a folder that does not exist yet, or is empty; or a link to one.
        format: `adapter`: its PEFT folder; `merged`: one model; `gguf`: that as llama.cpp's file; `ray-serve`: that
            with the config file of a Ray Serve LLM application.
        dtype: of what is merged; default that of the base's products, or bf16 where they are float32.
        onto: merge into the base as the adapter was trained on it (default), or into its original weights.
        data: file, folder or glob with rows to compare on; default the adapter's own held-out rows.
        say: hears of progress.

    Raises:
        RecordError: the adapter's folder holds a symbolic link, and would ship what that points to.
        RequestError: the target exists or has no room, the adapter does not fit its base, a tool is missing, or there
            are no rows. Nothing is left behind.
        ExportError: the export does not answer as the adapter does: nothing is left behind. Or there is not enough
            memory to find out, or the target cannot be replaced any more: what was written is kept beside it.
    """
    target = _resolved(target)
    _require_target(target, format, dtype, onto)
    refuse_links(subject.adapter)
    dtype = dtype or default_dtype(subject.base)
    onto = onto or "dequantised"
    converter = gguf.find_converter() if format == "gguf" else None
    if format == "ray-serve":
        ray_serve.require_ray_serve()
    rows = (rows_of_file(subject, data, parity.NUM_ROWS) if data else own_rows(subject, parity.NUM_ROWS)).tokens
    merge = None if format == "adapter" else plan_merge(subject, dtype, onto)
    with _aside(target, _num_bytes(subject, merge, format)) as building:
        say(f"writing {format}" + (f", {dtype}, onto the {onto} base" if merge else ""))
        _write(building, target, subject, merge, format, converter, say)
        try:
            found = hold_against_source(building, subject, format, dtype, onto, rows, say)
        except NoMemoryError as error:
            if format == "ray-serve":
                with suppress(OSError):  # the model beside it is kept all the same
                    ray_serve.write(building, _unchecked(target), subject.name, dtype)
            raise _kept_unchecked(building, target, error) from error
        say(str(found))
        found.require(parity.SAME if merge is None else rounding(DTYPES[dtype], subject.base.compute_dtype))
        if not found.is_seen:
            say("note: the adapter moves the logits too little to be told from rounding, and is not seen in the export")
        if merge is not None and onto == "dequantised" and subject.base.quantization == "int8":
            say(_ROUNDED_INPUTS)
        try:
            if merge is not None and subject.config is not None:
                card = merged_card(subject.config, subject.name, dtype, onto, str(found))
                (building / "README.md").write_text(card, encoding="utf-8")
            facts = _facts(subject, format, {"dtype": dtype, "onto": onto} if merge else {}, found)
            for note in about_base(building, facts):
                say(f"note: {note}")
            seal(building, facts)
            sizes = {path.relative_to(building).as_posix(): path.stat().st_size for path in _files(building)}
        except OSError as error:
            raise RequestError(f"{target}: cannot be written: {error}", "Nothing was left behind.") from error
    _put_in_place(building, target)
    return Exported(target, format, found, sorted(sizes), sum(sizes.values()))


def _resolved(target: Path) -> Path:
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself: RuntimeError up to Python 3.12
        raise RequestError(f"{target}: leads nowhere: {error}", "Give another folder.") from error


def _require_target(target: Path, format: Format, dtype: Dtype | None, onto: Onto | None) -> None:
    for option, value in (("--dtype", dtype), ("--onto", onto)):
        if format == "adapter" and value is not None:
            raise RequestError(
                f"{option} {value}: says how to merge, but --format adapter does not merge",
                "Take `--format merged`, or leave it out.",
            )
    if target.exists() and (not target.is_dir() or any(target.iterdir()) or target.samefile(Path.cwd())):
        raise RequestError(f"{target}: already exists", "Give a folder that does not exist yet.")
    if target.is_mount():
        raise RequestError(
            f"{target}: is a mount point, in whose place no folder can be put", "Give a folder in it, or another one."
        )
    if _unchecked(target).exists():
        raise RequestError(
            f"{_unchecked(target)}: is there, which an export that could not be checked has left",
            "Take it away first.",
        )


def _num_bytes(subject: AdapterRef, merge: Merge | None, format: Format) -> int:
    """Room that the export takes while it is made."""
    if merge is None:
        return sum(path.stat().st_size for path in _files(subject.adapter))
    return (merge.num_bytes + _SPARE_BYTES) * (2 if format == "gguf" else 1)


@contextmanager
def _aside(target: Path, num_bytes: int) -> Iterator[Path]:
    """A new folder beside the target, which goes away on a fault.

    Raises:
        RequestError: it cannot be made, or has no room for so many bytes.
    """
    with ExitStack() as stack:
        try:
            building = stack.enter_context(building_beside(target))
        except OSError as error:
            raise RequestError(f"{target}: cannot be made: {error}") from error
        free = shutil.disk_usage(building).free
        if free < num_bytes:
            raise RequestError(
                f"{target}: the disk is too full: this export needs {readable(num_bytes)}, free are {readable(free)}",
                "Make room, or give a folder on another disk.",
            )
        yield building


def _unchecked(target: Path) -> Path:
    """Where an export is kept that there is no memory to check."""
    return target.with_name(f"{target.name}.unchecked")


def _kept_unchecked(building: Path, target: Path, error: NoMemoryError) -> ExportError:
    kept = _unchecked(target)
    building.rename(kept)
    return ExportError(
        f"{target}: was written, but cannot be held against its adapter: there is not enough memory: {error}",
        f"It is kept in {kept}, unchecked and without a manifest. Export again where there is more room.",
    )


def _put_in_place(building: Path, target: Path) -> None:
    try:
        building.replace(target)  # over an empty folder too
    except OSError as error:
        raise ExportError(
            f"{target}: was exported and checked, but cannot be put in its place: {error}",
            f"It is whole in {building}: rename that folder.",
        ) from error


def _write(
    building: Path,
    target: Path,
    subject: AdapterRef,
    merge: Merge | None,
    format: Format,
    converter: Path | None,
    say: Callable[[str], None],
) -> None:
    from safetensors import SafetensorError

    try:
        if merge is None:
            for path in _files(subject.adapter):
                if path == subject.adapter / MANIFEST:
                    continue  # which says of the copy that it is whole before it has been checked
                if path.suffix.lower() in PICKLES:
                    say(f"{path.name} is left out: a pickle runs code when it is loaded")
                    continue
                place = building / path.relative_to(subject.adapter)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
        elif converter is not None:
            with tempfile.TemporaryDirectory(dir=building) as folder:
                merge.write(Path(folder))
                gguf.convert(converter, Path(folder), building, merge.dtype, subject.name, merge.stop_tokens)
        elif format == "ray-serve":
            (building / ray_serve.MODEL).mkdir()
            merge.write(building / ray_serve.MODEL)
            ray_serve.write(building, target, subject.name, merge.dtype)
        else:
            merge.write(building)
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"{target}: cannot be written: {error}",
            f"This export needs {readable(_num_bytes(subject, merge, format))}; nothing was left behind.",
        ) from error
    for path in _files(building):
        path.chmod(0o644)  # safetensors 0.8 lets only its owner read what it writes


def _facts(subject: AdapterRef, format: Format, how: dict[str, str], found: Parity) -> Facts:
    """What is known of the adapter, and what was measured now."""
    if (subject.adapter / MANIFEST).is_file():
        known = read_manifest(subject.adapter).facts
    else:
        known = Facts(format=format, base=subject.base.model_dump(mode="json"), versions={}, metrics={})
    measured = {"format": format, "versions": installed_versions(), "parity": how | found.as_dict()}
    return known.model_copy(update=measured)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]

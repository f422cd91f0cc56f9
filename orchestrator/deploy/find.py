"""Resolve what a user named, a sweep or an adapter folder, to an `AdapterRef` or a `FinishedSweep`."""

from pathlib import Path
from typing import Any, assert_never

from orchestrator.adapters.bundle import Format, read_manifest
from orchestrator.adapters.peft_config import CONFIG
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.finished import FinishedSweep, open_sweep
from orchestrator.deploy.load import load_model_and_tokenizer
from orchestrator.errors import RecordError
from orchestrator.record.manifest import MANIFEST
from orchestrator.remote.location import find_uri


def load_adapter(
    adapter: AdapterRef | str | Path, output: str = "runs", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load an adapter on its base, in the form it was trained in. `model.generate` works at once.

    Args:
        adapter: a reference to an adapter, an adapter folder, or a sweep, whose best adapter is loaded.
        output: folder that holds sweeps, for a sweep given by its name.
        trust_remote_code: run Python code that comes with its base.

    Returns:
        A `PeftModel` in evaluation mode, on the GPU if there is one, and its tokenizer.

    Raises:
        RecordError: there is no such sweep or adapter, or the adapter is incomplete or changed.
        RequestError: its base cannot be loaded, or brings code, and code is not trusted.
    """
    if not isinstance(adapter, AdapterRef):
        adapter = find_adapter(str(adapter), output, trust_remote_code)
    return load_model_and_tokenizer(adapter.trusted(trust_remote_code))


def is_adapter(sweep_or_adapter: str) -> bool:
    """Tell whether this is an adapter folder rather than a sweep or a sweep's name."""
    return _has_file(Path(sweep_or_adapter), CONFIG)


def find_adapter(sweep_or_adapter: str, output: str, trust_remote_code: bool = False) -> AdapterRef:
    """Find an adapter folder, or the best adapter of a sweep.

    Args:
        sweep_or_adapter: the path of either, or the name of a sweep.
        output: folder that holds sweeps.
        trust_remote_code: run Python code that comes with the base. The author of the sweep or folder has chosen that
            base.

    Raises:
        RecordError: there is neither, or the adapter is incomplete or changed.
        RequestError: its base brings code, and code is not trusted.
    """
    if is_adapter(sweep_or_adapter):
        return AdapterRef.of_folder(Path(sweep_or_adapter), trust_remote_code)
    return find_sweep(sweep_or_adapter, output).best().adapter_ref().trusted(trust_remote_code)


def find_bundle(bundle_or_sweep: str, output: str) -> Path:
    """Find the folder of a bundle; of a sweep, that of its best adapter.

    Args:
        bundle_or_sweep: an adapter folder, an export, or a sweep or its name.
        output: folder that holds sweeps.

    Raises:
        RecordError: the sweep cannot be read, or has no adapter.
    """
    folder = Path(bundle_or_sweep)
    is_sweep = _has_file(folder, "sweep.json")
    if not is_sweep and (_is_invalid_path(folder) or folder.exists()):
        return folder
    if is_sweep or find_uri(bundle_or_sweep, output) or _has_file(Path(output) / bundle_or_sweep, "sweep.json"):
        return open_sweep(bundle_or_sweep, output).best().adapter_ref().folder
    return folder


def find_sweep(sweep: str, output: str) -> FinishedSweep:
    """Open a sweep, for a command that also accepts an adapter folder.

    Raises:
        RecordError: there is no sweep; the message says what was found instead.
    """
    try:
        return open_sweep(sweep, output)
    except RecordError as error:
        folder = Path(sweep)
        if find_uri(sweep, output) or _is_invalid_path(folder):
            raise
        if _has_file(folder, "sweep.json") or _has_file(Path(output) / sweep, "sweep.json"):
            raise
        if folder.is_dir():
            raise _wrong_folder(folder) from error
        raise RecordError(
            f"{sweep}: there is no such sweep or adapter (no sweep.json in {sweep} or {Path(output) / sweep}, "
            f"no {CONFIG} in {sweep})",
            "Give a sweep's folder, its name together with --output, or an adapter's folder.",
        ) from error


def _wrong_folder(folder: Path) -> RecordError:
    if (folder / MANIFEST).is_file():
        format = read_manifest(folder).facts.format
        if usage := _usage(format, folder):
            return RecordError(
                f"{folder}: is an export of format {format}; a sweep or an adapter is needed here", usage
            )
    if (folder / "config.json").is_file():
        return RecordError(
            f"{folder}: is a whole model (config.json); a sweep or an adapter is needed here", _usage("merged", folder)
        )
    return RecordError(f"{folder}: contains neither a sweep (sweep.json) nor an adapter ({CONFIG})")


def _usage(format: Format, folder: Path) -> str:
    """Say how an export that is not an adapter is used; empty for an adapter."""
    match format:
        case "adapter":
            return ""
        case "merged":
            return f"Any server takes it, such as `vllm serve {folder}`; transformers loads it by its folder."
        case "gguf":
            return f"llama.cpp takes it: `llama-server -m {folder}/model.gguf`."
        case "ray-serve":
            return f"Ray Serve takes it: `serve deploy {folder}/serve.yaml`."
        case _:
            assert_never(format)


def _has_file(folder: Path, name: str) -> bool:
    return not _is_invalid_path(folder) and (folder / name).is_file()


def _is_invalid_path(path: Path) -> bool:
    """Tell whether the system rejects this path: it is too long, or contains a zero byte."""
    try:
        path.exists()
    except (OSError, ValueError):
        return True
    return False

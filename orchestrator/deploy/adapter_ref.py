"""What is to be scored, shipped, served or asked: an adapter, with what is known of its origin."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from orchestrator.adapters.bundle import CONFIG, MANIFEST, read_manifest, verify_adapter
from orchestrator.base import hub_id
from orchestrator.deploy.finished import ChosenTrial, FinishedSweep, open_sweep
from orchestrator.errors import RecordError, RequestError
from orchestrator.record import SweepPaths, SweepRecord, TrialResult
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection


@dataclass(frozen=True)
class AdapterRef:
    """An adapter folder that is whole."""

    name: str
    """Trial id, or the folder's name."""
    adapter: Path
    base: BaseSection
    """What it was trained on; of a base from the hub, the very commit, wherever its branch has gone since."""
    config: TrialConfig | None
    """How it was trained; None for an adapter that does not say."""
    sweep: SweepPaths | None
    """Where its held-out rows lie; None for an adapter outside its sweep."""

    @classmethod
    def of_best(cls, best: ChosenTrial) -> "AdapterRef":
        """The adapter that a sweep gives.

        Raises:
            RecordError: it is not whole, or may have taken the place of one that is damaged: nobody has asked for that.
        """
        if best.in_doubt:
            trial, why = next(iter(best.in_doubt.items()))
            raise RecordError(
                f"the adapter of trial {trial} is damaged, and the choice may hang on it, for {why}: "
                f"{best.damaged[trial]}",
                f"Mend it; or give the folder of the best that is whole: {best.adapter}",
            )
        return cls.of_trial(best.record, best.trial)

    @classmethod
    def of_trial(cls, record: SweepRecord, trial: TrialResult) -> "AdapterRef":
        """The adapter of a trial's best evaluation.

        Raises:
            RecordError: it is missing, or not whole.
        """
        adapter = record.adapter(trial)
        verify_adapter(adapter)
        base = at_commit(trial.config.base, adapter)
        return cls(trial.trial_id, adapter, base, trial.config, record.paths)


def is_adapter(sweep_or_adapter: str) -> bool:
    """Whether this is an adapter folder, and not (the name of) a sweep."""
    return _holds(Path(sweep_or_adapter), CONFIG)


def find_adapter(sweep_or_adapter: str, output: str, trust_remote_code: bool = False) -> AdapterRef:
    """An adapter folder, or the best adapter of a sweep.

    Args:
        sweep_or_adapter: either, by its path; a sweep also by its name.
        output: folder that holds sweeps.
        trust_remote_code: run Python code that comes with the base of an adapter folder: whoever made the folder has
            named that base.

    Raises:
        RecordError: neither is there, or the adapter is not whole.
        RequestError: its base brings code, which is not trusted.
    """
    if is_adapter(sweep_or_adapter):
        return _of_folder(Path(sweep_or_adapter), trust_remote_code)
    return AdapterRef.of_best(find_sweep(sweep_or_adapter, output).best())


def find_sweep(sweep: str, output: str) -> FinishedSweep:
    """A sweep, where an adapter folder could have been given too.

    Raises:
        RecordError: there is none; the message says what is there instead.
    """
    try:
        return open_sweep(sweep, output)
    except RecordError as error:
        folder = Path(sweep)
        if _is_unusable(folder) or _holds(folder, "sweep.json") or _holds(Path(output) / sweep, "sweep.json"):
            raise
        if folder.is_dir():
            raise _something_else(folder) from error
        raise RecordError(
            f"{sweep}: there is no such sweep or adapter (no sweep.json in {sweep} or {Path(output) / sweep}, "
            f"no {CONFIG} in {sweep})",
            "Give a sweep's folder, its name together with --output, or an adapter's folder.",
        ) from error


_TAKEN_BY = {
    "merged": "Any server takes it, such as `vllm serve {folder}`; transformers loads it by its folder.",
    "gguf": "llama.cpp takes it: `llama-server -m {folder}/model.gguf`.",
    "ray-serve": "Ray Serve takes it: `serve deploy {folder}/serve.yaml`.",
}
"""What is done with an export that is no adapter, by its format."""


def _something_else(folder: Path) -> RecordError:
    if (folder / MANIFEST).is_file():
        format = read_manifest(folder).facts.format
        if format in _TAKEN_BY:
            return RecordError(
                f"{folder}: is an export of format {format}; a sweep or an adapter is needed here",
                _TAKEN_BY[format].format(folder=folder),
            )
    if (folder / "config.json").is_file():
        return RecordError(
            f"{folder}: is a whole model (config.json); a sweep or an adapter is needed here",
            _TAKEN_BY["merged"].format(folder=folder),
        )
    return RecordError(f"{folder}: holds neither a sweep (sweep.json) nor an adapter ({CONFIG})")


def _holds(folder: Path, name: str) -> bool:
    return not _is_unusable(folder) and (folder / name).is_file()


def _is_unusable(path: Path) -> bool:
    """Whether it is too long for a path, or has a zero byte."""
    try:
        path.exists()
    except (OSError, ValueError):
        return True
    return False


def _of_folder(folder: Path, trust_remote_code: bool) -> AdapterRef:
    verify_adapter(folder)
    config = _trial_config(folder)
    if config is None:
        # Unquantised, as most adapters of unknown origin were trained.
        model = _peft_config(folder).get("base_model_name_or_path")
        if not model or not isinstance(model, str):
            raise RecordError(f"{folder / CONFIG}: names no base (base_model_name_or_path)")
        base = at_commit(BaseSection(model=model, quantization="none"), folder)
        return AdapterRef(folder.resolve().name, folder, base, None, None)
    if config.base.trust_remote_code and not trust_remote_code:
        raise RequestError(
            f"{folder}: its base {config.base.model} brings Python code, which would be run here",
            "Give --trust-remote-code if you trust its author.",
        )
    return AdapterRef(folder.resolve().name, folder, at_commit(config.base, folder), config, _sweep_around(folder))


def _trial_config(folder: Path) -> TrialConfig | None:
    path = folder / "trial.json"
    if not path.is_file():
        return None
    try:
        return TrialConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: is damaged or of another version: {error}") from error


def _peft_config(folder: Path) -> dict[str, object]:
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise RecordError(f"{path}: is damaged: {error}") from error
    if not isinstance(found, dict):
        raise RecordError(f"{path}: is damaged: holds no object")
    return found


def at_commit(base: BaseSection, adapter: Path) -> BaseSection:
    """The base at the commit that an adapter was trained on, which its PEFT configuration names."""
    commit = _peft_config(adapter).get("revision")
    return base.model_copy(update={"revision": commit}) if hub_id(base.model) and isinstance(commit, str) else base


def _sweep_around(folder: Path) -> SweepPaths | None:
    """The sweep that an adapter lies in: SWEEP/trials/TRIAL/adapters/step-N."""
    parents = folder.resolve().parents
    return SweepPaths(parents[3]) if len(parents) > 3 and (parents[3] / "sweep.json").is_file() else None

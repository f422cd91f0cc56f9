"""What is to be scored, shipped, served or asked: an adapter, with what is known of its origin."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.adapters.bundle import verify_adapter
from orchestrator.deploy.sweep import Best, open_sweep
from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths, SweepRecord, TrialResult
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection


@dataclass(frozen=True)
class Subject:
    """An adapter folder that is whole."""

    name: str
    """Trial id, or the folder's name."""
    adapter: Path
    base: BaseSection
    """What it was trained on."""
    config: TrialConfig | None
    """How it was trained; None for an adapter that does not say."""
    sweep: SweepPaths | None
    """Where its held-out rows lie; None for an adapter outside its sweep."""

    @classmethod
    def of_best(cls, best: Best) -> "Subject":
        """The adapter that a sweep gives.

        Raises:
            RecordError: it is not whole.
        """
        return cls.of_trial(best.record, best.trial)

    @classmethod
    def of_trial(cls, record: SweepRecord, trial: TrialResult) -> "Subject":
        """The adapter of a trial's best evaluation.

        Raises:
            RecordError: it is missing, or not whole.
        """
        adapter = record.adapter(trial)
        verify_adapter(adapter)
        return cls(trial.trial_id, adapter, trial.config.base, trial.config, record.paths)


def find_subject(sweep_or_adapter: str, output: str) -> Subject:
    """An adapter folder, or the best adapter of a sweep.

    Raises:
        RecordError: neither is there, or the adapter is not whole.
    """
    folder = Path(sweep_or_adapter)
    if (folder / "adapter_config.json").is_file():
        return _of_folder(folder)
    try:
        return Subject.of_best(open_sweep(sweep_or_adapter, output).best())
    except RecordError as error:
        if folder.is_dir() and not (folder / "sweep.json").is_file():
            raise RecordError(
                f"{folder}: holds neither a sweep (sweep.json) nor an adapter (adapter_config.json)"
            ) from error
        raise


def _of_folder(folder: Path) -> Subject:
    verify_adapter(folder)
    if (folder / "trial.json").is_file():
        config = TrialConfig.model_validate_json((folder / "trial.json").read_text(encoding="utf-8"))
        return Subject(folder.resolve().name, folder, config.base, config, _sweep_around(folder))
    from peft import PeftConfig

    base = BaseSection(model=PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    return Subject(folder.resolve().name, folder, base, None, None)


def _sweep_around(folder: Path) -> SweepPaths | None:
    """The sweep that an adapter lies in: SWEEP/trials/TRIAL/adapters/step-N."""
    parents = folder.resolve().parents
    return SweepPaths(parents[3]) if len(parents) > 3 and (parents[3] / "sweep.json").is_file() else None

"""References to adapter folders: the folder, its base, and the configuration of the training."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.adapters.bundle import verify_adapter
from orchestrator.adapters.peft_config import CONFIG, read_peft_config
from orchestrator.base_folder import hub_id, require_trusted_code
from orchestrator.errors import RecordError
from orchestrator.record import SweepPaths, SweepRecord, TrialResult
from orchestrator.record.checked import read_record
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection


@dataclass(frozen=True)
class AdapterRef:
    """A reference to an adapter folder that was verified."""

    name: str
    """Trial id, or the folder's name."""
    folder: Path
    base: BaseSection
    """The base it was trained on. A base from the hub is pinned to the commit used in training."""
    config: TrialConfig | None
    """The configuration it was trained with; None if the folder does not record one."""
    sweep: SweepPaths | None
    """The sweep with its held-out rows; None for an adapter outside its sweep."""

    @classmethod
    def of_trial(cls, record: SweepRecord, trial: TrialResult) -> "AdapterRef":
        """Refer to the adapter of a trial's best evaluation.

        Raises:
            RecordError: the adapter is missing, incomplete or changed.
        """
        folder = record.adapter(trial)
        verify_adapter(folder)
        return cls(trial.trial_id, folder, at_commit(trial.config.base, folder), trial.config, record.paths)

    @classmethod
    def of_folder(cls, folder: Path, trust_remote_code: bool) -> "AdapterRef":
        """Refer to an adapter folder of any origin.

        Args:
            folder: a PEFT adapter folder.
            trust_remote_code: allow a base that brings Python code.

        Raises:
            RecordError: the folder is not a complete adapter, or does not name its base.
            RequestError: its base brings code, and code is not trusted.
        """
        verify_adapter(folder)
        config = _trial_config(folder)
        if config is None:
            # Adapters of unknown origin were mostly trained on an unquantized base.
            model = read_peft_config(folder).get("base_model_name_or_path")
            if not model or not isinstance(model, str):
                raise RecordError(f"{folder / CONFIG}: names no base (base_model_name_or_path)")
            base = at_commit(BaseSection(model=model, quantization="none"), folder)
            return cls(folder.resolve().name, folder, base, None, None)
        require_trusted_code(config.base, str(folder), trust_remote_code)
        return cls(folder.resolve().name, folder, at_commit(config.base, folder), config, _enclosing_sweep(folder))

    def trusted(self, trust_remote_code: bool) -> "AdapterRef":
        """Return this reference.

        Raises:
            RequestError: its base brings Python code, and `trust_remote_code` is false.
        """
        require_trusted_code(self.base, str(self.folder), trust_remote_code)
        return self


def at_commit(base: BaseSection, folder: Path) -> BaseSection:
    """Pin a base from the hub to the commit that an adapter was trained on, as its PEFT configuration names it."""
    commit = read_peft_config(folder).get("revision")
    return base.model_copy(update={"revision": commit}) if hub_id(base.model) and isinstance(commit, str) else base


def _trial_config(folder: Path) -> TrialConfig | None:
    path = folder / "trial.json"
    return read_record(TrialConfig, path) if path.is_file() else None


def _enclosing_sweep(folder: Path) -> SweepPaths | None:
    """Find the sweep that contains an adapter: SWEEP/trials/TRIAL/adapters/step-N."""
    parents = folder.resolve().parents
    return SweepPaths(parents[3]) if len(parents) > 3 and (parents[3] / "sweep.json").is_file() else None

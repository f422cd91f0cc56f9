"""Make a trial that somebody has asked for: its values, its point for the searcher, the adapter of a warm clone."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.tune.experiment import Trial

from orchestrator.adapters.bundle import WEIGHTS
from orchestrator.adapters.peft_config import CONFIG, read_peft_config
from orchestrator.errors import RequestError
from orchestrator.record import SweepRecord, TrialPaths, TrialResult, read_added, read_trial
from orchestrator.record.absent import require_present
from orchestrator.record.files import building_beside, publish, refuse_links
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.axis_checks import check_searchable
from orchestrator.spec.dotted import read_path

MAY_DIFFER = ("rank", "alpha", "rank_pattern", "alpha_pattern", "rslora", "dropout")
"""Fields of `lora` in which a warm clone may differ from its donor."""

_NUM_COPIES = 3
"""How often a copy is tried: a running trial replaces its best adapter now and then."""


def donor_values(record: SweepRecord, donor: TrialResult) -> dict[str, Any]:
    """Return the values that make a trial what it is: those that were asked for, or those of the searched fields."""
    added = read_added(record.paths.trial(donor.trial_id))
    if added is not None:
        return dict(added.values)
    space = record.info.spec.search.space
    return {path: value for path, value in donor.config.varied.items() if path in space}


@dataclass(frozen=True)
class Wanted:
    """What somebody wants a trial to be."""

    config: TrialConfig
    values: dict[str, Any]
    """Dotted field -> value, as its field holds it."""
    point: dict[str, Any] | None
    """Its point for the searcher; None if it is outside the search space."""


def wanted_trial(spec: SweepSpec, values: Mapping[str, Any]) -> Wanted:
    """Return a trial with these values. Searched fields without a value have the experiment's own.

    Raises:
        RequestError: a field cannot be set, or a value does not fit.
    """
    try:
        for path in values:
            check_searchable(path)
        config = spec.trial_config(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(f"{where or 'the trial'}: {first['msg'].removeprefix('Value error, ')}") from error
    except ValueError as error:
        raise RequestError(str(error).removeprefix("search: ")) from error
    document = config.model_dump(mode="json")
    point = spec.point_of(config) if values.keys() <= spec.search.space.keys() else None
    return Wanted(config, {path: read_path(document, path) for path in values}, point)


def added_trial(like: Any, trial_id: str, values: Mapping[str, Any]) -> Any:
    """Return a new Tune trial with these values, which is otherwise like another one."""
    return Trial(
        like.trainable_name,
        config=dict(values),
        trial_id=trial_id,
        evaluated_params=dict(values),
        experiment_tag="added",
        stub=like.stub,
        stopping_criterion=like.stopping_criterion,
        checkpoint_config=like.run_metadata.checkpoint_manager.checkpoint_config,
        trial_dirname_creator=lambda trial: trial.trial_id,
        log_to_file=like.log_to_file,
        max_failures=like.max_failures,
        storage=like.storage,
    )


def copy_adapter(record: SweepRecord, donor: TrialResult, config: TrialConfig, paths: TrialPaths) -> str:
    """Copy the best adapter of a trial, with which a clone begins.

    Args:
        record: of the sweep.
        donor: the trial; it may be running.
        config: of the clone.
        paths: of the clone.

    Returns:
        Where the adapter comes from, as TRIAL/adapters/step-N.

    Raises:
        RequestError: the donor has no adapter yet, its adapter does not fit the clone, or contains a link.
    """
    _require_fit(donor, config)
    for _ in range(_NUM_COPIES):
        donor = read_trial(record.paths.trial(donor.trial_id), record.info)
        if donor.best is None:
            break
        require_present(record.paths, donor.trial_id)
        source = record.adapter_path(donor)
        refuse_links(source.parent)
        try:
            with building_beside(paths.initial_adapter) as building:
                for name in (CONFIG, WEIGHTS):
                    shutil.copyfile(source / name, building / name)
                _require_same_experts(building, donor, config)
                shutil.rmtree(paths.initial_adapter, ignore_errors=True)
                publish(building, paths.initial_adapter)
        except FileNotFoundError:
            continue
        return f"{donor.trial_id}/{donor.best.adapter}"
    raise RequestError(
        f"{donor.trial_id}: has no adapter to begin with", "Wait for its first evaluation, or clone it without --warm."
    )


def _require_fit(donor: TrialResult, config: TrialConfig) -> None:
    """Raise RequestError if a clone cannot begin with the adapter of its donor."""
    before, after = donor.config, config
    changed = [
        f"lora.{name}"
        for name in type(after.lora).model_fields
        if name not in MAY_DIFFER and getattr(before.lora, name) != getattr(after.lora, name)
    ]
    changed += ["base"] if before.base != after.base else []
    remedy = "Clone it without --warm."
    if changed:
        raise RequestError(f"{', '.join(changed)}: must be as in {donor.trial_id}, whose adapter would not fit", remedy)
    if after.lora.starts_from_base:
        raise RequestError(
            f"lora.init {after.lora.init}: {donor.trial_id} takes a part of the base's weights as its start, which a "
            "clone cannot take over",
            remedy,
        )


def _require_same_experts(folder: Path, donor: TrialResult, config: TrialConfig) -> None:
    """Raise RequestError if the rank or the scale of fused experts would change."""
    adapter = read_peft_config(folder)
    changed = [name for name in MAY_DIFFER[:5] if getattr(donor.config.lora, name) != getattr(config.lora, name)]
    if adapter.get("target_parameters") and changed:
        raise RequestError(
            f"lora.{changed[0]}: the rank and the scale of fused experts cannot change in a warm clone",
            "Clone it without --warm.",
        )

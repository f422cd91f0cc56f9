"""How many bytes a sweep writes, by the rules of what is kept (`training.attempt.recorder`)."""

from collections.abc import Sequence
from typing import Any

from orchestrator.data.shared_rows import id_types
from orchestrator.planning.models import DiskPlan
from orchestrator.spec import TrialConfig
from orchestrator.training.attempt.recorder import CHECKPOINTS_KEPT
from orchestrator.training.model.targets import expected_modules

_BYTES = {"uint16": 2, "int16": 2, "int32": 4}
"""Bytes of a token or its label in the sweep's folder."""


def plan_disk(base: Any, trials: Sequence[TrialConfig], num_running: int, num_tokens: int) -> DiskPlan:
    """Foresee the bytes of prepared data, adapters and checkpoints.

    Args:
        base: the base without adapters; its weights are not read.
        trials: all trials.
        num_running: trials that run at a time.
        num_tokens: tokens of the training and held-out rows.
    """
    parameters = [_num_parameters(base, config) for config in trials]
    adapters = [
        number * (4 if config.training.adapter_dtype == "float32" else 2)
        for number, config in zip(parameters, trials, strict=True)
    ]
    moments = [
        number * 2 * (1 if "8bit" in config.training.optimizer else 4)
        for number, config in zip(parameters, trials, strict=True)
    ]
    whole = sorted((adapter + moment for adapter, moment in zip(adapters, moments, strict=True)), reverse=True)
    # The newest ones are kept, and one more is being written.
    checkpoints = (CHECKPOINTS_KEPT + 1) * sum(whole[:num_running])
    token = sum(_BYTES[each] for each in id_types(base.config.get_text_config().vocab_size))
    return DiskPlan(data=token * num_tokens, adapters=sum(adapters), checkpoints=checkpoints)


def _num_parameters(base: Any, config: TrialConfig) -> int:
    return config.lora.rank * sum(i + o for i, o in expected_modules(base, config.lora).values())

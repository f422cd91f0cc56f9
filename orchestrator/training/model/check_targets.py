"""Check before a sweep starts that `lora.target_modules` suits the family of a base, without loading the base.

The module is cheap to import, and does nothing for bases of other families than `PEFT_REFUSES`.
"""

import json
from collections.abc import Mapping

from orchestrator.base_folder import config_file
from orchestrator.errors import RequestError, TrialError
from orchestrator.imports import importing
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import BaseSection
from orchestrator.training.model.linear_layers import PEFT_REFUSES, LinearLayers, linear_layers
from orchestrator.training.model.targets import require_adaptable


def check_targets(spec: SweepSpec) -> None:
    """Check that PEFT adapts the layers that the trials ask for, for each base whose configuration is at hand.

    Raises:
        RequestError: it does not; the remedy is a list that it adapts.
    """
    known: dict[BaseSection, LinearLayers] = {}
    for config in spec.samples():
        base = config.base
        # A base's own code is not run to check an experiment; the trial checks its layers.
        if base.trust_remote_code or _model_type(base) not in PEFT_REFUSES:
            continue
        if base not in known:
            known[base] = _layers_of(base)
        try:
            require_adaptable(known[base], config.lora)
        except TrialError as error:
            raise RequestError(f"{error.message} of base.model {base.model}", error.remedy) from error


def _model_type(base: BaseSection) -> str | None:
    """Return the family of a base, from its configuration; None if that is not on this machine."""
    file = config_file(base)
    if file is None or not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # loading the base will say so
        return None
    return document.get("model_type") if isinstance(document, Mapping) else None


def _layers_of(base: BaseSection) -> LinearLayers:
    """Return the linear layers of a base from its configuration alone."""
    with importing():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

    file = config_file(base)
    assert file is not None
    config = AutoConfig.from_pretrained(str(file.parent))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return linear_layers(model)

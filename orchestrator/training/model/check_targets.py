"""Check before a sweep starts that `lora.target_modules` suits the family of a base, without loading the base.

The module is cheap to import, and does nothing for bases of other families than `PEFT_REFUSES`.
"""

from orchestrator.base_folder import config_file, model_type
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
    known: dict[BaseSection, LinearLayers | None] = {}
    for config in spec.samples():
        base = config.base
        if base not in known:
            known[base] = _layers_to_check(base)
        if (layers := known[base]) is None:
            continue
        try:
            require_adaptable(layers, config.lora)
        except TrialError as error:
            raise RequestError(f"{error.message} of base.model {base.model}", error.remedy) from error


def _layers_to_check(base: BaseSection) -> LinearLayers | None:
    """Return the linear layers of a base from its configuration alone; None where PEFT refuses none of them.

    A base's own code is not run to check an experiment; the trial checks its layers.
    """
    if base.trust_remote_code or model_type(base) not in PEFT_REFUSES:
        return None
    with importing():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

    file = config_file(base)
    assert file is not None
    config = AutoConfig.from_pretrained(str(file.parent))
    with torch.device("meta"):
        return linear_layers(AutoModelForCausalLM.from_config(config))

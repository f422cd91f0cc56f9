"""Check before a sweep starts that `lora.target_modules` suits the family of a base, without loading the base.

The module is cheap to import. It builds the model without its weights only for bases with experts, and for families of
`PEFT_REFUSES`.
"""

from typing import Any

from orchestrator.base_folder import config_file, has_experts, model_type, stored_quantization
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
        if base not in known or (known[base] is None and config.lora.names_experts):
            known[base] = _layers_to_check(base, config.lora.names_experts)
        if (layers := known[base]) is None:
            continue
        try:
            require_adaptable(layers, config.lora)
        except TrialError as error:
            raise RequestError(f"{error.message} of base.model {base.model}", error.remedy) from error


def _layers_to_check(base: BaseSection, names_experts: bool) -> LinearLayers | None:
    """Return the linear layers of a base from its configuration alone; None where nothing can be refused.

    A base's own code is not run to check an experiment, and the layers that text reaches in a multimodal base are found
    with its weights; there, the trial checks its layers.
    """
    if model_type(base) not in PEFT_REFUSES and not names_experts:
        return None
    model = _meta_model(base)
    return None if model is None or model.config.sub_configs else linear_layers(model)


def _meta_model(base: BaseSection) -> Any:
    """Build a base without its weights; None for a base with code of its own, or one that is not on this machine."""
    file = config_file(base)
    if base.trust_remote_code or file is None or not file.is_file():
        return None
    with importing():
        import torch
        from transformers import AutoConfig

        from orchestrator.base import model_class

    config = AutoConfig.from_pretrained(str(file.parent))
    with torch.device("meta"):
        return model_class(config).from_config(config)


def note_on_size(base: BaseSection) -> str | None:
    """Say how much of a base with experts will be quantized, and its size. None for other bases.

    A trial measures both on the loaded base, also where there are no experts.
    """
    if not has_experts(base) or stored_quantization(base) is not None or (model := _meta_model(base)) is None:
        return None
    from orchestrator.base_size import BaseSize

    size = BaseSize.foreseen(base, model)
    warning = size.warning(base)
    return warning or f"base.model {base.model}: has experts; it will hold {size.say(base)}"

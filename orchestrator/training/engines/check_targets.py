"""Check before a sweep starts that `lora.target_modules` suits the family of a base, without loading the base.

The module is cheap to import. It builds the model without its weights only where names may be wrong: for layers of
bases with experts, for names that are not those of a family of the fast engine, and for families of `PEFT_REFUSES`.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.base_folder import has_experts, model_type, stored_quantization, text_document
from orchestrator.errors import RequestError, TrialError
from orchestrator.imports import importing
from orchestrator.spec import SweepSpec, TrialConfig
from orchestrator.spec.sections import BaseSection
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.model.linear_layers import PEFT_REFUSES, linear_layers
from orchestrator.training.model.targets import ends_with, require_adaptable


class EmptyBases:
    """The bases of an experiment without their weights. Each is built once."""

    def __init__(self) -> None:
        self._built: dict[tuple[str, str | None, bool], Any] = {}

    def of(self, base: BaseSection) -> Any:
        """Return the model of a base on the meta device. None for one with its own code, or not on this machine.

        A base's own code is not run to check an experiment.

        Raises:
            RequestError: transformers cannot build it.
        """
        key = base.model, base.revision, base.trust_remote_code
        if key not in self._built:
            with importing(), _only_errors_of("bitsandbytes"):
                import bitsandbytes  # noqa: F401  # what looks at the model imports it

                from orchestrator.base import empty_model

                self._built[key] = empty_model(base)
        return self._built[key]


@contextmanager
def _only_errors_of(library: str) -> Iterator[None]:
    """Silence the warnings of a library, such as those on optional kernels that are not installed."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_targets(spec: SweepSpec, empty: EmptyBases | None = None) -> None:
    """Check that PEFT adapts the layers that the trials ask for, for each base whose configuration is at hand.

    The layers that text reaches in a multimodal base are found with its weights; there, the trial checks this.

    Args:
        spec: the experiment.
        empty: models that are built already, or will be used again.

    Raises:
        RequestError: PEFT does not; the remedy is a list that it adapts. Or transformers cannot build the base.
    """
    empty = EmptyBases() if empty is None else empty
    for config in spec.samples():
        if not _may_be_refused(config) or (model := empty.of(config.base)) is None:
            continue
        if config.base.quantization != "none" and _has_conv1d(model):  # quantization makes linear layers of these
            continue
        try:
            require_adaptable(linear_layers(model), config.lora)
        except TrialError as error:
            is_multimodal = bool(model.config.sub_configs)  # the list has layers that text does not reach
            remedy = "Name layers of the text model in lora.target_modules." if is_multimodal else error.remedy
            raise RequestError(f"base.model {config.base.model}: {error.message}", remedy) from error


def _may_be_refused(config: TrialConfig) -> bool:
    """Return whether the targets are checked: names that may be wrong, and what PEFT refuses."""
    base, lora = config.base, config.lora
    if lora.names_experts or model_type(base) in PEFT_REFUSES:
        return True
    if lora.target_modules == "all-linear" or base.trust_remote_code or model_type(base) is None:
        return False
    return has_experts(base) or not _names_known_layers(base, lora.target_modules)


def _names_known_layers(base: BaseSection, targets: Collection[str]) -> bool:
    """Return whether each name is that of layers which all bases of the family have, by the fast engine's data."""
    family = FAMILIES.get(text_document(base).get("model_type", ""))
    layers = [name for group in family.groups for name in group] if family is not None else []
    return all(any(ends_with(name, target) for name in layers) for target in targets)


def _has_conv1d(model: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def notes_on_size(spec: SweepSpec, empty: EmptyBases) -> list[str]:
    """Say how much of each base with experts will be quantized, and its size.

    A trial measures both on the loaded base, also where there are no experts.

    Args:
        spec: the experiment.
        empty: models that are built already.
    """
    notes = [_note_on_size(base, empty) for base in dict.fromkeys(config.base for config in spec.samples())]
    return list(dict.fromkeys(filter(None, notes)))


def _note_on_size(base: BaseSection, empty: EmptyBases) -> str | None:
    """Return None for a base without experts, and for one that cannot be built, which its trials report."""
    if not has_experts(base) or stored_quantization(base) is not None:
        return None
    try:
        model = empty.of(base)
    except RequestError:
        return None
    if model is None:
        return None
    from orchestrator.base import share_modules
    from orchestrator.base_size import BaseSize

    size = BaseSize.foreseen(base, share_modules(model))
    return size.warning(base) or f"base.model {base.model}: has experts; after loading, {size.say(base)}"

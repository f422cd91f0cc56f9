"""Quantize fused experts while transformers loads a base: a matrix of one layer at a time, before the next is read."""

from typing import Any

from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from orchestrator.experts import PackedExperts, compute_by_expert, matrix_names, packed

METHOD = "bitsandbytes_4bit_with_experts"
"""Name of this quantizer in transformers' registry."""


def with_experts(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Return 4-bit settings with which `from_pretrained` quantizes fused experts too.

    The loaded model's own settings are again those of bitsandbytes.
    """
    config.quant_method = METHOD
    return config


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """bitsandbytes' 4-bit quantization of linear layers, and of fused experts with the same settings."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is quantized while it is loaded."""
        if super().param_needs_quantization(model, param_name, **kwargs):
            return True
        module, name = get_module_from_name(model, param_name)
        return name in matrix_names(module) and should_convert_module(param_name, self.modules_to_not_convert)

    def get_quantize_ops(self) -> "QuantizeExperts":
        """Return the operation that quantizes such a parameter."""
        return QuantizeExperts(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        if any(isinstance(parameter, PackedExperts) for parameter in model.parameters()):
            compute_by_expert(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


class QuantizeExperts(ConversionOps):  # type: ignore[misc]
    """Quantize a matrix of all experts; a linear layer is left to transformers."""

    def __init__(self, quantizer: ExpertsQuantizer, of_linear: ConversionOps) -> None:
        """
        Args:
            quantizer: has the settings.
            of_linear: transformers' operation.
        """
        self._settings, self._of_linear = quantizer.quantization_config, of_linear

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the quantized parameters by their names in the model.

        Args:
            input_dict: name in the model -> tensor, or a list with the one tensor.
            model: the model that is loaded.
            kwargs: for transformers' operation.
        """
        (name,) = input_dict
        module, leaf = get_module_from_name(model, name)
        if leaf not in matrix_names(module):
            converted: dict[str, Any] = self._of_linear.convert(input_dict, model=model, **kwargs)
            return converted
        value = input_dict[name]
        weight = value[0] if isinstance(value, list) else value
        settings = self._settings
        plain = weight.to(settings.bnb_4bit_compute_dtype)
        return {name: packed(module, leaf, plain, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)}

"""Quantize fused experts while transformers loads a base: a matrix of one layer at a time, before the next is read.

A base is therefore never in memory as a whole in 16 bits. This holds for files in 16 bits, and for those in MXFP4 or
FP8, whose weights are dequantized while they are read.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from orchestrator.experts import PackedExperts, compute_by_expert, matrix_names, packed
from orchestrator.spec.sections import BaseSection

METHOD = "bitsandbytes_4bit_with_experts"
"""Name of `ExpertsQuantizer` in transformers' registry."""

_THEN_PACKED = "_then_packed_experts"


def with_experts(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Return 4-bit settings with which `from_pretrained` quantizes fused experts too.

    The loaded model's own settings are again those of bitsandbytes.
    """
    config.quant_method = METHOD
    return config


def pack_while_dequantizing(config: Any, method: str, base: BaseSection) -> Any:
    """Return a model's configuration with which `from_pretrained` dequantizes its files, and packs the experts at once.

    Args:
        config: the configuration of a base whose files are quantized; it is changed.
        method: mxfp4 or fp8.
        base: the base's section, with 4 bits.
    """
    holder = config if getattr(config, "quantization_config", None) else config.get_text_config()
    packing = {"quant_type": base.quantization, "double_quant": base.double_quant, "dtype": base.compute_dtype}
    holder.quantization_config |= {"quant_method": method + _THEN_PACKED, "dequantize": True, "packing": packing}
    return config


class PackExperts(ConversionOps):  # type: ignore[misc]
    """Quantizes a matrix of all experts; other weights stay as they are."""

    def __init__(self, quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
        """
        Args:
            quant_type: nf4 or fp4.
            double_quant: also quantize the scales.
            dtype: type in which the experts compute.
        """
        self._quant_type, self._double_quant, self._dtype = quant_type, double_quant, dtype

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the weight, quantized if it is one of experts.

        Args:
            input_dict: any name -> the tensor, or a list with it.
            full_layer_name: its name in the model.
            model: the model that is loaded.
            kwargs: unused.
        """
        module, leaf = get_module_from_name(model, full_layer_name)
        if leaf not in matrix_names(module):
            return input_dict
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        return {name: packed(module, leaf, weight.to(self._dtype), self._quant_type, self._double_quant)}


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """bitsandbytes' 4-bit quantization of linear layers, and of fused experts with the same settings."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is quantized while it is loaded."""
        if super().param_needs_quantization(model, param_name, **kwargs):
            return True
        module, name = get_module_from_name(model, param_name)
        return name in matrix_names(module) and should_convert_module(param_name, self.modules_to_not_convert)

    def get_quantize_ops(self) -> "QuantizeWithExperts":
        """Return the operation that quantizes such a parameter."""
        return QuantizeWithExperts(self.quantization_config, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        if any(isinstance(parameter, PackedExperts) for parameter in model.parameters()):
            compute_by_expert(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


class QuantizeWithExperts(PackExperts):
    """Quantizes a matrix of all experts; a linear layer is left to transformers."""

    def __init__(self, config: BitsAndBytesConfig, of_linear: ConversionOps) -> None:
        """
        Args:
            config: the settings.
            of_linear: transformers' operation.
        """
        super().__init__(config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.bnb_4bit_compute_dtype)
        self._of_linear = of_linear

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the quantized parameter; see `PackExperts.convert`."""
        module, leaf = get_module_from_name(model, full_layer_name)
        convert = super().convert if leaf in matrix_names(module) else self._of_linear.convert
        converted: dict[str, Any] = convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        return converted


class _Packing:
    """Part of a quantizer of dequantized files that packs the experts as soon as they are dequantized."""

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return transformers' conversions, each followed by `PackExperts`."""
        settings = self.quantization_config.packing  # type: ignore[attr-defined]
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)  # type: ignore[misc]
        for each in updated:
            if isinstance(each, WeightConverter):
                dtype = getattr(torch, settings["dtype"])
                each.operations.append(PackExperts(settings["quant_type"], settings["double_quant"], dtype))
        return updated

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter may have another shape than in the model without weights."""
        module, name = get_module_from_name(model, param_name)
        return name in matrix_names(module)


@register_quantization_config("mxfp4" + _THEN_PACKED)
class PackedMxfp4Config(Mxfp4Config):  # type: ignore[misc]
    """Settings of MXFP4 files whose experts are packed while they are loaded."""

    def __init__(self, packing: dict[str, Any], **kwargs: Any) -> None:
        """
        Args:
            packing: arguments of `PackExperts`; the dtype by its name.
            kwargs: of `Mxfp4Config`.
        """
        super().__init__(**kwargs)
        self.quant_method, self.packing = "mxfp4" + _THEN_PACKED, packing


@register_quantization_config("fp8" + _THEN_PACKED)
class PackedFP8Config(FineGrainedFP8Config):  # type: ignore[misc]
    """Settings of FP8 files whose experts are packed while they are loaded."""

    def __init__(self, packing: dict[str, Any], **kwargs: Any) -> None:
        """
        Args:
            packing: arguments of `PackExperts`; the dtype by its name.
            kwargs: of `FineGrainedFP8Config`.
        """
        super().__init__(**kwargs)
        self.quant_method, self.packing = "fp8" + _THEN_PACKED, packing


@register_quantizer("mxfp4" + _THEN_PACKED)
class PackingMxfp4Quantizer(_Packing, Mxfp4HfQuantizer):  # type: ignore[misc]
    """Dequantizes MXFP4 files, and packs their experts."""


@register_quantizer("fp8" + _THEN_PACKED)
class PackingFP8Quantizer(_Packing, FineGrainedFP8HfQuantizer):  # type: ignore[misc]
    """Dequantizes FP8 files, and packs their experts."""


@contextmanager
def read_one_by_one() -> Iterator[None]:
    """Have transformers read one tensor after another, within.

    It reads ahead if files are quantized (5.23, `core_model_loading.py`). The whole base could then be in memory
    beside its packed experts.
    """
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before

"""Quantized weights of a base: how they are requested, and what is changed after they have been loaded."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from orchestrator.base_folder import DEQUANTIZED, model_type
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection
from orchestrator.upstream import float32_weights, names_in_model

_MAMBA, _MAMBA2 = ("dt_proj", "x_proj", "out_proj"), ("out_proj",)
_READ_LAYERS = {
    "mamba": _MAMBA, "falcon_mamba": _MAMBA, "jamba": ("dt_proj",), "mamba2": _MAMBA2, "bamba": _MAMBA2,
    "falcon_h1": _MAMBA2, "granitemoehybrid": _MAMBA2, "nemotron_h": _MAMBA2, "zamba2": _MAMBA2,
}  # fmt: skip
"""Model type -> linear layers whose weight the model reads instead of calling the layer (transformers 5.23)."""


def plain_layers(base: BaseSection) -> list[str]:
    """Return the layers that are not quantized besides those that transformers leaves out; [] for most families.

    Their weights are multiplied by the model itself or by a kernel, which cannot read quantized ones.
    """
    found = _READ_LAYERS.get(model_type(base) or "", ())
    return [*found, "lm_head"] if found else []


def quantization_config(base: BaseSection) -> Any:
    """Return transformers' quantization settings for the base, or None."""
    import torch
    from transformers import BitsAndBytesConfig

    left_out = plain_layers(base) or None
    if base.quantization == "none":
        return None
    if base.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantization,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, base.compute_dtype),
        llm_int8_skip_modules=left_out,
    )


def loading_config(base: BaseSection) -> Any:
    """Return the settings with which `from_pretrained` quantizes a base: in 4 bits, fused experts are quantized too."""
    config = quantization_config(base)
    if not base.is_4bit:
        return config
    from orchestrator.experts_quantizer import with_experts

    return with_experts(config)


def dequantization_config(method: str) -> Any:
    """Return transformers' settings that dequantize stored weights while they are loaded.

    Args:
        method: one of `DEQUANTIZED`.
    """
    import transformers

    return getattr(transformers, DEQUANTIZED[method])(dequantize=True)


def quantize_linears(model: Any, base: BaseSection) -> None:
    """Quantize a loaded model as transformers does while it loads one: the same layers, one at a time.

    Args:
        model: a model with weights that are not quantized; it is changed.
        base: its section, with a base.quantization other than none.
    """
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization_config(base), pre_quantized=False)
    plain = dict(model.named_modules())
    quantizer.preprocess_model(model=model, device_map=None)  # replaces the layers by empty ones
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit | Linear8bitLt):
            continue
        given = plain.pop(name)
        weight, device = given.weight.detach(), given.weight.device
        settings = {field: value for field, value in vars(layer.weight).items() if field != "SCB"}
        if isinstance(layer, Linear4bit):
            layer.weight = Params4bit(weight, requires_grad=False, **settings).to(device)
        else:  # bitsandbytes quantizes to 8 bits only on the way from the CPU
            layer.weight = Int8Params(weight.cpu(), requires_grad=False, **settings).to(device)
        layer.bias = given.bias
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    if base.is_4bit:
        quantize_experts(model, base)


def quantize_experts(model: Any, base: BaseSection) -> None:
    """Quantize the fused experts of a loaded model to 4 bits, one matrix after another.

    Args:
        model: it is changed.
        base: its section.
    """
    import torch

    from orchestrator.experts import pack_experts

    pack_experts(model, base.quantization, base.double_quant, getattr(torch, base.compute_dtype))


def require_quantized(model: Any, name: str) -> None:
    """Raise RequestError if a 4-bit layer was loaded from plain weights, which transformers does without an error.

    Args:
        model: the loaded base.
        name: its name, for the message.
    """
    from bitsandbytes.nn import Linear4bit

    for layer, module in model.named_modules():
        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is None:
            raise RequestError(
                f"base.model {name}: its files contain {layer} unquantized, but its config.json does not say so",
                "Add the layer to `llm_int8_skip_modules` there, or give the 16-bit model that this one was made from.",
            )


def compute_in(model: Any, dtype: Any) -> None:
    """Make a base compute in this type that was loaded from quantized files.

    transformers leaves the other weights of such files in their own type, and 4-bit layers in the type that the files
    name (5.23, `HfQuantizer.get_new_dtype`).
    """
    from bitsandbytes.nn import Linear4bit

    kept = float32_weights(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_packed(parameter) and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = dtype
            layer.weight.quant_state.dtype = dtype
    model.config.dtype = dtype


def is_packed(parameter: Any) -> bool:
    """Return whether a parameter holds packed weights, whose type may be a floating one."""
    from bitsandbytes.nn import Int8Params, Params4bit

    from orchestrator.experts import PackedExperts

    return isinstance(parameter, Int8Params | Params4bit | PackedExperts)


def dequantize_head(model: Any, dtype: Any) -> None:
    """Replace a quantized LM head by a plain one of the same values: losses are computed from its weight."""
    from accelerate.hooks import add_hook_to_module
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight
    from torch.nn import Linear, Parameter

    packed = model.get_output_embeddings()
    if not isinstance(packed, Linear4bit | Linear8bitLt):
        return
    plain = Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    plain.weight = Parameter(dequantize_module_weight(packed).to(dtype), requires_grad=False)
    plain.bias = packed.bias
    if hook := vars(packed).get("_hf_hook"):  # moves inputs to the head's device, in a base on several GPUs
        add_hook_to_module(plain, hook)
    model.set_output_embeddings(plain)


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, which it does on a CPU with avx512_bf16.

    After any forward in evaluation mode, a repacked layer goes through `gemv_4bit`, which has no backward: later
    gradients are silently wrong (bitsandbytes 0.50.2, `nn/modules.py`, `Linear4bit.forward`).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_left_out(config: Any, kind: Any, stored: Sequence[str], trust_remote_code: bool) -> Any:
    """Return the configuration with exactly those layers left out of the quantization that the files hold unquantized.

    Its own list may have the names of another version of transformers, which then takes plain weights for 4-bit ones.

    Args:
        config: configuration of a base that bitsandbytes has quantized.
        kind: from `model_class`.
        stored: names of the weights in its files.
        trust_remote_code: run Python code that comes with the model.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = torch.nn.Linear | Conv1D
    with torch.device("meta"):
        model = kind.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    packed = {name.rpartition(".weight.")[0] or name.removesuffix(".SCB") for name in stored if _is_scale(name)}
    names = names_in_model(model, [f"{name}.weight" for name in packed])
    quantized = {name and name.removesuffix(".weight") for name in names.values()}
    plain = [name for name, module in model.named_modules() if isinstance(module, linear) and name not in quantized]
    holder = config if getattr(config, "quantization_config", None) else config.get_text_config()
    holder.quantization_config["llm_int8_skip_modules"] = [f"^{re.escape(name)}$" for name in plain]
    return config


def _is_scale(name: str) -> bool:
    """Return whether a stored tensor holds the scales of a quantized weight (bitsandbytes 0.50)."""
    return name.endswith((".weight.absmax", ".SCB"))

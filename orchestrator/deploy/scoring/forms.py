"""Forms in which an adapter may be deployed, opened in memory as their exports would be loaded."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, assert_never, get_args

from orchestrator.base import configuration, evict, load_base, load_tokenizer
from orchestrator.base_folder import stored_quantization
from orchestrator.base_weights import keep_trainable, quantize_experts
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.load import attach_adapter
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection

Form = Literal["adapter", "adapter-16bit", "merged", "merged-original", "merged-4bit"]
"""The forms of an adapter:

- adapter: on the base as in training.
- adapter-16bit: on the base's original weights.
- merged: merged into the weights it was trained on, dequantized.
- merged-original: merged into the original weights.
- merged-4bit: `merged`, quantized as the base was.
"""

FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class OpenForm:
    """A form that is loaded, in evaluation mode."""

    model: Any
    tokenizer: Any
    dtype: str
    """Type of matrix products and of the weights that are not quantized."""


def forms_of(base: BaseSection) -> tuple[Form, ...]:
    """Return the forms that an adapter on this base can have."""
    return tuple(form for form in FORMS if form != "merged-4bit" or base.is_4bit)


def require_form(base: BaseSection, form: Form) -> None:
    """Check whether a form can be opened, before any model is loaded.

    Raises:
        RequestError: the base does not have such weights, or cannot be found.
    """
    load_tokenizer(base)  # raises if the base cannot be found
    if form not in forms_of(base):
        raise RequestError(
            f"form {form}: base {base.model} was not loaded in 4 bits", f"Choose from {', '.join(forms_of(base))}."
        )
    stored = stored_quantization(base)
    if form in ("adapter-16bit", "merged-original") and stored and not stored.is_dequantized:
        raise RequestError(
            f"form {form}: the files of {base.model} contain quantized weights",
            "Choose other forms (adapter, merged, merged-4bit), or train on the 16-bit model that it was made from.",
        )


@contextmanager
def open_form(adapter: AdapterRef, form: Form, dtype: str) -> Iterator[OpenForm]:
    """Open a form. On exit its memory is freed, even if the caller still has a reference to the model.

    Merged forms are made layer by layer, within the memory of a model in `dtype`.

    Args:
        adapter: the adapter.
        form: the form to open.
        dtype: torch's name of the type of the weights; `adapter` and `merged-4bit` use the base's `compute_dtype`.

    Raises:
        RequestError: the base cannot be loaded, or the adapter does not match it.
    """
    tokenizer = load_tokenizer(adapter.base, adapter.config.data.chat_template if adapter.config else None)
    model = _open(adapter, form, dtype)
    model.eval()
    try:
        yield OpenForm(model, tokenizer, adapter.base.compute_dtype if form in ("adapter", "merged-4bit") else dtype)
    finally:
        _release(model)
        evict()


def _open(adapter: AdapterRef, form: Form, dtype: str) -> Any:
    base = adapter.base
    match form:
        case "adapter":
            return attach_adapter(load_base(base), adapter)
        case "adapter-16bit":
            return attach_adapter(load_base(_unquantized(base, dtype)), adapter)
        case "merged-original":
            # Loaded in the type of the files, so that weights are rounded once, after the sum.
            return _merged(attach_adapter(load_base(_unquantized(base, _file_dtype(base))), adapter), dtype)
        case "merged":
            model = load_base(base)
            _dequantize(model)
            return _merged(attach_adapter(model, adapter), dtype)
        case "merged-4bit":
            model = load_base(base)
            names = _dequantize(model)
            merged = _merged(attach_adapter(model, adapter), dtype)
            _quantize(merged, names, base)
            return merged
        case _:
            assert_never(form)


def _unquantized(base: BaseSection, dtype: str) -> BaseSection:
    return base.model_copy(update={"quantization": "none", "compute_dtype": dtype})


def _file_dtype(base: BaseSection) -> str:
    return str(configuration(base).dtype or "float32").removeprefix("torch.")


def _dequantize(model: Any) -> list[str]:
    """Replace quantized layers and experts with plain ones of the same values, one at a time.

    Returns:
        The names of the layers.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight
    from torch.nn import Linear, Parameter

    from orchestrator.experts import PackedExperts

    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    for name in names:
        packed = model.get_submodule(name)
        plain = Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        plain.weight = Parameter(dequantize_module_weight(packed), requires_grad=False)
        plain.bias = packed.bias
        model.set_submodule(name, plain)
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, PackedExperts):
            module, _, leaf = name.rpartition(".")
            whole = parameter.dequantized()
            plain = Parameter((whole.mT if parameter.is_transposed else whole).contiguous(), requires_grad=False)
            setattr(model.get_submodule(module), leaf, plain)
    if names:
        model.hf_quantizer.remove_quantization_config(model)
    return names


def _merged(adapted: Any, dtype: str) -> Any:
    """Merge an adapter into plain layers: summed in float32, then rounded once.

    PEFT alone sums in the base's type, and after merging into a 4-bit weight it quantizes the weight again (peft 0.21,
    issues 2321 and 2368). Here the layers are plain, and each is converted to float32 while it is merged.
    """
    import torch
    from peft.tuners.lora import Linear

    from orchestrator.adapters.expert_updates import AdaptedExperts

    target = getattr(torch, dtype)
    for layer in adapted.modules():
        if isinstance(layer, AdaptedExperts):
            plain, name = layer.get_base_layer(), layer.parameter_name
            whole = layer.get_param().detach().to(torch.float32, copy=True)
            setattr(plain, name, torch.nn.Parameter(whole, requires_grad=False))
            layer.merge()
            layer.get_param().data = layer.get_param().data.to(target)
        elif isinstance(layer, Linear):
            plain = layer.get_base_layer()
            # A new parameter: a head may share its weight with the embedding, which must not change.
            plain.weight = torch.nn.Parameter(plain.weight.detach().to(torch.float32, copy=True), requires_grad=False)
            layer.merge()
            plain.weight.data = plain.weight.data.to(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that the layers are already merged
        model = adapted.merge_and_unload()
    _cast(model, target)
    return model


def _quantize(model: Any, names: Sequence[str], base: BaseSection) -> None:
    """Quantize these layers one at a time, as `load_base` would when loading the merged model from a folder."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    compute_dtype = getattr(torch, base.compute_dtype)
    settings = {"compress_statistics": base.double_quant, "quant_type": base.quantization}
    _cast(model, compute_dtype)
    for name in names:
        plain = model.get_submodule(name)
        shape = plain.in_features, plain.out_features
        packed = Linear4bit(*shape, bias=False, compute_dtype=compute_dtype, device="meta", **settings)
        whole = Params4bit(plain.weight.detach(), requires_grad=False, module=packed, **settings)
        packed.weight = whole.to(plain.weight.device)  # this quantizes
        packed.bias = plain.bias
        model.set_submodule(name, packed)
    quantize_experts(model, base)
    keep_trainable(model)


def _release(model: Any) -> None:
    """Drop the submodules at every level, so that the weights are freed.

    PEFT's model keeps a reference to a method of the inner model (peft 0.21, `PeftModelForCausalLM`).
    """
    for module in list(model.modules()):
        module._modules.clear()


def _cast(model: Any, dtype: Any) -> None:
    """Cast parameters but not buffers: transformers keeps those, such as rotary frequencies, in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

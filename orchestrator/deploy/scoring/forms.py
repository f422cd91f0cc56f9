"""An adapter in the forms it may be deployed in, opened in memory as their exports would be loaded."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from orchestrator.base import base_location, evict, keep_trainable, load_base, load_tokenizer
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.load import put_on
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection

Form = Literal["adapter", "adapter-16bit", "merged", "merged-original", "merged-4bit"]
"""adapter: on the base as it was trained on. adapter-16bit: on the base's original weights. merged: one matrix a layer,
of the weights it was trained on (dequantised) and its update. merged-original: the same, of the original weights.
merged-4bit: merged, then quantised as the base was."""

FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class OpenForm:
    """A form in memory, in evaluation mode."""

    model: Any
    tokenizer: Any
    dtype: str
    """Of matrix products, and of the weights that are not quantised."""


def forms_of(base: BaseSection) -> tuple[Form, ...]:
    """Those that an adapter on this base can have."""
    return tuple(form for form in FORMS if form != "merged-4bit" or base.is_4bit)


def require_form(base: BaseSection, form: Form) -> None:
    """Find out before anything is loaded whether a form can be opened.

    Raises:
        RequestError: the base has no such weights, or is not there.
    """
    load_tokenizer(base)  # a base that is not there is told here
    if form not in forms_of(base):
        raise RequestError(
            f"form {form}: the base {base.model} was not held in 4 bits", f"Its forms: {', '.join(forms_of(base))}."
        )
    if form in ("adapter-16bit", "merged-original") and getattr(_file_config(base), "quantization_config", None):
        raise RequestError(
            f"form {form}: the very files of {base.model} are quantised",
            "Name other forms (adapter, merged, merged-4bit), or train on the 16-bit model that it was made from.",
        )


@contextmanager
def open_form(subject: AdapterRef, form: Form, dtype: str) -> Iterator[OpenForm]:
    """Open a form; its memory is free at the end, whoever still names the model.

    The merged forms are made layer by layer, within the memory of a model in `dtype`.

    Args:
        subject: the adapter.
        form: see `Form`.
        dtype: type of the weights, by torch's name; `adapter` and `merged-4bit` have the base's own.

    Raises:
        RequestError: its base cannot be loaded.
    """
    tokenizer = load_tokenizer(subject.base, subject.config.data.chat_template if subject.config else None)
    model = _open(subject, form, dtype)
    model.eval()
    try:
        yield OpenForm(model, tokenizer, subject.base.compute_dtype if form in ("adapter", "merged-4bit") else dtype)
    finally:
        _take_apart(model)
        evict()


def _open(subject: AdapterRef, form: Form, dtype: str) -> Any:
    base = subject.base
    match form:
        case "adapter":
            return put_on(load_base(base), subject)
        case "adapter-16bit":
            return put_on(load_base(_unquantised(base, dtype)), subject)
        case "merged-original":
            # In the type of the files: what is rounded before the sum would be rounded twice.
            return _merged(put_on(load_base(_unquantised(base, _file_dtype(base))), subject), dtype)
        case "merged":
            model = load_base(base)
            _dequantise(model)
            return _merged(put_on(model, subject), dtype)
        case "merged-4bit":
            model = load_base(base)
            names = _dequantise(model)
            merged = _merged(put_on(model, subject), dtype)
            _quantise(merged, names, base)
            return merged


def _unquantised(base: BaseSection, dtype: str) -> BaseSection:
    return base.model_copy(update={"quantization": "none", "compute_dtype": dtype})


def _file_config(base: BaseSection) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        base_location(base), revision=base.revision, trust_remote_code=base.trust_remote_code
    )


def _file_dtype(base: BaseSection) -> str:
    return str(_file_config(base).dtype or "float32").removeprefix("torch.")


def _dequantise(model: Any) -> list[str]:
    """Replace quantised layers by plain ones of the same values, one at a time.

    Returns:
        Names of the layers.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight
    from torch.nn import Linear, Parameter

    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    for name in names:
        packed = model.get_submodule(name)
        plain = Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        plain.weight = Parameter(dequantize_module_weight(packed), requires_grad=False)
        plain.bias = packed.bias
        model.set_submodule(name, plain)
    if names:
        model.hf_quantizer.remove_quantization_config(model)
    return names


def _merged(adapted: Any, dtype: str) -> Any:
    """Base and adapter as one plain model: summed in float32, then rounded once.

    PEFT alone sums in the base's type, and merges into a 4-bit weight by quantising it again (peft 0.21, issues 2321
    and 2368). It stands on plain layers here, each of which is widened while it is merged.
    """
    import torch
    from peft.tuners.lora import Linear

    target = getattr(torch, dtype)
    for layer in adapted.modules():
        if isinstance(layer, Linear):
            held = layer.get_base_layer()
            # A parameter of its own: a head that shares the embedding's must not change that.
            held.weight = torch.nn.Parameter(held.weight.detach().to(torch.float32, copy=True), requires_grad=False)
            layer.merge()
            held.weight.data = held.weight.data.to(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these layers are merged already
        model = adapted.merge_and_unload()
    _cast(model, target)
    return model


def _quantise(model: Any, names: Sequence[str], base: BaseSection) -> None:
    """Quantise these layers, one at a time, as `load_base` does when it loads the merged model from a folder."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    compute_dtype = getattr(torch, base.compute_dtype)
    kind = {"compress_statistics": base.double_quant, "quant_type": base.quantization}
    _cast(model, compute_dtype)
    for name in names:
        plain = model.get_submodule(name)
        shape = plain.in_features, plain.out_features
        packed = Linear4bit(*shape, bias=False, compute_dtype=compute_dtype, device="meta", **kind)
        whole = Params4bit(plain.weight.detach(), requires_grad=False, module=packed, **kind)
        packed.weight = whole.to(plain.weight.device)  # this quantises
        packed.bias = plain.bias
        model.set_submodule(name, packed)
    keep_trainable(model)


def _take_apart(model: Any) -> None:
    """At every level: PEFT's model holds a method of the one within (peft 0.21, `PeftModelForCausalLM`)."""
    for module in list(model.modules()):
        module._modules.clear()


def _cast(model: Any, dtype: Any) -> None:
    """Parameters only: transformers keeps buffers, such as rotary frequencies, in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

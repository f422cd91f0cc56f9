"""The 4-bit base: loaded once a process, leased to one trial after another, clean in and clean out."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection

_kept: tuple[BaseSection, Any] | None = None
"""The base this process holds, and the section it was loaded from."""


def base_location(base: BaseSection) -> str:
    """Hub id or folder that transformers loads."""
    return str(BASE_DIR) if base.model == "embedded" else base.model


def load_tokenizer(base: BaseSection) -> Any:
    """The base's tokenizer, with a padding token.

    Raises:
        RequestError: there is no tokenizer of that name.
    """
    from transformers import AutoTokenizer

    _require_folder(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_location(base), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(base, error) from error
    if base.pad_token == "eos" or (base.pad_token is None and tokenizer.pad_token is None):
        tokenizer.pad_token = tokenizer.eos_token
    elif base.pad_token is not None:
        if base.pad_token not in tokenizer.get_vocab():
            raise RequestError(f"base.pad_token {base.pad_token!r} is not a token of {base.model}")
        tokenizer.pad_token = base.pad_token
    return tokenizer


def load_base(base: BaseSection) -> Any:
    """The base in evaluation form: quantised as asked, frozen, on this process's GPU (or spread over its GPUs)."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _require_folder(base)
    compute_dtype = getattr(torch, base.compute_dtype)
    quantization = None
    if base.quantization != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base.quantization,
            bnb_4bit_use_double_quant=base.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    gpus = torch.cuda.device_count()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base_location(base),
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            quantization_config=quantization,
            dtype=compute_dtype,
            device_map="auto" if gpus > 1 else {"": 0 if gpus else "cpu"},
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(base, error) from error
    model.config.use_cache = False
    model.requires_grad_(False)
    keep_trainable(model)
    return model


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU with avx512_bf16.

    After any forward in evaluation mode such a layer goes through `gemv_4bit`, which has no backward: later
    gradients are silently wrong (bitsandbytes 0.50.2, `nn/modules.py`, `Linear4bit.forward`).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def lease(base: BaseSection, trains_biases: bool = False) -> Iterator[Any]:
    """The base for one trial. Loaded at first use and kept; what the trial hung on it is taken off afterwards.

    If the trial fails, or trains the base's own biases, the base is dropped instead of kept.
    """
    global _kept
    if _kept is None or _kept[0] != base:
        drop()
        _kept = (base, load_base(base))
    model = _kept[1]
    forward = model.__dict__.get("forward")
    hooks = {module: (dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()}
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    clean = False
    try:
        yield model
        _take_off(model, forward, hooks)
        clean = not trains_biases and before == {name: id(parameter) for name, parameter in model.named_parameters()}
    finally:
        if not clean:
            drop()
        _free_memory()


def drop() -> None:
    """Forget the kept base."""
    global _kept
    _kept = None
    _free_memory()


def _take_off(model: Any, forward: Any, hooks: dict[Any, Any]) -> None:
    """Remove what SFTTrainer and PEFT leave on a base: adapters, hooks, a patched forward, training flags.

    Args:
        model: the base.
        forward: its own `forward` attribute before the trial, if it had one (accelerate's dispatch sets it).
        hooks: module -> its forward hooks and pre-hooks before the trial.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    # `disable_input_require_grads` forgets all but the last of the hooks that PEFT and the Trainer each set.
    for module, (after, ahead) in hooks.items():
        for registered, own in ((module._forward_hooks, after), (module._forward_pre_hooks, ahead)):
            for key in [key for key in registered if key not in own]:
                del registered[key]
    model.activation_checkpointing_disable()
    if forward is None:
        model.__dict__.pop("forward", None)  # trl's `add_fused_lm_head`
    else:
        model.forward = forward
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
    model.requires_grad_(False)
    model.eval()


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _require_folder(base: BaseSection) -> None:
    if Path(base.model).is_absolute() and not (Path(base.model) / "config.json").is_file():
        raise RequestError(f"base.model {base.model}: there is no model in this folder (no config.json)")


def _not_loadable(base: BaseSection, error: Exception) -> RequestError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RequestError(
        f"base.model {base.model}: cannot be loaded: {reason}",
        "Give a hub id (owner/name), a folder by its path, or `embedded`; private models need HF_TOKEN.",
    )

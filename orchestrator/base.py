"""The base model: loaded once a process and never changed. Each trial has its own modules over the shared weights."""

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from types import NoneType
from typing import Any

from orchestrator.base_folder import (
    StoredQuantization,
    base_location,
    config_file,
    has_experts,
    not_loadable,
    quantization_of,
    require_folder,
    weight_map,
)
from orchestrator.base_weights import (
    compute_in,
    dequantization_config,
    dequantize_head,
    keep_trainable,
    loading_config,
    quantize_experts,
    quantize_linears,
    require_quantized,
    with_left_out,
)
from orchestrator.errors import RequestError
from orchestrator.imports import importing
from orchestrator.positions import forget_earlier_batches
from orchestrator.spec.sections import BaseSection

_cached: tuple[BaseSection, Any] | None = None
"""The base that this process holds, and the section it was loaded from."""

_cache_lock = RLock()
"""Makes trials that start at the same time in threads load one base."""


def import_tokenizers() -> None:
    """Import what `load_tokenizer` may need; this takes seconds."""
    with importing():
        import transformers.models.auto.tokenization_auto
        import transformers.utils.type_validators  # noqa: F401  # of some models' configurations, Llama's among them


def load_tokenizer(base: BaseSection, chat_template: str | None = None) -> Any:
    """Load the base's tokenizer, with a padding token, the new tokens, and base.eos_token if it is given.

    Args:
        base: the base.
        chat_template: replaces the tokenizer's own template.

    Raises:
        RequestError: there is no such tokenizer, or it lacks base.eos_token or base.pad_token.
    """
    with importing():
        from transformers import AutoTokenizer

    require_folder(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_location(base), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise not_loadable(base, error) from error
    tokenizer.add_tokens(list(base.new_tokens))
    if base.eos_token is not None:
        _require_token(base.eos_token, "base.eos_token", tokenizer, base)
        tokenizer.eos_token = base.eos_token
    if base.pad_token == "eos" or (base.pad_token is None and tokenizer.pad_token is None):
        tokenizer.pad_token = tokenizer.eos_token
    elif base.pad_token is not None:
        _require_token(base.pad_token, "base.pad_token", tokenizer, base)
        tokenizer.pad_token = base.pad_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _require_token(token: str, field: str, tokenizer: Any, base: BaseSection) -> None:
    if token not in tokenizer.get_vocab():
        raise RequestError(
            f"{field} {token!r} is not a token of {base.model}", "Add it to the tokenizer with base.new_tokens."
        )


def new_token_ids(base: BaseSection, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens whose embeddings train, sorted.

    Raises:
        RequestError: the tokenizer splits one of them.
    """
    ids = tokenizer.convert_tokens_to_ids(list(base.new_tokens))
    for token, number in zip(base.new_tokens, ids, strict=True):
        if tokenizer.convert_ids_to_tokens(number) != token:
            raise RequestError(f"base.new_tokens: {token!r} is not one token of {base.model}")
    return sorted(ids)


def load_base(base: BaseSection, place: Any = None) -> Any:
    """Load the base for evaluation: quantized as requested, and frozen.

    Args:
        base: what to load.
        place: transformers' `device_map`; default `device_map()`.

    Raises:
        RequestError: it cannot be loaded.
    """
    import torch

    require_folder(base)
    try:
        model, stored = _from_pretrained(base, place)
    except (OSError, ValueError) as error:
        raise not_loadable(base, error) from error
    if stored is not None:
        base, dtype = stored.applied_to(base), getattr(torch, base.compute_dtype)
        require_quantized(model, base.model)
        compute_in(model, dtype)
        dequantize_head(model, dtype)
        if stored.is_dequantized and base.quantization != "none":
            quantize_linears(model, base)
        elif base.is_4bit:  # bitsandbytes' files hold fused experts in 16 bits
            quantize_experts(model, base)
    model.config.use_cache = False
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):  # nothing reads them, and with them some families cannot generate
        text.output_router_logits = False
    if base.new_tokens:
        _grow_vocabulary(model, len(load_tokenizer(base)))
    model.requires_grad_(False)
    keep_trainable(model)
    forget_earlier_batches(model)
    return model


def _from_pretrained(base: BaseSection, place: Any) -> tuple[Any, StoredQuantization | None]:
    """Load a base with transformers.

    Returns:
        The model, and how its files hold quantized weights.
    """
    import torch

    where: dict[str, Any] = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    reading: AbstractContextManager[None] = nullcontext()
    config = configuration(base)
    kind, stored = model_class(config), quantization_of(config.to_dict())
    if stored is not None:
        stored.require_trainable(base.model)
        if stored.is_dequantized and base.is_4bit and has_experts(base):
            from orchestrator.experts_quantizer import pack_while_dequantizing, read_one_by_one

            reading = read_one_by_one()
            where["config"] = pack_while_dequantizing(config, stored.method, base)
        elif stored.is_dequantized:
            where["quantization_config"] = dequantization_config(stored.method)
        elif names := weight_map(base):
            where["config"] = with_left_out(config, kind, list(names), base.trust_remote_code)
    elif base.quantization != "none":
        where["quantization_config"] = loading_config(base)
    with reading:
        model = kind.from_pretrained(
            base_location(base),
            dtype=getattr(torch, base.compute_dtype),
            device_map=device_map() if place is None else place,
            **where,
        )
    return model, stored


def configuration(base: BaseSection) -> Any:
    """Load the base's transformers configuration."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        base_location(base), revision=base.revision, trust_remote_code=base.trust_remote_code
    )


def model_class(config: Any) -> Any:
    """Return transformers' class that loads a language model: for multimodal ones, perhaps the whole model.

    Args:
        config: the model's configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _is_only_multimodal(config) else AutoModelForCausalLM


def _is_only_multimodal(config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(config)
    return kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def is_only_multimodal(base: BaseSection) -> bool:
    """Return whether transformers has no class for the text model alone.

    False for a base that is not on this machine, and for one with its own code, which is not run for this.
    """
    config = _own_configuration(base)
    return config is not None and _is_only_multimodal(config)


def empty_model(base: BaseSection) -> Any:
    """Build a base without its weights. None for one with its own code, or one that is not on this machine.

    Raises:
        RequestError: transformers cannot build it.
    """
    import torch

    try:
        config = _own_configuration(base)
        with torch.device("meta"):
            return config and model_class(config).from_config(config, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise not_loadable(base, error) from error


def _own_configuration(base: BaseSection) -> Any:
    from transformers import AutoConfig

    file = config_file(base)
    if file is None or not file.is_file() or base.trust_remote_code:
        return None
    return AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)


def _grow_vocabulary(model: Any, num_tokens: int) -> None:
    """Enlarge the embeddings and the head to this many tokens. New rows start as the mean of the others.

    If the base already has more rows than its tokenizer has tokens, new tokens start as the spare rows.
    """
    import torch

    known = model.get_input_embeddings().weight.shape[0]
    if num_tokens <= known:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad():
            layer.weight[known:] = layer.weight[:known].float().mean(0).to(layer.weight.dtype)


def device_map() -> Any:
    """Return where transformers puts a model: on this process's GPU, spread over its GPUs, or on the CPU."""
    import torch

    gpus = torch.cuda.device_count()
    return "auto" if gpus > 1 else {"": 0 if gpus else "cpu"}


def device_name() -> str:
    """Return the name of this process's GPU, or cpu."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


def shared_base(base: BaseSection, place: Any = None) -> Any:
    """Return the base itself. It is loaded at first use and cached; a cached base of another section is evicted first.

    All trials of this process use it: read it, but attach nothing to it. `share_modules` makes a trial's own modules.

    Args:
        base: what to load.
        place: as in `load_base`.
    """
    global _cached
    with _cache_lock:
        if _cached is None or _cached[0] != base:
            evict()
            _cached = (base, load_base(base, place))
        return _cached[1]


def share_modules(model: Any, own_biases: bool = False) -> Any:
    """Make new modules over the same weights for one trial; its adapters, hooks and patches are attached to them.

    The result is what `copy.deepcopy` would make without copying weights, in an eighth of the time: most attributes
    of hundreds of modules are empty.

    Args:
        model: a base, or one with an adapter. It is not changed, and several copies may be in use at once.
        own_biases: copy the biases, for a trial that trains them.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Linear8bitLt
    from torch import Tensor, dtype
    from torch.nn import Parameter

    modules = list(model.modules())
    memo: dict[int, Any] = {id(module): module.__new__(type(module)) for module in modules}
    for module in modules:
        memo |= {id(value): value for held in (module._parameters, module._buffers) for value in held.values()}
        if isinstance(module, Linear8bitLt):
            # A first forward, or a move, changes the parameter itself (bitsandbytes 0.50.2, `Int8Params`).
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            held = module.weight.data
            memo[id(module.weight)] = Int8Params(held, requires_grad=False, CB=held, SCB=scales)
            memo[id(module.state)] = _fresh_state(module.state)
    if own_biases:
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":  # PEFT may train these
                memo[id(parameter)] = Parameter(parameter.detach().clone(), requires_grad=False)
    shared = {bool, int, float, str, NoneType, type, dtype, Tensor, QuantState}
    containers = {dict, list, set, OrderedDict}
    for module in modules:
        made = vars(memo[id(module)])
        for name, value in vars(module).items():
            kind = type(value)
            if kind in shared:
                made[name] = value
            elif kind in containers and not value:
                made[name] = kind()
            else:
                made[name] = copy.deepcopy(value, memo)
    return memo[id(model)]


def _fresh_state(state: Any) -> Any:
    """Return the state of an 8-bit layer before its first forward."""
    made = copy.copy(state)
    made.reset_grads()
    made.idx = None
    return made


@contextmanager
def guarded(base: BaseSection) -> Iterator[None]:
    """Run a block in which a trial uses the shared base, and evict the base if the block changed it."""
    model = shared_base(base)
    before = _weights(model)
    try:
        yield
    finally:
        if _weights(model) != before:
            evict()
        _free_memory()


def evict() -> None:
    """Drop the cached base."""
    global _cached
    with _cache_lock:
        _cached = None
    _free_memory()


def _weights(model: Any) -> dict[str, tuple[Any, ...]]:
    """Return what changes if a parameter is replaced, moved, written to, or set to train."""
    return {
        name: (id(parameter), parameter.data_ptr(), parameter._version, parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

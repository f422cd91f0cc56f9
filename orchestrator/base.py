"""The base: loaded once a process, and never touched: each trial has a shell of its own over its weights."""

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from types import NoneType
from typing import Any

from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError
from orchestrator.imports import importing
from orchestrator.spec.sections import BaseSection

_kept: tuple[BaseSection, Any] | None = None
"""The base this process holds, and the section it was loaded from."""

_keeping = RLock()
"""Trials that start at once in threads load one base."""


def base_location(base: BaseSection) -> str:
    """Hub id or folder that transformers loads."""
    return str(BASE_DIR) if base.model == "embedded" else base.model


def hub_id(model: str) -> str | None:
    """A base's id on the hub; None for the embedded one and for a folder, whose path means nothing elsewhere."""
    return None if model == "embedded" or Path(model).is_absolute() else model


@cache
def base_commit(base: BaseSection) -> str | None:
    """The commit that a hub id and its revision stand for on this machine; None for a folder and the embedded base."""
    if hub_id(base.model) is None or (config := config_file(base)) is None:
        return None
    return config.parent.name  # .../snapshots/COMMIT/config.json


def config_file(base: BaseSection) -> Path | None:
    """Its configuration on this machine; None where a hub id has not been fetched yet. A folder's need not exist."""
    from huggingface_hub import try_to_load_from_cache

    if hub_id(base.model) is None:
        return Path(base_location(base)) / "config.json"
    found = try_to_load_from_cache(base.model, "config.json", revision=base.revision)
    return Path(found) if isinstance(found, str) else None


def import_tokenizers() -> None:
    """Import what `load_tokenizer` may need, which takes seconds."""
    with importing():
        import transformers.models.auto.tokenization_auto
        import transformers.utils.type_validators  # noqa: F401  # of some models' configurations, Llama's among them


def load_tokenizer(base: BaseSection, chat_template: str | None = None) -> Any:
    """Load the base's tokenizer, with a padding token and base.eos_token where one is given.

    Args:
        base: whose it is.
        chat_template: writes conversations instead of its own.

    Raises:
        RequestError: there is no tokenizer of that name, or it lacks base.eos_token or base.pad_token.
    """
    with importing():
        from transformers import AutoTokenizer

    require_folder(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_location(base), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(base, error) from error
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
            f"{field} {token!r} is not a token of {base.model}", "base.new_tokens adds a token to the tokenizer."
        )


def new_token_ids(base: BaseSection, tokenizer: Any) -> list[int]:
    """Ids of the tokens whose embeddings train.

    Raises:
        RequestError: one of them is not one token.
    """
    ids = tokenizer.convert_tokens_to_ids(list(base.new_tokens))
    for token, number in zip(base.new_tokens, ids, strict=True):
        if tokenizer.convert_ids_to_tokens(number) != token:
            raise RequestError(f"base.new_tokens: {token!r} is not one token of {base.model}")
    return sorted(ids)


def load_base(base: BaseSection, place: Any = None) -> Any:
    """The base in evaluation form: quantised as asked, and frozen.

    Args:
        base: what to load.
        place: transformers' `device_map`; default `device_map()`.

    Raises:
        RequestError: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    require_folder(base)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base_location(base),
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            quantization_config=quantization_config(base),
            dtype=getattr(torch, base.compute_dtype),
            device_map=device_map() if place is None else place,
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(base, error) from error
    model.config.use_cache = False
    if base.new_tokens:
        make_room(model, len(load_tokenizer(base)))
    model.requires_grad_(False)
    keep_trainable(model)
    return model


def make_room(model: Any, num_tokens: int) -> None:
    """Let the vocabulary hold so many tokens: rows that are added begin as the mean of the others (and in the head).

    Where the base has more rows than its tokenizer has tokens, new tokens begin as those that it has to spare.
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
    """Where transformers puts a model: on this process's GPU, or spread over its GPUs, or on the CPU."""
    import torch

    gpus = torch.cuda.device_count()
    return "auto" if gpus > 1 else {"": 0 if gpus else "cpu"}


def device_name() -> str:
    """Name of this process's GPU, or cpu."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


def quantization_config(base: BaseSection) -> Any:
    """The form in which transformers is asked to hold the base, or None."""
    import torch
    from transformers import BitsAndBytesConfig

    if base.quantization == "none":
        return None
    if base.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantization,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, base.compute_dtype),
    )


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU with avx512_bf16.

    After any forward in evaluation mode such a layer goes through `gemv_4bit`, which has no backward: later
    gradients are silently wrong (bitsandbytes 0.50.2, `nn/modules.py`, `Linear4bit.forward`).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def shared_base(base: BaseSection) -> Any:
    """The base itself: loaded at first use and kept, the one of another section dropped first.

    All trials of this process stand on it: read it, and hang nothing on it, for that there is `share_modules`.
    """
    global _kept
    with _keeping:
        if _kept is None or _kept[0] != base:
            evict()
            _kept = (base, load_base(base))
        return _kept[1]


def share_modules(model: Any, own_biases: bool = False) -> Any:
    """New modules over the same weights, for one trial: adapters, hooks, flags and a patched forward go away with them.

    What `copy.deepcopy` would give with the weights left out, in an eighth of its time: most of what hundreds of
    modules hold is empty.

    Args:
        model: a base, or one with an adapter; it stays as it is, and several shells of it may be in use at once.
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
            memo[id(module.state)] = _unused(module.state)
    if own_biases:
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":  # those that PEFT may train
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


def _unused(state: Any) -> Any:
    """The state of an 8-bit layer that has made no forward."""
    made = copy.copy(state)
    made.reset_grads()
    made.idx = None
    return made


@contextmanager
def guarded(base: BaseSection) -> Iterator[None]:
    """The kept base is in use by a trial. It is dropped if it is another afterwards."""
    model = shared_base(base)
    before = _weights(model)
    try:
        yield
    finally:
        if _weights(model) != before:
            evict()
        _free_memory()


def evict() -> None:
    """Forget the kept base."""
    global _kept
    with _keeping:
        _kept = None
    _free_memory()


def _weights(model: Any) -> dict[str, tuple[Any, ...]]:
    """What tells that a base's parameters are others, lie elsewhere, were written to, or train."""
    return {
        name: (id(parameter), parameter.data_ptr(), parameter._version, parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require_folder(base: BaseSection) -> None:
    """Raises RequestError where the base is to be in a folder, and is not."""
    if Path(base.model).is_absolute() and not (Path(base.model) / "config.json").is_file():
        raise RequestError(f"base.model {base.model}: there is no model in this folder (no config.json)")


def _not_loadable(base: BaseSection, error: Exception) -> RequestError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if base.revision and hub_id(base.model):
        return RequestError(
            f"base.model {base.model} at revision {base.revision}: cannot be loaded: {reason}",
            "base.revision must be a branch, a tag or a commit of it; without a network, one in the hub's cache: "
            f"`hf download {base.model} --revision {base.revision}`. Private models need HF_TOKEN.",
        )
    return RequestError(
        f"base.model {base.model}: cannot be loaded: {reason}",
        "Give a hub id (owner/name), a folder by its path, or `embedded`; private models need HF_TOKEN.",
    )

"""Load a trained adapter on its base."""

from typing import Any

from orchestrator.adapters.bundle import WEIGHTS
from orchestrator.adapters.stops import read_stops, stop_at, stops_of, unique_ids
from orchestrator.base import load_base, load_tokenizer
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.errors import RecordError, RequestError


def load_model_and_tokenizer(adapter: AdapterRef) -> tuple[Any, Any]:
    """Load an adapter on its base (`load_model`), and its tokenizer (`load_own_tokenizer`)."""
    return load_model(adapter), load_own_tokenizer(adapter)


def load_model(adapter: AdapterRef, device_map: Any = None) -> Any:
    """Load the base and attach the adapter: a `PeftModel` in evaluation mode.

    Args:
        adapter: the adapter.
        device_map: see `load_base`.

    Raises:
        RequestError: the base cannot be loaded, or the adapter does not match it.
        RecordError: the adapter's weights cannot be read.
    """
    return attach_adapter(load_base(adapter.base, device_map), adapter)


def attach_adapter(base: Any, adapter: AdapterRef) -> Any:
    """Attach an adapter to a loaded base.

    Args:
        base: the base model, in any precision.
        adapter: the adapter.

    Returns:
        A `PeftModel` in evaluation mode, which stops at the tokens that the adapter was trained to end with.

    Raises:
        RequestError: the adapter does not match this base.
        RecordError: the adapter's weights cannot be read.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from orchestrator.adapters.expert_updates import apply_by_expert

    mismatch = f"{adapter.folder}: adapter and base do not match"
    remedy = f"The adapter was trained on a base of another shape than {adapter.base.model}."
    try:
        with safe_open(adapter.folder / WEIGHTS, "pt") as file:
            in_file = set(file.keys())
        model = PeftModel.from_pretrained(base, str(adapter.folder))
    except SafetensorError as error:
        raise RecordError(f"{adapter.folder / WEIGHTS}: is damaged: {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        line = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise RequestError(f"{mismatch}: {line}", remedy) from error
    apply_by_expert(model)
    # PEFT only warns of tensors without a module, and of modules without a tensor.
    in_model = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if unmatched := {name for name in in_file ^ in_model if ".lora_" in name}:
        raise RequestError(f"{mismatch}: tensor {min(unmatched)} exists in only one of them", remedy)
    stop_at(model.get_base_model(), stop_tokens(adapter, stops_of(base)))
    model.eval()
    return model


def stop_tokens(adapter: AdapterRef, base_stops: list[int]) -> list[int]:
    """Return the token ids that end an adapter's answers.

    Args:
        adapter: the adapter.
        base_stops: stop tokens of its base. They are used, after the tokenizer's EOS, if the adapter folder records
            no stop tokens.
    """
    if known := read_stops(adapter.folder):
        return known
    eos = load_own_tokenizer(adapter).eos_token_id
    return unique_ids([] if eos is None else [eos], base_stops)


def load_own_tokenizer(adapter: AdapterRef) -> Any:
    """Load the tokenizer that the adapter was trained with. An adapter of unknown origin may bring its own.

    Raises:
        RequestError: there is no tokenizer.
    """
    if adapter.config is not None:
        return load_tokenizer(adapter.base, adapter.config.data.chat_template)
    if not (adapter.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter.base)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(adapter.folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

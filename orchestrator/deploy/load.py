"""A trained adapter on its base, ready to answer."""

from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import WEIGHTS
from orchestrator.adapters.stops import joined, read_stops, stop_at, stops_of
from orchestrator.base import load_base, load_tokenizer
from orchestrator.deploy.adapter_ref import AdapterRef, find_adapter
from orchestrator.errors import RecordError, RequestError


def load_adapter(subject: AdapterRef | str | Path, output: str = "runs") -> tuple[Any, Any]:
    """Model and tokenizer, in the form they were trained in: `model.generate` answers at once.

    Args:
        subject: an adapter; or a sweep, whose best adapter is taken, or an adapter folder.
        output: folder that holds sweeps, for a sweep that is given by its name.

    Returns:
        A `PeftModel` in evaluation mode, on the GPU if there is one, and its tokenizer.

    Raises:
        RecordError: there is no such sweep or adapter, or it is not whole.
        RequestError: its base cannot be loaded.
    """
    if not isinstance(subject, AdapterRef):
        subject = find_adapter(str(subject), output)
    return load_model(subject), load_own_tokenizer(subject)


def load_model(subject: AdapterRef, place: Any = None) -> Any:
    """The base with the adapter over it, a `PeftModel` in evaluation mode.

    Args:
        subject: the adapter.
        place: see `load_base`.

    Raises:
        RequestError: the base cannot be loaded.
    """
    return put_on(load_base(subject.base, place), subject)


def put_on(base: Any, subject: AdapterRef) -> Any:
    """Put an adapter on a base: a `PeftModel` in evaluation mode, which stops where the adapter was trained to end.

    Args:
        base: in whatever form.
        subject: the adapter.

    Raises:
        RequestError: it does not fit that base.
        RecordError: its weights cannot be read.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    remedy = f"It was trained on a base of another shape than {subject.base.model}."
    try:
        with safe_open(subject.adapter / WEIGHTS, "pt") as file:
            held = set(file.keys())
        model = PeftModel.from_pretrained(base, str(subject.adapter))
    except SafetensorError as error:
        raise RecordError(f"{subject.adapter / WEIGHTS}: is damaged: {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        told = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise RequestError(f"{subject.adapter}: does not fit its base: {told}", remedy) from error
    # Of matrices without a place, and of places without matrices, PEFT only warns.
    placed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if strange := {name for name in held ^ placed if ".lora_" in name}:
        raise RequestError(f"{subject.adapter}: does not fit its base: {min(strange)} is in one of them alone", remedy)
    stop_at(model.get_base_model(), stop_tokens(subject, stops_of(base)))
    model.eval()
    return model


def stop_tokens(subject: AdapterRef, of_base: list[int]) -> list[int]:
    """Ids at which an adapter's answers are over.

    Args:
        subject: the adapter.
        of_base: those of its base, which with the EOS of its tokenizer stand for an adapter that does not say.
    """
    if known := read_stops(subject.adapter):
        return known
    eos = load_own_tokenizer(subject).eos_token_id
    return joined([] if eos is None else [eos], of_base)


def load_own_tokenizer(subject: AdapterRef) -> Any:
    """The tokenizer that the adapter was trained with. One of unknown origin may have brought its own.

    Raises:
        RequestError: there is none.
    """
    if subject.config is not None:
        return load_tokenizer(subject.base, subject.config.data.chat_template)
    if not (subject.adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(subject.base)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(subject.adapter))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

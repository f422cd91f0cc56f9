"""A trained adapter on its base, ready to answer."""

from pathlib import Path
from typing import Any

from orchestrator.base import load_base, load_tokenizer
from orchestrator.deploy.subject import Subject, find_subject


def load_adapter(subject: Subject | str | Path, output: str = "runs") -> tuple[Any, Any]:
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
    if not isinstance(subject, Subject):
        subject = find_subject(str(subject), output)
    return load_model(subject), load_own_tokenizer(subject)


def load_model(subject: Subject) -> Any:
    """The base with the adapter over it, a `PeftModel` in evaluation mode.

    Raises:
        RequestError: the base cannot be loaded.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(subject.base), str(subject.adapter))
    model.eval()
    return model


def load_own_tokenizer(subject: Subject) -> Any:
    """The tokenizer that the adapter was trained with. One of unknown origin may have brought its own.

    Raises:
        RequestError: there is none.
    """
    if subject.config is not None or not (subject.adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(subject.base)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(subject.adapter))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

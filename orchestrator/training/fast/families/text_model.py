"""Finds the text decoder in a base: the whole base, or the language model of a multimodal one."""

from dataclasses import dataclass
from typing import Any

_PATHS = ("model.language_model", "model")


@dataclass(frozen=True)
class TextModel:
    """The decoder of a base, without the LM head."""

    path: str
    """Its name in the base."""
    module: Any
    """Has the embedding, the layers, the last norm and the rotary embedding."""
    config: Any
    """The part of the base's configuration that describes it."""


def text_model(base: Any) -> TextModel:
    """Return the text decoder of a base that eligibility has accepted."""
    found = find_text_model(base)
    assert found is not None
    return found


def find_text_model(base: Any) -> TextModel | None:
    """Return the text decoder of a base; None where its modules have other names."""
    config = text_config(base.config)
    for path in _PATHS:
        module = base
        for name in path.split("."):
            module = getattr(module, name, None)
        if hasattr(module, "layers"):
            return TextModel(path, module, config)
    return None


def text_config(config: Any) -> Any:
    """Return the part of a transformers configuration that describes the text decoder."""
    return getattr(config, "text_config", None) or config

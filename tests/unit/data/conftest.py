from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.spec.sections import BaseSection


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded base's tokenizer: it puts `<s>` before a text, and nothing after it."""
    return load_tokenizer(BaseSection(model="embedded"))

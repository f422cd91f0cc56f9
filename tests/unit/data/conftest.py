from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.spec.sections import BaseSection


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded base's: it puts `<s>` before what it encodes, and nothing after."""
    return load_tokenizer(BaseSection(model="embedded"))

"""The record of answers: the base and the recommended adapter, asked the same held-out prompts."""

from orchestrator.record.models import Record
from orchestrator.record.names import Name


class AnsweredPrompt(Record):
    """A held-out prompt and what was answered."""

    prompt: str
    expected: str
    base: str
    """Answer of the base without an adapter."""
    adapter: str
    """Answer of the adapter."""


class Answers(Record):
    """Answers to the first held-out prompts."""

    trial_id: Name
    step: int
    """Optimizer step of the adapter."""
    prompts: list[AnsweredPrompt]

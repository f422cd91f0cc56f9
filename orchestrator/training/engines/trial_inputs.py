"""The inputs of all trials in a process: the base, its tokenizer, and the rows."""

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.stops import stops_of, unique_ids
from orchestrator.base import load_tokenizer, shared_base
from orchestrator.data import PreparedData
from orchestrator.spec.sections import BaseSection
from orchestrator.training.fast.shard.base import loading_place, shard
from orchestrator.training.fast.step.flat_batch import TokenizedRows


@dataclass(frozen=True)
class TrialInputs:
    """Base, tokenizer and rows, shared by all trials on the same base."""

    base: Any
    """The bare base model. It is shared: trials only read it."""
    tokenizer: Any
    """The base's tokenizer, with a padding token."""
    data: PreparedData
    train: TokenizedRows
    """`data.train` in flat arrays, for the fast engine."""
    held_out: TokenizedRows
    """`data.held_out` in flat arrays, for the fast engine."""

    @classmethod
    def load(cls, base: BaseSection, data: PreparedData) -> "TrialInputs":
        """Load the base, unless it is loaded already, and its tokenizer."""
        tokenizer = load_tokenizer(base, data.chat_template)
        return cls(
            shard(shared_base(base, loading_place(base))),
            tokenizer,
            data,
            TokenizedRows.of(data.train),
            TokenizedRows.of(data.held_out),
        )

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer: those of the training rows, and those of the base itself."""
        return unique_ids(self.data.stop_tokens, stops_of(self.base))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.train.longest, self.held_out.longest)

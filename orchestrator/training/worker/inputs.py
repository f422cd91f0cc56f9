"""The inputs of a worker's trials. Tokenizers and rows are prepared once; the base itself is `orchestrator.base`'s."""

from typing import Any

from orchestrator.base import load_tokenizer, shared_base
from orchestrator.data import PreparedData
from orchestrator.spec.sections import BaseSection
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.shard.base import loading_place, shard
from orchestrator.training.fast.step.flat_batch import TokenizedRows


class InputsCache:
    """Returns the `TrialInputs` of a base. Only one thread may use it."""

    def __init__(self, data: PreparedData) -> None:
        self._data = data
        self._rows: tuple[TokenizedRows, TokenizedRows] | None = None
        self._tokenizers: dict[BaseSection, Any] = {}

    def get(self, base: BaseSection) -> TrialInputs:
        """Return what trials on this base train on. Loads the base, unless it is loaded already."""
        if self._rows is None:
            self._rows = TokenizedRows.of(self._data.train), TokenizedRows.of(self._data.held_out)
        if base not in self._tokenizers:
            self._tokenizers[base] = load_tokenizer(base, self._data.chat_template)
        return TrialInputs(
            shard(shared_base(base, loading_place(base))), self._tokenizers[base], self._data, *self._rows
        )

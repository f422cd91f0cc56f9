"""Stop tokens: which tokens end the answers of training rows, and whether the model learns to write them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orchestrator.data.encode import IGNORED, Tokens
from orchestrator.errors import DataError
from orchestrator.spec.sections import DataSection
from orchestrator.words import counted

_REMEDY = "data.require_stop: false trains on such rows anyway; answers then run on to max_new_tokens."
_TOKENS_SHOWN = 16
"""Tokens at the end of a row that an error quotes."""


@dataclass(frozen=True)
class RowEnds:
    """How the training rows end, before they are cut to max_length."""

    stop_tokens: list[int]
    """Ids of the tokens that end an answer: those that end rows, the most frequent first, and the EOS."""
    num_rows: int
    num_ended: int
    """Rows with a stop token at their end that is in the loss."""
    num_not_learned: int
    """Rows with a stop token at their end that is not in the loss."""
    num_cut: int
    """Rows whose stop token is in the loss but beyond max_length."""
    last_text: str
    """End of the first row without a stop token in the loss; empty if there is none."""

    def require(self) -> None:
        """Refuse data in which no row teaches the model to end.

        Raises:
            DataError: no row has a stop token in the loss.
        """
        if self.num_ended or self.num_cut:
            return
        if self.num_not_learned:
            raise DataError(
                "data: no training row has a stop token in the loss: "
                f"{counted(self.num_not_learned, 'row ends', 'rows end')} with one that is not in the loss (the first "
                f"ends with {self.last_text!r})",
                "Move {% endgeneration %} of the chat template behind the stop token, or set data.loss_on: completion. "
                + _REMEDY,
            )
        raise DataError(
            f"data: no row ends with a stop token: the first ends with {self.last_text!r}",
            "Let the template write one after each answer, such as {{ eos_token }} in a chat template. base.eos_token "
            "chooses another token than the tokenizer's own, and base.new_tokens adds one. " + _REMEDY,
        )


class StopFinder:
    """Finds the stop token at the end of encoded rows.

    A row may end with a run of special tokens and space, such as `... <|im_end|>\\n`. The stop token is the first
    special token in that run, here `<|im_end|>`. If the run contains none, an added token at the end of the row counts,
    such as one of base.new_tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        special = {token for token, how in added.items() if how.special} | set(tokenizer.all_special_ids)
        begins = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        self._special = special - begins
        self._added = added.keys() - begins
        self._tokenizer = tokenizer
        self._texts = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self._special))]
        self._blank: dict[int, bool] = {}
        """Token -> whether its text is only space."""

    def place(self, ids: Sequence[int]) -> int | None:
        """Return the index of the stop token at the end of `ids` (tokens,), or None."""
        found, at = None, len(ids)
        while at and (ids[at - 1] in self._special or self._is_blank(ids[at - 1])):
            at -= 1
            if ids[at] in self._special:
                found = at
        if found is None and at and ids[at - 1] in self._added:
            return at - 1
        return found

    def without_stop(self, answer: str) -> str:
        """Return an expected answer without stop tokens at its end, which generated answers do not have either."""
        answer = answer.strip()
        while end := next((token for token in self._texts if answer.endswith(token)), None):
            answer = answer.removesuffix(end).rstrip()
        return answer

    def of_earlier_turns(self, tokens: Tokens) -> list[int]:
        """Return the special tokens that end the trained turns of a row before its last one."""
        trained = tokens.trained
        ends = [i for i, (is_trained, next_is) in enumerate(pairwise(trained), start=1) if is_trained and not next_is]
        places = [self.place(tokens.ids[:end]) for end in ends]
        return [tokens.ids[i] for i in places if i is not None and trained[i] and tokens.ids[i] in self._special]

    def ends_of(self, rows: Sequence[Tokens], data: DataSection) -> RowEnds:
        """Return how training rows end.

        Args:
            rows: whole rows, before any is cut.
            data: says where they are cut, and which tokens are in the loss.
        """
        found: Counter[int] = Counter()
        num_ended = num_not_learned = num_cut = 0
        unended: Tokens | None = None
        for row in rows:
            place = self.place(row.ids)
            if place is not None:
                found[row.ids[place]] += 1
            learned = place is not None and row.labels[place] != IGNORED
            if learned and place is not None and (data.truncate == "left" or place < data.max_length):
                num_ended += 1
            elif learned:
                num_cut += 1
            else:
                num_not_learned += place is not None
                unended = unended or row
            if data.loss_on == "assistant":
                found.update(self.of_earlier_turns(row))
        eos = self._tokenizer.eos_token_id
        stops = [token for token, _ in found.most_common()]
        return RowEnds(
            stop_tokens=stops if eos is None or eos in stops else [*stops, eos],
            num_rows=len(rows),
            num_ended=num_ended,
            num_not_learned=num_not_learned,
            num_cut=num_cut,
            last_text="" if unended is None else str(self._tokenizer.decode(unended.ids[-_TOKENS_SHOWN:])),
        )

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._blank[token]

"""From prompt and completion to token ids, and which of them are learned."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.render import Example
from orchestrator.spec.sections import DataSection

IGNORED = -100
"""Label of a token that has no part in the loss (torch's cross entropy, transformers' collators)."""


@dataclass(frozen=True)
class Tokens:
    """One row as the model sees it. `labels[i]` is `ids[i]` or IGNORED; both (tokens,)."""

    ids: list[int]
    labels: list[int]
    num_prompt: int
    """Tokens before the completion."""
    begins: bool
    """Whether the first is the tokenizer's beginning of a text."""

    @property
    def trained(self) -> list[bool]:
        """Of each token, whether it is in the loss: not a row's first, before which nothing stands."""
        return [False, *(label != IGNORED for label in self.labels[1:])]

    def cut(self, max_length: int, side: str = "right") -> "Tokens | None":
        """At most so many, cut on a side; None where no token of them has a part in the loss.

        What is cut on the left keeps its beginning: a text without one is none that the base knows.
        """
        excess = max(0, len(self.ids) - max_length)
        first = int(self.begins)
        left, right = (slice(first), slice(first + excess, None)) if side == "left" else (slice(max_length), slice(0))
        ids, labels = self.ids[left] + self.ids[right], self.labels[left] + self.labels[right]
        num_prompt = max(first, self.num_prompt - excess) if side == "left" else self.num_prompt
        short = Tokens(ids, labels, min(num_prompt, len(ids)), self.begins)
        return short if any(short.trained) else None

    def prompt_beside(self, kept: "Tokens") -> list[int]:
        """Token ids of the prompt in `kept`, which `cut` made of these.

        Where the cut leaves nothing of the completion, the prompt's own end is what has to be answered: then it is the
        beginning token and the last tokens of the prompt, as many as `kept` has.
        """
        if kept.num_prompt < len(kept.ids):
            return kept.ids[: kept.num_prompt]
        first = int(self.begins)
        return self.ids[:first] + self.ids[self.num_prompt - len(kept.ids) + first : self.num_prompt]


def encode(example: Example, tokenizer: Any, data: DataSection) -> Tokens:
    """Token ids with exactly one BOS (where the tokenizer uses one) and one EOS at the ends.

    Special tokens written in the text count; what is missing is added, except under a chat template, which says
    itself how a conversation begins and ends.
    """
    prompt = _single_bos(example.prompt, tokenizer)
    whole = _single_bos(example.prompt + example.completion, tokenizer)
    text = _single_eos(whole, tokenizer)
    removed = len(example.prompt) + len(example.completion) - len(whole)  # in front of all places
    learned = [(start - removed, end - removed) for start, end in example.answers or ()]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token belongs to a part of the text when it reaches past the last character before it.
    parts = [
        (i, end > len(prompt), _touches(learned or [(len(prompt), math.inf)], start, end))
        for i, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not data.has_turns:
        if _lacks_bos([i for i, _, _ in parts], tokenizer):
            parts.insert(0, (bos, not prompt, not prompt))
        if eos is not None and parts[-1][0] != eos:
            parts.append((eos, True, True))
    ids = [i for i, _, _ in parts]
    labels = [i if is_learned or data.loss_on == "all" else IGNORED for i, _, is_learned in parts]
    num_prompt = sum(not in_completion for _, in_completion, _ in parts)
    return Tokens(ids, labels, num_prompt, bos is not None and ids[:1] == [bos])


def encode_prompt(prompt: str, tokenizer: Any, data: DataSection) -> list[int]:
    """Token ids of a prompt alone, the same as those it has before its completion in `encode`."""
    ids: list[int] = tokenizer(_single_bos(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if not data.has_turns and _lacks_bos(ids, tokenizer) else ids


def _touches(spans: Sequence[tuple[int, float]], start: int, end: int) -> bool:
    return any(end > first and start < last for first, last in spans)


def _single_bos(text: str, tokenizer: Any) -> str:
    if not tokenizer.bos_token:
        return text
    return re.sub(rf"^(\s*{re.escape(tokenizer.bos_token)})+", lambda _: tokenizer.bos_token, text)


def _single_eos(text: str, tokenizer: Any) -> str:
    if not tokenizer.eos_token:
        return text
    eos = re.escape(tokenizer.eos_token)
    return re.sub(rf"(\s*){eos}(\s*{eos})*\s*$", lambda match: match[1] + tokenizer.eos_token, text)


def _lacks_bos(ids: list[int], tokenizer: Any) -> bool:
    """Whether BOS is missing in front, for a tokenizer that would have put it there."""
    bos = tokenizer.bos_token_id
    return bos is not None and ids[:1] != [bos] and tokenizer("")["input_ids"][:1] == [bos]

"""From prompt and completion to token ids, and which of them are learned."""

import re
from bisect import bisect_left, bisect_right
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

    @property
    def num_trained(self) -> int:
        """Tokens in the loss."""
        rest = self.labels[1:]
        return len(rest) - rest.count(IGNORED)

    def cut(self, max_length: int, side: str = "right") -> "Tokens | None":
        """At most so many, cut on a side; None where no token of them has a part in the loss.

        What is cut on the left keeps its beginning: a text without one is none that the base knows.
        """
        if len(self.ids) <= max_length:
            return self if self.num_trained else None
        excess = len(self.ids) - max_length
        first = int(self.begins)
        left, right = (slice(first), slice(first + excess, None)) if side == "left" else (slice(max_length), slice(0))
        ids, labels = self.ids[left] + self.ids[right], self.labels[left] + self.labels[right]
        num_prompt = max(first, self.num_prompt - excess) if side == "left" else self.num_prompt
        short = Tokens(ids, labels, min(num_prompt, len(ids)), self.begins)
        return short if short.num_trained else None

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
    """Token ids of one row, as `encode_all` makes them."""
    return encode_all([example], tokenizer, data)[0]


def encode_all(examples: Sequence[Example], tokenizer: Any, data: DataSection) -> list[Tokens]:
    """Token ids with exactly one BOS (where the tokenizer uses one) and one EOS at the ends.

    Special tokens written in the text count; what is missing is added, except under a chat template, which says
    itself how a conversation begins and ends. All rows go to the tokenizer in one call.
    """
    wholes = [_single_bos(example.prompt + example.completion, tokenizer) for example in examples]
    texts = [_single_eos(whole, tokenizer) for whole in wholes]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    adds_bos = _adds_bos(tokenizer)
    return [
        _tokens(
            example, len(example.prompt) + len(example.completion) - len(whole), ids, found, tokenizer, data, adds_bos
        )
        for example, whole, ids, found in zip(examples, wholes, encoded["input_ids"], encoded.encodings, strict=True)
    ]


def _tokens(
    example: Example, removed: int, ids: list[int], encoding: Any, tokenizer: Any, data: DataSection, adds_bos: bool
) -> Tokens:
    """One row's tokens with their labels.

    Args:
        example: the row.
        removed: characters of its text that were taken off in front, before all places in it.
        ids: of the text.
        encoding: of the same (tokenizers.Encoding); tells where each token stands in the text.
        tokenizer: whose BOS and EOS are added where they are missing.
        data: the section.
        adds_bos: whether the tokenizer puts BOS in front of a text by itself.
    """
    prompt = _single_bos(example.prompt, tokenizer)
    # A token belongs to a part of the text when it reaches past the last character before it.
    num_prompt = bisect_right(range(len(ids)), len(prompt), key=lambda i: encoding.token_to_chars(i)[1])
    if example.learned is not None:
        labels = [IGNORED] * len(ids)
        for first, last in example.learned:
            start = bisect_right(range(len(ids)), first - removed, key=lambda i: encoding.token_to_chars(i)[1])
            end = bisect_left(range(len(ids)), last - removed, key=lambda i: encoding.token_to_chars(i)[0])
            labels[start:end] = ids[start:end]
    elif data.loss_on == "all":
        labels = list(ids)
    else:
        labels = [IGNORED] * num_prompt + ids[num_prompt:]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not data.has_turns:
        if adds_bos and ids[:1] != [bos]:
            is_learned = data.loss_on == "all" or not prompt
            ids, labels = [bos, *ids], [bos if is_learned else IGNORED, *labels]
            num_prompt += bool(prompt)
        if eos is not None and ids[-1] != eos:
            ids, labels = [*ids, eos], [*labels, eos]
    return Tokens(ids, labels, num_prompt, bos is not None and ids[:1] == [bos])


def encode_prompt(prompt: str, tokenizer: Any, data: DataSection) -> list[int]:
    """Token ids of a prompt alone, the same as those it has before its completion in `encode`."""
    ids: list[int] = tokenizer(_single_bos(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos, *ids] if not data.has_turns and ids[:1] != [bos] and _adds_bos(tokenizer) else ids


def _single_bos(text: str, tokenizer: Any) -> str:
    if not tokenizer.bos_token:
        return text
    return re.sub(rf"^(\s*{re.escape(tokenizer.bos_token)})+", lambda _: tokenizer.bos_token, text)


def _single_eos(text: str, tokenizer: Any) -> str:
    if not tokenizer.eos_token or tokenizer.eos_token not in text:
        return text
    eos = re.escape(tokenizer.eos_token)
    return re.sub(rf"(\s*){eos}(\s*{eos})*\s*$", lambda match: match[1] + tokenizer.eos_token, text)


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS in front of a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]

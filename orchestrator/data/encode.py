"""From prompt and completion to token ids, and which of them are in the loss."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.render import Example
from orchestrator.spec.sections import DataSection

IGNORED = -100
"""Label of a token that is not in the loss (torch's cross entropy, transformers' collators)."""


@dataclass(frozen=True)
class Tokens:
    """One row as the model sees it. `labels[i]` is `ids[i]` or IGNORED; both have shape (tokens,)."""

    ids: list[int]
    labels: list[int]
    num_prompt: int
    """Tokens before the completion."""
    starts_with_bos: bool
    """Whether the first token is the tokenizer's beginning-of-text token."""

    @property
    def trained(self) -> list[bool]:
        """For each token, whether it is in the loss. A row's first token never is: nothing predicts it."""
        return [False, *(label != IGNORED for label in self.labels[1:])]

    @property
    def num_trained(self) -> int:
        """Tokens in the loss."""
        rest = self.labels[1:]
        return len(rest) - rest.count(IGNORED)

    def cut(self, max_length: int, side: str = "right") -> "Tokens | None":
        """Return at most `max_length` tokens; None if none of them is in the loss.

        Args:
            max_length: number of tokens to keep.
            side: where tokens are removed, right or left. A cut on the left keeps the beginning-of-text token, because
                the base knows no text without it.
        """
        if len(self.ids) <= max_length:
            return self if self.num_trained else None
        excess = len(self.ids) - max_length
        first = int(self.starts_with_bos)
        left, right = (slice(first), slice(first + excess, None)) if side == "left" else (slice(max_length), slice(0))
        ids, labels = self.ids[left] + self.ids[right], self.labels[left] + self.labels[right]
        num_prompt = max(first, self.num_prompt - excess) if side == "left" else self.num_prompt
        short = Tokens(ids, labels, min(num_prompt, len(ids)), self.starts_with_bos)
        return short if short.num_trained else None

    def prompt_after_cut(self, kept: "Tokens") -> list[int]:
        """Return the token ids of the prompt in `kept`, which is a cut of these tokens.

        If the cut leaves nothing of the completion, the end of the prompt is what has to be answered. The result is
        then the beginning-of-text token and the last tokens of the prompt, as many as `kept` has in all.
        """
        if kept.num_prompt < len(kept.ids):
            return kept.ids[: kept.num_prompt]
        first = int(self.starts_with_bos)
        return self.ids[:first] + self.ids[self.num_prompt - len(kept.ids) + first : self.num_prompt]


def encode(example: Example, tokenizer: Any, data: DataSection) -> Tokens:
    """Return the tokens of one row, see `encode_all`."""
    return encode_all([example], tokenizer, data)[0]


def encode_all(examples: Sequence[Example], tokenizer: Any, data: DataSection) -> list[Tokens]:
    """Return the tokens of rows with exactly one BOS (if the tokenizer uses one) and one EOS at the ends.

    Special tokens that are written in the text count. Missing ones are added, except for conversations, whose chat
    template decides how they begin and end. All rows go to the tokenizer in one call.
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
    """Return one row's tokens with their labels.

    Args:
        example: the row.
        removed: number of characters that were removed at the beginning of its text.
        ids: token ids of the text.
        encoding: the same as tokenizers.Encoding, which gives the place of each token in the text.
        tokenizer: its BOS and EOS are added if they are missing.
        data: the section.
        adds_bos: whether the tokenizer adds BOS to a text itself.
    """
    prompt = _single_bos(example.prompt, tokenizer)
    # A token belongs to a part of the text if it extends beyond the last character before that part.
    num_prompt = bisect_right(range(len(ids)), len(prompt), key=lambda i: encoding.token_to_chars(i)[1])
    if example.trained_spans is not None:
        labels = [IGNORED] * len(ids)
        for first, last in example.trained_spans:
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
            is_trained = data.loss_on == "all" or not prompt
            ids, labels = [bos, *ids], [bos if is_trained else IGNORED, *labels]
            num_prompt += bool(prompt)
        if eos is not None and ids[-1] != eos:
            ids, labels = [*ids, eos], [*labels, eos]
    return Tokens(ids, labels, num_prompt, bos is not None and ids[:1] == [bos])


def encode_prompt(prompt: str, tokenizer: Any, data: DataSection) -> list[int]:
    """Return the token ids of a prompt, the same as those before its completion in `encode`."""
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
    """Whether the tokenizer adds BOS to a text itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]

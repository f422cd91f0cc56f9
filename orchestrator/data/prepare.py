"""From an experiment's data section to token ids: once a sweep, shared by all trials."""

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base import load_tokenizer
from orchestrator.data.render import Example, render, template_columns
from orchestrator.data.sources import Row, read_rows
from orchestrator.errors import DataError
from orchestrator.record.files import building_beside
from orchestrator.spec.sections import BaseSection, DataSection

IGNORED = -100
"""Label of a token that has no part in the loss (torch's cross entropy, transformers' collators)."""


@dataclass(frozen=True)
class Tokens:
    """One row as the model sees it. `labels[i]` is `ids[i]` or IGNORED; both (tokens,)."""

    ids: list[int]
    labels: list[int]
    num_prompt: int
    """Tokens before the completion."""

    def cut(self, max_length: int) -> "Tokens | None":
        """The first so many; None where no token of them has a part in the loss."""
        labels = self.labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):
            return None
        return Tokens(self.ids[:max_length], labels, self.num_prompt)


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, with the answer that is wanted."""

    ids: list[int]
    answer: str


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows: `datasets.Dataset`s with columns input_ids and labels, and the held-out prompts."""

    train: Any
    held_out: Any
    prompts: list[Prompt]
    fingerprint: str
    """Hash of all ids and labels."""
    num_truncated: int
    """Rows cut to max_length."""
    num_dropped: int
    """Rows that had no token in the loss after the cut."""
    num_shared: int
    """Held-out rows that are training rows too, token for token."""


def prepare(data: DataSection, base: BaseSection) -> PreparedData:
    """Read, split and tokenise. The split depends on the data section alone, not on the trial.

    Raises:
        DataError: a row or a source is not what the section says.
    """
    if data.template:
        template_columns(data.template)  # a malformed template is told before any file is read
    tokenizer = load_tokenizer(base)
    train, held_out = _split(data)
    counts = {"truncated": 0, "dropped": 0}

    def tokenised(rows: list[Row]) -> tuple[list[Tokens], list[Prompt]]:
        kept, prompts = [], []
        for example in (render(row, data, tokenizer) for row in rows):
            tokens = encode(example, tokenizer, data)
            prompts.append(Prompt(tokens.ids[: tokens.num_prompt], example.answer))
            counts["truncated"] += len(tokens.ids) > data.max_length
            if (short := tokens.cut(data.max_length)) is None:
                counts["dropped"] += 1
            else:
                kept.append(short)
        if not kept:
            raise DataError(f"data.max_length={data.max_length} leaves no token of any completion to learn from")
        return kept, prompts if data.format != "text" else []

    train_tokens, _ = tokenised(train)
    held_out_tokens, prompts = tokenised(held_out)
    return PreparedData(
        train=_dataset(train_tokens),
        held_out=_dataset(held_out_tokens),
        prompts=prompts,
        fingerprint=_fingerprint(train_tokens, held_out_tokens),
        num_truncated=counts["truncated"],
        num_dropped=counts["dropped"],
        num_shared=len({tuple(row.ids) for row in train_tokens} & {tuple(row.ids) for row in held_out_tokens}),
    )


def encode(example: Example, tokenizer: Any, data: DataSection) -> Tokens:
    """Token ids with exactly one BOS (where the tokenizer uses one) and one EOS at the ends.

    Special tokens written in the text count; what is missing is added, except under a chat template, which says
    itself how a conversation begins and ends.
    """
    prompt = _single_bos(example.prompt, tokenizer)
    text = _single_eos(_single_bos(example.prompt + example.completion, tokenizer), tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token belongs to the completion when it reaches past the prompt's last character.
    parts = [
        (i, end > len(prompt)) for i, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    if data.format != "messages":
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if _lacks_bos([i for i, _ in parts], tokenizer):
            parts.insert(0, (bos, not prompt))
        if eos is not None and parts[-1][0] != eos:
            parts.append((eos, True))
    ids = [i for i, _ in parts]
    labels = [i if in_completion or data.loss_on == "all" else IGNORED for i, in_completion in parts]
    return Tokens(ids, labels, sum(not in_completion for _, in_completion in parts))


def encode_prompt(prompt: str, tokenizer: Any, data: DataSection) -> list[int]:
    """Token ids of a prompt alone, the same as those it has before its completion in `encode`."""
    ids: list[int] = tokenizer(_single_bos(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if data.format != "messages" and _lacks_bos(ids, tokenizer) else ids


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


def save(prepared: PreparedData, folder: Path) -> None:
    """Put prepared data into `folder`, which must not exist, complete or not at all."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    meta = {
        "fingerprint": prepared.fingerprint,
        "num_truncated": prepared.num_truncated,
        "num_dropped": prepared.num_dropped,
        "num_shared": prepared.num_shared,
        "prompts": [{"ids": prompt.ids, "answer": prompt.answer} for prompt in prepared.prompts],
    }
    with building_beside(folder) as building:
        prepared.train.save_to_disk(building / "train")
        prepared.held_out.save_to_disk(building / "held_out")
        (building / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        building.rename(folder)


def load(folder: Path, in_memory: bool = False) -> PreparedData:
    """What `save` has put into `folder`; rows are read when they are needed, or at once."""
    from datasets import load_from_disk

    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    prompts = [Prompt(**prompt) for prompt in meta.pop("prompts")]
    train, held_out = (load_from_disk(folder / part, keep_in_memory=in_memory) for part in ("train", "held_out"))
    return PreparedData(train, held_out, prompts, **meta)


def _split(data: DataSection) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows."""
    rows = read_rows(data.source, data.config, data.split, data.max_rows)
    held_out = data.held_out
    if held_out.source is not None:
        return rows, read_rows(held_out.source, held_out.config, held_out.split, held_out.max_rows)
    num_held_out = held_out.count or max(1, round((held_out.share or 0) * len(rows)))
    if num_held_out >= len(rows):
        raise DataError(f"data.held_out takes {num_held_out} of {len(rows)} rows: none is left to train on")
    order = list(range(len(rows)))
    random.Random(data.seed).shuffle(order)
    chosen = set(order[:num_held_out])
    return (
        [row for i, row in enumerate(rows) if i not in chosen],
        [row for i, row in enumerate(rows) if i in chosen],
    )


def _dataset(rows: list[Tokens]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})


def _fingerprint(*parts: list[Tokens]) -> str:
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            digest.update(json.dumps([row.ids, row.labels]).encode())
        digest.update(b"|")
    return digest.hexdigest()

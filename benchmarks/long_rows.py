"""Rows of a fixed number of tokens, made of GSM8K rows one after another."""

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

_SPARE = 16
"""Tokens beyond those asked for: at the seams of two rows there may be fewer tokens than in the rows alone."""


def write_long_rows(rows: Path, tokenizer: Path, num_tokens: int, target: Path) -> None:
    """Write a JSONL file whose rows have at least `num_tokens` tokens; `data.max_length` cuts what is beyond.

    The first question is the row's prompt; all that follows is its answer, so that almost all tokens have a loss.

    Args:
        rows: GSM8K's train.jsonl.
        tokenizer: folder of a base.
        num_tokens: tokens of a row.
        target: file to write.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for question, answer in _joined(rows, tokenizer, num_tokens + _SPARE):
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


def _joined(rows: Path, tokenizer: Path, num_tokens: int) -> Iterator[tuple[str, str]]:
    encode = AutoTokenizer.from_pretrained(tokenizer)
    parts: list[str] = []
    count = 0
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        added = [row["question"], row["answer"]]
        parts += added
        count += sum(len(encode.encode(part, add_special_tokens=False)) for part in added)
        if count >= num_tokens:
            yield parts[0], "\n".join(parts[1:])
            parts, count = [], 0

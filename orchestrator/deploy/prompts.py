"""Prompts from a file, answers to a file."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from orchestrator.adapters.generate import answer
from orchestrator.data.row import Row
from orchestrator.data.sources import read_rows
from orchestrator.deploy.chat import Chat, PromptForm, Question, Sampling
from orchestrator.errors import DataError, RequestError
from orchestrator.spec.sections import Source

_AT_A_TIME = 8
"""Batches between two writes: prompts of like length go together, and those in a write can be sorted."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""


@dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file."""

    question: Question
    ids: list[int]
    """As the model reads it, (tokens,)."""

    def as_dict(self) -> dict[str, Any]:
        """As it stood in the file."""
        return {"prompt" if isinstance(self.question, str) else "messages": self.question}


def read_prompts(path: Path, form: PromptForm) -> list[FilePrompt]:
    """Prompts in the form of an adapter's training rows.

    Args:
        path: .jsonl, each line an object with a `prompt` or with `messages`; or .txt, each line a prompt.
        form: of the adapter that is to answer.

    Raises:
        DataError: the file is not there, or a line is not a prompt; the message names file and line.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(f"{path}: must be a .jsonl or a .txt file")
    asked = []
    for row in read_rows(Source(source=str(path.resolve()))) if path.suffix == ".jsonl" else _read_lines(path):
        question = _question(row)
        try:
            asked.append(FilePrompt(question, form.ids(question)))
        except RequestError as error:
            raise DataError(f"{row.where}: {error.message}", error.remedy) from error
    return asked


def write_answers(
    chat: Chat,
    asked: Sequence[FilePrompt],
    file: TextIO,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling,
    compare_base: bool,
) -> Iterator[int]:
    """Answer prompts in batches: one JSON object a line, in their order, with `answer` and perhaps `base_answer`.

    Yields:
        How many are written.
    """
    sampling.begin()

    def answers(part: Sequence[FilePrompt]) -> list[str]:
        ids = [each.ids for each in part]
        return answer(chat.model, chat.tokenizer, ids, max_new_tokens, batch_size, sampling.arguments)

    step = batch_size * _AT_A_TIME
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        told = [{"answer": text} for text in answers(part)]
        if compare_base:
            with chat.model.disable_adapter():
                told = [{**each, "base_answer": text} for each, text in zip(told, answers(part), strict=True)]
        for each, fields in zip(part, told, strict=True):
            file.write(json.dumps(each.as_dict() | fields, ensure_ascii=False) + "\n")
        file.flush()
        yield start + len(part)


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A file that is there once it is whole; it grows beside its place, under a name with a dot.

    Raises:
        RequestError: it exists, cannot be made, or the disk is full.
    """
    if path.exists():
        raise RequestError(f"{path}: already exists", "Give a file that does not exist yet.")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise RequestError(f"{path}: cannot be made: {error}") from error
    growing = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        growing.chmod(0o644)
        growing.rename(path)
    except BaseException as error:
        growing.unlink(missing_ok=True)  # Ctrl-C may come when it has its own name already
        if isinstance(error, OSError) and error.errno in _FULL:
            raise RequestError(f"{path}: cannot be written: {error}", "Nothing was left behind.") from error
        raise


def _read_lines(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of prompts")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: is not UTF-8: {error}") from error
        if text:
            rows.append(Row({"prompt": text}, f"{path}:{number}"))
    if not rows:
        raise DataError(f"{path}: holds no prompt")
    return rows


def _question(row: Row) -> Question:
    given = [name for name in ("prompt", "messages") if name in row.values]
    if len(given) != 1:
        raise DataError(f"{row.where}: needs a prompt or messages, got {', '.join(row.values) or 'nothing'}")
    value = row.values[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{row.where}: prompt must be text, got {value!r:.80}")
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: messages must be a list of turns, got {value!r:.80}")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise DataError(f"{row.where}: each turn needs a role and a content, got {turn!r:.80}")
    if value[-1]["role"] != "user":
        raise DataError(f"{row.where}: the last turn must be the user's, got {value[-1]['role']!r}")
    return value

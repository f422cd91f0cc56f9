"""Read prompts from a file, and write answers to a file."""

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

_BATCHES_PER_WRITE = 8
"""Batches between two writes. The prompts of one write are sorted by length, for less padding."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk that is full, or of a quota or size limit."""


@dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file."""

    question: Question
    ids: list[int]
    """Token ids of the prompt, (tokens,)."""

    def as_dict(self) -> dict[str, Any]:
        """Return the prompt as in the file."""
        return {"prompt" if isinstance(self.question, str) else "messages": self.question}


def read_prompts(path: Path, form: PromptForm) -> list[FilePrompt]:
    """Read prompts, and put them into the prompt form of an adapter.

    Args:
        path: a .jsonl file whose lines are objects with `prompt` or `messages`, or a .txt file with a prompt per line.
        form: prompt form of the adapter that will answer.

    Raises:
        DataError: the file does not exist, or a line is not a prompt; the message names file and line.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(f"{path}: must be a .jsonl or a .txt file")
    prompts = []
    for row in read_rows(Source(source=str(path.resolve()))) if path.suffix == ".jsonl" else _read_lines(path):
        question = _question(row)
        try:
            prompts.append(FilePrompt(question, form.ids(question)))
        except RequestError as error:
            raise DataError(f"{row.where}: {error.message}", error.remedy) from error
    return prompts


def write_answers(
    chat: Chat,
    prompts: Sequence[FilePrompt],
    file: TextIO,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling,
    compare_base: bool,
) -> Iterator[int]:
    """Answer prompts in batches, and write one JSON object per line, in the order of the prompts.

    Each object contains the prompt, `answer`, and with `compare_base` also `base_answer`.

    Yields:
        The number of answers written so far.
    """
    sampling.begin()

    def answers(part: Sequence[FilePrompt]) -> list[str]:
        ids = [each.ids for each in part]
        return answer(chat.model, chat.tokenizer, ids, max_new_tokens, batch_size, sampling.arguments)

    step = batch_size * _BATCHES_PER_WRITE
    for start in range(0, len(prompts), step):
        part = prompts[start : start + step]
        results = [{"answer": text} for text in answers(part)]
        if compare_base:
            with chat.model.disable_adapter():
                results = [{**each, "base_answer": text} for each, text in zip(results, answers(part), strict=True)]
        for each, fields in zip(part, results, strict=True):
            file.write(json.dumps(each.as_dict() | fields, ensure_ascii=False) + "\n")
        file.flush()
        yield start + len(part)


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a file that gets its name once it is complete. Meanwhile it has a temporary name in the same folder.

    Raises:
        RequestError: the file already exists, cannot be created, or the disk is full.
    """
    if path.exists():
        raise RequestError(f"{path}: already exists", "Give a file that does not exist yet.")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise RequestError(f"{path}: cannot be created: {error}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        temporary.chmod(0o644)
        temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # missing if Ctrl-C came after the rename
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise RequestError(f"{path}: cannot be written: {error}", "Nothing was left behind.") from error
        raise


def _read_lines(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: is not UTF-8: {error}") from error
        if text:
            rows.append(Row({"prompt": text}, f"{path}:{number}"))
    if not rows:
        raise DataError(f"{path}: contains no prompt")
    return rows


def _question(row: Row) -> Question:
    given = [name for name in ("prompt", "messages") if name in row.values]
    if len(given) != 1:
        raise DataError(f"{row.where}: needs either prompt or messages, but has {', '.join(row.values) or 'nothing'}")
    value = row.values[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{row.where}: prompt must be text, but is {value!r:.80}")
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: messages must be a list of turns, but is {value!r:.80}")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise DataError(f"{row.where}: each turn needs a role and a content, but got {turn!r:.80}")
    if value[-1]["role"] != "user":
        raise DataError(f"{row.where}: the last turn must have the role user, but has {value[-1]['role']!r}")
    return value

import errno
import os
import threading
from pathlib import Path

import pytest

from orchestrator.record.files import append_line, write_atomic


def test_folders_are_made_and_old_text_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    write_atomic(path, "a long old text")
    write_atomic(path, "ähnlich\n")
    assert path.read_bytes() == "ähnlich\n".encode()
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644, "others may read it, unlike a temporary file"


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new " * 10_000 + "\ud800")  # cannot be written as UTF-8
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_replacement_leaves_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "x.json", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_an_interrupt_right_after_the_replacement_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def replace_and_interrupt(path: Path, target: Path) -> None:
        replace(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", replace_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    texts = {letter * 200_000 for letter in "ab"}
    write_atomic(path, "a" * 200_000)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for text in sorted(texts):
                write_atomic(path, text)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {path.read_text() for _ in range(300)} <= texts
    finally:
        done.set()
        writer.join()


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    append_line(path, '{"a": 1}')
    write = os.write

    def write_a_part(file: int, rest: bytes) -> int:
        if len(rest) < 9:
            fail()
        return write(file, rest[:3])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_a_part)
        with pytest.raises(OSError, match="No space left"):
            append_line(path, '{"b": 2}')
    assert path.read_text() == '{"a": 1}\n'
    monkeypatch.setattr(os, "write", lambda file, rest: write(file, rest[:3]))
    append_line(path, '{"b": "ä"}')
    assert path.read_text() == '{"a": 1}\n{"b": "ä"}\n'

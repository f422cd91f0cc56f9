import threading
from pathlib import Path

import pytest

from orchestrator.errors import RecordError, RequestError
from orchestrator.sweep.signature import key_file, owner_key, read_signed, sign_again, write_signed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for configuration, and no key in the environment."""
    monkeypatch.delenv("ORCHESTRATOR_STATE_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_the_key_is_made_once_and_is_the_owners_alone(home: Path) -> None:
    key = owner_key()
    assert key_file() == home / "config" / "orchestrator" / "state.key"
    assert owner_key() == key == key_file().read_bytes().strip()
    assert len(key) == 64
    assert key_file().stat().st_mode & 0o777 == 0o600
    assert [file.name for file in key_file().parent.iterdir()] == ["state.key"]


@pytest.mark.usefixtures("home")
def test_processes_that_make_the_key_at_the_same_time_get_the_same() -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(owner_key())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert set(found) == {key_file().read_bytes().strip()}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_or_change_is_refused(mode: int) -> None:
    owner_key()
    key_file().chmod(mode)
    with pytest.raises(RequestError, match="others may read or change the key"):
        owner_key()


@pytest.mark.usefixtures("home")
def test_a_key_that_is_no_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    owner_key()
    key_file().write_text("short")
    with pytest.raises(RequestError, match="is damaged: 5 bytes"):
        owner_key()
    monkeypatch.setenv("ORCHESTRATOR_STATE_KEY", "secret")
    with pytest.raises(RequestError, match=r"is too short for a key: 6 characters") as refused:
        owner_key()
    assert "secret" not in str(refused.value)


def test_a_home_without_a_place_for_the_key_is_an_error_that_names_the_variable(home: Path) -> None:
    (home / "config").write_text("a file")
    with pytest.raises(RequestError, match="cannot be read or made") as refused:
        owner_key()
    assert "Set ORCHESTRATOR_STATE_KEY" in refused.value.remedy


def test_signed_content_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"", b"one\ntwo\n", b"orchestrator-state-1 no signature"):
        write_signed(file, content)
        assert read_signed(file) == content


def test_each_changed_byte_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_signed(file, b"content")
    whole = file.read_bytes()
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(RecordError, match=f"{file}: .*nothing of it was loaded"):
            read_signed(file)
    for damaged in (whole[:-1], whole + b"x", b"", b"orchestrator-state-1", b"orchestrator-state-1 "):
        file.write_bytes(damaged)
        with pytest.raises(RecordError, match="nothing of it was loaded"):
            read_signed(file)


def test_another_key_is_named_as_the_reason_and_may_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_signed(file, b"content")
    monkeypatch.setenv("ORCHESTRATOR_STATE_KEY", "b" * 64)
    with pytest.raises(RecordError, match="is signed with another key") as refused:
        read_signed(file)
    assert "--trust-state" in refused.value.remedy
    sign_again(file)
    assert read_signed(file) == b"content"

"""A full disk is distinguished from a folder that nodes do not share, and from one without write permission."""

import errno
import os
from pathlib import Path

import pytest
import ray

from orchestrator.cluster import _fault, _probe_folder
from orchestrator.errors import RequestError, StorageError


def fault(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_a_full_disk_of_a_node_is_a_storage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def get(*_: object, **__: object) -> None:
        raise ray.exceptions.RayTaskError("probe", "traceback", fault(errno.ENOSPC)).as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(StorageError, match=f"{tmp_path}: its storage fails: No space left on device"):
        _fault(None, tmp_path / "probe" / "node")


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, StorageError), (errno.EACCES, RequestError)])
def test_a_fault_of_this_machines_disk_is_a_storage_error_and_a_missing_permission_a_request_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, kind: type[Exception]
) -> None:
    def write(*_: object, **__: object) -> None:
        raise fault(number)

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(kind, match=os.strerror(number)), _probe_folder(tmp_path / "runs"):
        pass
    assert list(tmp_path.iterdir()) == []

"""Storage faults are recognized, whichever library reports them."""

import errno
import os
from pathlib import Path

import pytest

from orchestrator.storage import storage_fault


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_an_error_of_the_operating_system_is_reported_with_its_file(number: int) -> None:
    error = OSError(number, os.strerror(number), "/runs/s/progress.json")
    assert storage_fault(error) == f"{os.strerror(number)}: /runs/s/progress.json"
    assert storage_fault(OSError(number, os.strerror(number))) == os.strerror(number)


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # safetensors
        "Error while serializing: I/O error: Das Gerät ist voll (os error 28)",
        "[enforce fail at inline_container.cc:672] . unexpected pos 192 vs 86",  # torch.save
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "(sqlite3.OperationalError) database or disk is full",
        "Read-only file system (os error 30)",
        "The object cannot be created because the local object store is full and the local disk's utilization is over "
        "capacity (95% by default).",  # Ray's OutOfDiskError
    ],
)
def test_errors_of_libraries_are_recognized_by_their_text(text: str) -> None:
    assert storage_fault(RuntimeError(text)) is not None


def test_the_cause_of_an_error_is_recognized() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raised, passed_on = RuntimeError("cannot save"), RuntimeError("the task failed")
    raised.__cause__ = full
    passed_on.cause = full  # type: ignore[attr-defined]  # Ray stores the original error there
    assert storage_fault(raised) == storage_fault(passed_on) == "No space left on device"
    loop = RuntimeError("caused by itself")
    loop.__cause__ = loop
    assert storage_fault(loop) is None


def test_other_errors_are_no_storage_faults() -> None:
    for error in (
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError("No space left on device, says a library that gives no number"),
        KeyError("data"),
        None,
    ):
        assert storage_fault(error) is None


def test_a_real_full_disk_is_recognized() -> None:
    """Linux has a device that is always full."""
    with pytest.raises(OSError, match="No space left") as raised, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
    assert storage_fault(raised.value) == "No space left on device"


def test_torchs_error_on_a_full_disk_is_recognized() -> None:
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.save({"x": torch.zeros(1 << 20)}, "/dev/full")
    assert storage_fault(raised.value) is not None

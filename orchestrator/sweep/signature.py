"""Sign what `resume` unpickles, so that nothing is unpickled that others may have written into a sweep's folder.

A pickle runs code when it is loaded. A signed file begins with one line: the format, the id of the key, and the
HMAC-SHA256 of all that follows under this key. The key is the owner's, and lies outside every sweep's folder.
"""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.errors import RecordError, RequestError
from orchestrator.record.files import replacing
from orchestrator.user_folders import config_folder

VARIABLE: Final = "ORCHESTRATOR_STATE_KEY"
"""Environment variable that holds the key itself, for clusters and CI. It goes before the file."""

_FORMAT: Final = b"orchestrator-state-1"
_KEY_BYTES: Final = 32
_SHORTEST_KEY: Final = 32
"""Characters of a key in the variable: those of 16 random bytes in hexadecimal digits."""


def key_file() -> Path:
    """Return the path of the owner's key, for sweeps without a key in the environment."""
    return config_folder() / "state.key"


def owner_key() -> bytes:
    """Return the owner's key: that of the environment, else that of the key file, which is made if there is none.

    Raises:
        RequestError: the key is too short, others may read its file, or the file can be neither read nor made.
    """
    if written := os.environ.get(VARIABLE):
        if len(written) < _SHORTEST_KEY:
            raise RequestError(
                f"{VARIABLE}: is too short for a key: {len(written)} characters, not at least {_SHORTEST_KEY}",
                "Make one with: openssl rand -hex 32",
            )
        return written.encode()
    path = key_file()
    try:
        if not path.is_file():
            _make_key(path)
        key, mode = path.read_bytes().strip(), path.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise RequestError(
            f"{path}: the key that signs the state of sweeps cannot be read or made: {error}",
            f"Set {VARIABLE} to a key of your own, such as the output of: openssl rand -hex 32",
        ) from error
    if mode & 0o077:
        raise RequestError(
            f"{path}: others may read or change the key that signs the state of sweeps (mode {mode & 0o777:o})",
            f"Delete it if somebody may have read it; otherwise: chmod 600 {path}",
        )
    if len(key) < _SHORTEST_KEY:
        raise RequestError(f"{path}: is damaged: {len(key)} bytes are no key", "Delete it: a new one will be made.")
    return key


def _make_key(path: Path) -> None:
    """Write a new key, unless another process has made one meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    file = os.open(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "w") as opened:
            opened.write(f"{secrets.token_hex(_KEY_BYTES)}\n")
            opened.flush()
            os.fsync(opened.fileno())
        with suppress(FileExistsError):
            os.link(building, path)
    finally:
        building.unlink()


def write_signed(path: Path, content: bytes) -> None:
    """Replace a file by signed content, in one atomic step.

    Raises:
        RequestError: there is no usable key.
    """
    signed = _head(owner_key(), content) + content
    with replacing(path) as building:
        building.write_bytes(signed)


def read_signed(path: Path) -> bytes:
    """Return the content of a signed file.

    Raises:
        RecordError: it is not signed, signed with another key, or has changed since.
        RequestError: there is no usable key.
    """
    head, _, content = path.read_bytes().partition(b"\n")
    right = _head(owner_key(), content).strip()
    if hmac.compare_digest(head, right):
        return content
    if not head.startswith(_FORMAT + b" "):
        fault = "is not signed, so that somebody else may have written it"
    elif head.split(b" ")[1] != right.split(b" ")[1]:
        fault = "is signed with another key, so that somebody else may have written it"
    else:
        fault = "has changed since it was signed: it is damaged, or somebody else has written it"
    raise RecordError(
        f"{path}: {fault}; nothing of it was loaded, because it could run code",
        f"If the sweep began on another machine, copy {key_file()} from there, or set {VARIABLE} to the same key. If "
        "only you can write to this folder, give --trust-state.",
    )


def sign_again(path: Path) -> None:
    """Sign a file with the owner's key, whatever it was signed with: the user trusts what is in it."""
    head, _, content = (whole := path.read_bytes()).partition(b"\n")
    write_signed(path, content if head.startswith(_FORMAT + b" ") else whole)


def _head(key: bytes, content: bytes) -> bytes:
    key_id = hashlib.sha256(b"id of the key" + key).hexdigest()[:16]
    signature = hmac.digest(key, _FORMAT + content, "sha256").hex()
    return b" ".join([_FORMAT, key_id.encode(), signature.encode()]) + b"\n"

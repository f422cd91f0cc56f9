"""One folder of an object store, through pyarrow's file systems. Only this module knows them."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import OrchestratorError, RequestError

_T = TypeVar("_T")

_PART_BYTES = 8 * 2**20
"""Bytes that are read at a time from a file that is sent."""
_CONNECT_S = 5.0
_SILENCE_S = 20.0
"""Seconds without a byte after which a request has failed."""
_PATIENCE_S = 30.0
"""Seconds after which a command that waits for its answer makes no further attempt."""
_FIRST_PAUSE_S = 0.5
"""Pause before its second attempt; each later one is twice as long."""

_FINAL = (
    "NO_SUCH_BUCKET",
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "PermanentRedirect",
    "PERMISSION_DENIED",  # Google Cloud Storage
    "UNAUTHENTICATED",
    "AuthenticationFailed",  # Azure
    "AuthorizationFailure",
    "ContainerNotFound",
)
"""Words in the errors of stores that do not pass by waiting."""


class RemoteError(OrchestratorError):
    """An object store has refused a request, or has not answered it. Exit code 1.

    Attributes:
        is_final: whether waiting does not help, as with a bucket that does not exist.
    """

    is_final = False


class RefusedError(RemoteError):
    """An object store has refused a request for good: no such bucket, or no permission."""

    is_final = True


@dataclass(frozen=True)
class RemoteFile:
    """A file in a store, as a listing shows it."""

    size: int
    """Bytes."""
    changed_ns: int
    """When it was written, in nanoseconds since 1970."""


class RemoteFolder:
    """A folder of an object store. Its files are named by their paths relative to it, with slashes.

    A request is made once; `patiently` repeats it. All methods raise RemoteError.
    """

    def __init__(self, uri: str) -> None:
        """
        Args:
            uri: a checked URI, see `location.checked_uri`.

        Raises:
            RequestError: the environment lacks what the store needs.
        """
        self.uri = uri
        scheme, _, self._root = uri.partition("://")
        self._store = self._call(lambda: _file_system(scheme, self._root.partition("/")[0]))

    def files(self) -> dict[str, RemoteFile]:
        """Return all files below this folder, none if there is no such folder."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._root, recursive=True, allow_not_found=True)
        found = self._call(lambda: self._store.get_file_info(selector))
        return {
            each.path.removeprefix(f"{self._root}/"): RemoteFile(each.size, each.mtime_ns or 0)
            for each in found
            if each.type == FileType.File
        }

    def folders(self) -> list[str]:
        """Return the names of the folders in this folder."""
        from pyarrow.fs import FileSelector, FileType

        found = self._call(lambda: self._store.get_file_info(FileSelector(self._root, allow_not_found=True)))
        return [each.base_name for each in found if each.type == FileType.Directory]

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is no such file."""

        def read() -> bytes | None:
            try:
                with self._store.open_input_stream(f"{self._root}/{name}") as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._call(read)

    def write(self, name: str, content: bytes) -> None:
        """Write a file. Readers see the old content or the new one, never a part."""

        def write() -> None:
            with self._store.open_output_stream(f"{self._root}/{name}") as stream:
                stream.write(content)

        self._call(write)

    def send(self, file: Path, name: str) -> None:
        """Write a file of any size from a file of this machine, which exists until this returns."""

        def send() -> None:
            with file.open("rb") as source, self._store.open_output_stream(f"{self._root}/{name}") as stream:
                while part := source.read(_PART_BYTES):
                    stream.write(part)

        self._call(send)

    def fetch(self, name: str, file: Path) -> bool:
        """Write a file's content into a file of this machine; return False if there is no such file."""

        def fetch() -> bool:
            try:
                with self._store.open_input_stream(f"{self._root}/{name}") as stream, file.open("wb") as target:
                    while part := stream.read(_PART_BYTES):
                        target.write(part)
            except FileNotFoundError:
                return False
            return True

        return self._call(fetch)

    def delete(self, name: str) -> None:
        """Remove a file, if there is one."""

        def delete() -> None:
            try:
                self._store.delete_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return

        self._call(delete)

    def _call(self, request: Callable[[], _T]) -> _T:
        """Make a request, and turn the library's errors into ours."""
        from pyarrow import ArrowException

        try:
            return request()
        except (OSError, ArrowException) as error:
            text = str(error).strip().splitlines()[0]
            if isinstance(error, OSError) and error.filename is not None:  # a fault of this machine's own file
                raise
            kind = RefusedError if any(word in text for word in _FINAL) else RemoteError
            raise kind(f"{self.uri}: {text}", _remedy(text)) from error


def patiently(request: Callable[[], _T]) -> _T:
    """Make a request, again after a pause if it fails by a fault that may pass; for about half a minute.

    Raises:
        RemoteError: of the last attempt.
    """
    deadline, pause_s = time.monotonic() + _PATIENCE_S, _FIRST_PAUSE_S
    while True:
        try:
            return request()
        except RemoteError as error:
            if error.is_final or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s *= 2


def _remedy(text: str) -> str:
    if "NO_SUCH_BUCKET" in text or "ContainerNotFound" in text:
        return "Give the name of a bucket that exists; buckets are not made here."
    if any(word in text for word in _FINAL):
        return (
            "Check the credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
            "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_KEY) and what they permit: list, read, write and delete."
        )
    return "Check the network, and AWS_ENDPOINT_URL if the store is not Amazon's."


def _file_system(scheme: str, bucket: str) -> Any:
    """Return pyarrow's file system for a store. Credentials come from the environment, as its library reads them."""
    from pyarrow import fs

    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and endpoint is None:
            region = fs.resolve_s3_region(bucket)
        return fs.S3FileSystem(
            endpoint_override=endpoint,
            region=region,
            connect_timeout=_CONNECT_S,
            request_timeout=_SILENCE_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
            allow_delayed_open=True,
        )
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=_SILENCE_S))
    account = os.environ.get("AZURE_STORAGE_ACCOUNT")
    if account is None:
        raise RequestError(f"az://{bucket}: AZURE_STORAGE_ACCOUNT is not set", "Set it to the storage account's name.")
    return fs.AzureFileSystem(account, os.environ.get("AZURE_STORAGE_KEY"))

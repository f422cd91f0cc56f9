"""Push a bundle to a model repo of the hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.adapters.bundle import Manifest, verify
from orchestrator.deploy.export.private_details import base_notes, path_notes
from orchestrator.errors import HubError, RequestError
from orchestrator.record.manifest import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

_PUSH_AGAIN = "Push again: files that the hub already has are not sent twice."


def push(folder: Path, repo: str, private: bool, dry_run: bool, say: Callable[[str], None]) -> None:
    """Send a bundle to a model repo of the hub in one commit, so that it is there completely or not at all.

    Args:
        folder: a bundle; every byte is checked first.
        repo: `owner/name`, or a name that belongs to the token's owner. An existing repo gets another commit.
        private: make the repo private. Otherwise the default of the owner's account applies, which is mostly public.
        dry_run: report what would be sent, without network access.
        say: reports progress, a line at a time.

    Raises:
        RecordError: the bundle is incomplete or changed.
        RequestError: the name is invalid, there is no token, the hub rejects the token, or `private` was asked for and
            a public repo of this name exists.
        HubError: the hub cannot be reached, or fails.
    """
    _require_name(repo)
    manifest = verify(folder)
    _say_contents(folder, manifest, repo, private, say)
    if dry_run:
        say("dry run: nothing was sent")
        return
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=_token())
    with _hub_errors(repo):
        whole = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        _make_repo(api, whole, private)
        commit = api.create_commit(
            whole,
            # `upload_folder` may split a folder into several commits.
            [CommitOperationAdd(name, str(folder / name)) for name in [*manifest.files, MANIFEST]],
            commit_message=f"{manifest.facts.format}: {manifest.facts.trial_id or folder.resolve().name}",
        )
    say(f"pushed to {api.endpoint}/{whole}, commit {commit.oid}")


def _say_contents(folder: Path, manifest: Manifest, repo: str, private: bool, say: Callable[[str], None]) -> None:
    sizes = {name: file.size for name, file in manifest.files.items()}
    sizes[MANIFEST] = (folder / MANIFEST).stat().st_size
    visibility = "private" if private else "public, unless the account makes its repos private"
    say(f"{folder} to {repo} ({visibility}): {len(sizes)} files, {sum(sizes.values()):,} bytes")
    for name, size in sizes.items():
        say(f"  {size:>14,}  {name}")
    for note in [*base_notes(folder, manifest.facts), *path_notes(folder, manifest.facts)]:
        say(f"note: {note}")


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RequestError(f"--repo {repo!r}: is not a valid repo name: {error}", "Give owner/name.") from error


def _token() -> str:
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise RequestError("HF_HUB_OFFLINE: is set, so nothing can be pushed", "Unset it, or give --dry-run.")
    token = get_token()
    if token is None:
        raise RequestError(
            "HF_TOKEN: there is no token for the hub", "Set it to a token with write access, or run `hf auth login`."
        )
    return token


def _make_repo(api: "HfApi", repo: str, private: bool) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo, private=private or None)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:  # the repo exists
            raise
        if private and not api.model_info(repo).private:
            raise RequestError(
                f"{repo}: already exists and is public", "Give another name, or make the repo private on the hub."
            ) from error


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Convert errors of the hub's client into `RequestError` and `HubError`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise RequestError(
                f"{repo}: the hub rejects the token: {_reason(error)}",
                "Set HF_TOKEN to a token with write access to this owner's repos.",
            ) from error
        raise HubError(f"{repo}: the hub answered {error.response.status_code}: {_reason(error)}") from error
    except httpx2.HTTPError as error:
        raise HubError(f"{repo}: the hub cannot be reached: {error}", _PUSH_AGAIN) from error
    except (RuntimeError, ConnectionError) as error:  # upload of a large file, by either protocol
        raise HubError(f"{repo}: {error}: {error.__cause__ or ''}", _PUSH_AGAIN) from error
    except ValueError as error:  # invalid metadata in the card, or an answer that huggingface_hub cannot parse
        raise HubError(f"{repo}: the hub does not accept it: {error}") from error


def _reason(error: "HfHubHTTPError") -> str:
    return error.server_message or str(error).strip().splitlines()[0]

"""Push a bundle with huggingface_hub's client to a local server that implements the needed endpoints of the hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.bundle import Facts, seal, verify
from orchestrator.deploy.export.push import push
from orchestrator.errors import RecordError, RequestError

PUSH = """
import sys
from pathlib import Path
from orchestrator.deploy.export.push import push
from orchestrator.errors import OrchestratorError

folder, repo, *options = sys.argv[1:]
try:
    push(Path(folder), repo, private="private" in options, dry_run=False, say=print)
except OrchestratorError as error:
    sys.stderr.write(f"error: {error}")
    sys.exit(error.exit_code)
"""
TOKEN = "hf_right"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """A fake hub that stores what it receives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, Any]] = {}
        """Repo -> `private`, `commits`, `files` (name -> bytes)."""
        self.blobs: dict[str, bytes] = {}
        """sha256 -> content of a large file."""
        self.called: list[str] = []
        self.broken: dict[str, int] = {}
        """Part of a request path -> status of the error response."""


class Endpoint(BaseHTTPRequestHandler):
    """Handler of one request."""

    server: Hub

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self._body())

    def do_PUT(self) -> None:
        self._serve(self._body())

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _serve(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.called.append(f"{self.command} {path}")
        for part, status in hub.broken.items():
            if part in path:
                return self._answer(status, {"error": "out of order"})
        if path.startswith("/blobs/"):  # without a token: the real hub gives a signed URL
            hub.blobs[hashlib.sha256(body).hexdigest()] = body
            return self._answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return self._answer(200, {"type": "user", "name": "me"})
        if path == "/api/validate-yaml":
            wrong = [] if "library_name: peft" in json.loads(body)["content"] else [{"message": "no library"}]
            return self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repo = hub.repos.get("/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git"))
        if repo is None:
            return self._answer(404, {"error": "no such repo"})
        if "/preupload/" in path:
            return self._answer(200, {"files": [self._mode(file) for file in json.loads(body)["files"]]})
        if path.endswith("/objects/batch"):
            return self._answer(200, {"objects": [self._upload(asked) for asked in json.loads(body)["objects"]]})
        if "/commit/" in path:
            return self._commit(path, repo, [json.loads(line) for line in body.splitlines()])
        return self._answer(200, {"id": path.removeprefix("/api/models/"), "private": repo["private"]})

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or "me"
        name = f"{owner}/{wanted['name']}"
        if owner not in ("me", "ours"):
            return self._answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        if name in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo"})
        self.server.repos[name] = {"private": wanted.get("visibility") == "private", "commits": 0, "files": {}}
        return self._answer(200, {"url": f"{self.server.url}/{name}"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        return asked | {"actions": {"upload": {"href": f"{self.server.url}/blobs/{asked['oid']}"}}}

    def _commit(self, path: str, repo: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.blobs[value["oid"]]
        repo["commits"] += 1
        name = "/".join(path.split("/")[3:5])
        return self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        if "error" in document:
            self.send_header("X-Error-Message", document["error"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "deep").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# An adapter\n")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "deep" / "empty.txt").touch()
    (folder / "trial.json").write_text('{"name": "Ünïcode"}')
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/here/base"}')
    facts = Facts(format="adapter", base={"model": "embedded"}, versions={}, metrics={}, trial_id="t1")
    seal(folder, facts)
    return folder


def dry_run(folder: Path) -> list[str]:
    """Return the notes of a dry run. Network access would raise, as tests are offline."""
    lines: list[str] = []
    push(folder, "me/adapter", private=True, dry_run=True, say=lines.append)
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


def reseal(folder: Path, peft: dict[str, Any], **facts: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    seal(folder, Facts(**{"format": "adapter", "versions": {}, "metrics": {}, **facts}))
    return folder


def test_details_that_are_valid_only_here_are_noted(bundle: Path) -> None:
    assert dry_run(bundle) == [
        "the base is not on the hub: adapter_config.json names /here/base, a folder of this machine; other users must "
        "load their own copy of the base (`PeftModel.from_pretrained(base, ...)`)"
    ]
    hub_base, local = {"model": "owner/name"}, {"model": "/here/base"}
    pinned = {"base_model_name_or_path": "owner/name", "revision": "c0ffee"}
    assert dry_run(reseal(bundle, pinned, base=hub_base)) == []
    assert dry_run(reseal(bundle, pinned | {"revision": None}, base=hub_base)) == [
        "adapter_config.json names no revision of owner/name: other users get the current state of its main branch"
    ]
    assert dry_run(reseal(bundle, {"base_model_name_or_path": "/here/base"}, base=hub_base)) == [
        "adapter_config.json names /here/base as the base, but the adapter was trained on owner/name"
    ]
    config = {"base": local, "data": {"source": "/here/rows.jsonl", "mix": [{"source": "/here/more.csv"}]}}
    assert dry_run(reseal(bundle, pinned, base=local, config=config, format="merged")) == [
        f"/here/{name}, a path of this machine, is in manifest.json and trial.json"
        for name in ("base", "more.csv", "rows.jsonl")
    ]


def pushed(hub: Hub, folder: Path, repo: str, *options: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
    """Push in a new process, as huggingface_hub reads its settings when imported."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "HF_HOME": str(folder.parent),
    }
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | settings
    command = [sys.executable, "-c", PUSH, str(folder), repo, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_byte_arrives_in_one_commit(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    done = pushed(hub, bundle, "ours/adapter", "private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed to {hub.url}/ours/adapter, commit {COMMIT}"
    repo = hub.repos["ours/adapter"]
    assert (repo["private"], repo["commits"]) == (True, 1)
    sent = {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert repo["files"] == sent
    assert list(hub.blobs.values()) == [sent["adapter_model.safetensors"]]
    for name, content in repo["files"].items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert verify(tmp_path / "downloaded").facts.trial_id == "t1"


def test_a_bare_name_belongs_to_the_token_owner_and_an_existing_repo_gets_another_commit(
    hub: Hub, bundle: Path
) -> None:
    assert pushed(hub, bundle, "adapter").returncode == 0
    assert hub.repos["me/adapter"]["private"] is False
    again = pushed(hub, bundle, "me/adapter")
    assert again.returncode == 0, again.stderr
    assert hub.repos["me/adapter"]["commits"] == 2


def test_a_private_push_to_a_public_repo_is_rejected(hub: Hub, bundle: Path) -> None:
    hub.repos["me/adapter"] = {"private": False, "commits": 0, "files": {}}
    done = pushed(hub, bundle, "me/adapter", "private")
    assert (done.returncode, "me/adapter: already exists and is public" in done.stderr) == (2, True)
    assert hub.repos["me/adapter"]["files"] == {}


def test_rejections_by_the_hub_are_reported(hub: Hub, bundle: Path) -> None:
    for repo, token, words in [
        ("me/adapter", "hf_wrong", "me/adapter: the hub rejects the token: Invalid credentials"),
        ("others/adapter", TOKEN, "others/adapter: the hub rejects the token: You don't have the rights"),
    ]:
        done = pushed(hub, bundle, repo, token=token)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert hub.repos == {}


@pytest.mark.parametrize(("broken", "status"), [("/commit/", 500), ("/blobs/", 403)])
def test_a_failure_of_the_hub_publishes_nothing(hub: Hub, bundle: Path, broken: str, status: int) -> None:
    hub.broken[broken] = status
    done = pushed(hub, bundle, "me/adapter")
    assert done.returncode == 1, done.stderr
    assert "error: me/adapter: " in done.stderr
    assert str(status) in done.stderr
    assert hub.repos["me/adapter"]["files"] == {}


def test_an_unreachable_hub_is_reported(hub: Hub, bundle: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    done = pushed(hub, bundle, "me/adapter")
    assert (done.returncode, "me/adapter: the hub cannot be reached" in done.stderr) == (1, True), done.stderr


def facts_of(folder: Path) -> Facts:
    return Facts.model_validate(json.loads((folder / "manifest.json").read_text())["facts"])


def test_metadata_that_the_hub_rejects_are_reported(hub: Hub, bundle: Path) -> None:
    (bundle / "README.md").write_text("---\nlibrary_name: none\n---\n")
    seal(bundle, facts_of(bundle))
    done = pushed(hub, bundle, "me/adapter")
    assert (done.returncode, "no library" in done.stderr) == (1, True), done.stderr


def test_a_dry_run_lists_what_would_be_sent(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    lines: list[str] = []
    push(bundle, "me/adapter", private=True, dry_run=True, say=lines.append)  # network access would raise
    assert lines[0].startswith(f"{bundle} to me/adapter (private): 6 files, ")
    assert sum(line.startswith("  ") for line in lines) == 6
    assert f"{256000:>16,}  adapter_model.safetensors" in lines
    assert lines[-2].startswith("note: the base is not on the hub")
    assert lines[-1] == "dry run: nothing was sent"


@pytest.mark.parametrize("repo", ["", "a/b/c", "a b", "../out", "me/-", "me/a..b", "https://hub/me"])
def test_an_invalid_repo_name(bundle: Path, repo: str) -> None:
    with pytest.raises(RequestError, match=r"--repo .*: is not a valid repo name"):
        push(bundle, repo, private=False, dry_run=True, say=print)


def test_nothing_is_sent_without_a_token_or_from_a_damaged_bundle(hub: Hub, bundle: Path) -> None:
    assert "there is no token" in pushed(hub, bundle, "me/adapter", token="").stderr
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE: is set"):
        push(bundle, "me/adapter", private=False, dry_run=False, say=print)
    (bundle / "trial.json").write_text("{}")
    with pytest.raises(RecordError, match=r"trial\.json: has changed"):
        push(bundle, "me/adapter", private=False, dry_run=True, say=print)
    assert hub.called == []


def test_a_symbolic_link_is_rejected(bundle: Path, tmp_path: Path) -> None:
    whole = (bundle / "trial.json").read_bytes()
    (tmp_path / "secret").write_bytes(whole)  # the same content as in the manifest
    (bundle / "trial.json").unlink()
    (bundle / "trial.json").symlink_to(tmp_path / "secret")
    with pytest.raises(RecordError, match=r"trial\.json: is a symbolic link"):
        push(bundle, "me/adapter", private=False, dry_run=True, say=print)

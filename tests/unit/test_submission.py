"""Submitted sweeps: what Ray's own client sends to a job server on loopback, and how its answers are told.

The server here stands for Ray's, whose packages (`ray[default]`) the test environment does not have.
"""

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import submission
from orchestrator.cli.frame import app
from orchestrator.errors import ClusterError, RequestError
from orchestrator.spec import load_spec

DEMO = Path(__file__).parents[2] / "experiments" / "demo.yaml"


@dataclass
class JobServer:
    """What the server has received, and what it answers about the job."""

    url: str = ""
    token: str | None = None
    state: str = "SUCCEEDED"
    exit_code: int = 0
    log: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    package: bytes = b""

    def unpack(self, folder: Path) -> Path:
        """Unpack the uploaded files, as a node does; return the folder."""
        with zipfile.ZipFile(io.BytesIO(self.package)) as archive:
            archive.extractall(folder)
        return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(submission, "_POLL_S", 0.01)
    monkeypatch.setattr(submission, "_STEADY_S", 0.05)
    known = JobServer()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, document: Any, code: int = 200) -> None:
            body = json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            if known.token and known.token not in self.headers.get("Authorization", ""):
                self._answer("Unauthorized: Missing authentication token", 401)
            elif self.path.startswith("/api/version"):
                self._answer({"version": "4", "ray_version": "2.60.0", "ray_commit": "0", "session_name": "here"})
            elif self.path.startswith("/api/packages/"):
                self._answer({}, 200 if known.package else 404)
            elif self.path.endswith("/logs"):
                self._answer({"logs": known.log})
            else:
                self._answer(
                    {"type": "SUBMISSION", "status": known.state, "entrypoint": "", "driver_exit_code": known.exit_code}
                )

        def do_PUT(self) -> None:
            known.package = self._body()
            self._answer({})

        def do_POST(self) -> None:
            known.request = json.loads(self._body())
            self._answer({"submission_id": known.request["submission_id"], "job_id": known.request["submission_id"]})

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        known.url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield known
        http.shutdown()


def test_the_job_runs_the_sweep_with_all_overrides(server: JobServer, tmp_path: Path) -> None:
    answer = CliRunner().invoke(
        app,
        [
            "sweep", str(DEMO), "--submit", server.url, "--output", "/shared/runs", "--name", "first", "--seed", "7",
            "--set", "training.steps=12", "--warm-from", "/shared/runs/before",
        ],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert server.request["entrypoint"] == (
        "orchestrator sweep experiment.yaml --name first --output /shared/runs --address auto"
        " --warm-from /shared/runs/before"
    )
    assert server.request["metadata"] == {"sweep": "first", "output": "/shared/runs"}
    sent = load_spec(server.unpack(tmp_path) / "experiment.yaml")
    assert sent == load_spec(DEMO, ["training.steps=12", "search.seed=7"])
    assert server.request["submission_id"] in answer.output
    assert f"orchestrator resume first --output /shared/runs --submit {server.url}" in answer.output


def test_data_files_of_this_machine_travel_with_the_job(server: JobServer, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "parts" / "b.jsonl").write_text('{"question": "r", "answer": "b"}\n')
    (tmp_path / "parts" / "folder.jsonl").mkdir()
    (tmp_path / "test.jsonl").write_text('{"question": "s", "answer": "c"}\n')
    held_out = {"source": str(tmp_path / "test.jsonl")}
    sources = [f"data.source={tmp_path}/parts/*.jsonl", f"data.held_out={json.dumps(held_out)}"]
    submission.submit_sweep(load_spec(DEMO, sources), "first", "/shared/runs", server.url)
    node = server.unpack(tmp_path / "node")
    sent = load_spec(node / "experiment.yaml")
    assert sent.data.held_out.source is not None
    assert Path(sent.data.held_out.source).read_text() == (tmp_path / "test.jsonl").read_text()
    assert sent.data.source == f"{node}/train/*.jsonl"
    assert [file.read_text() for file in sorted((node / "train").iterdir())] == [
        (tmp_path / "parts" / name).read_text() for name in ("a.jsonl", "b.jsonl")
    ]


def test_a_path_of_the_cluster_stays_as_it_is(server: JobServer, tmp_path: Path) -> None:
    spec = load_spec(DEMO, ["data.source=/shared/rows.jsonl"])
    submission.submit_sweep(spec, "first", "/shared/runs", server.url)
    assert load_spec(server.unpack(tmp_path) / "experiment.yaml").data.source == "/shared/rows.jsonl"


def test_large_data_files_are_refused(server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "_MOST_BYTES", 10)
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    spec = load_spec(DEMO, [f"data.source={tmp_path}/rows.jsonl"])
    with pytest.raises(RequestError, match="a job takes at most"):
        submission.submit_sweep(spec, "first", "/shared/runs", server.url)
    assert not server.request


def test_a_resume_is_submitted_with_its_changes(server: JobServer) -> None:
    answer = CliRunner().invoke(
        app,
        [
            "resume", "first", "--submit", server.url, "--output", "/shared/runs", "--trials", "20",
            "--budget", "gpu_hours=3", "--trust-remote-code",
        ],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert server.request["entrypoint"] == (
        "orchestrator resume first --output /shared/runs --address auto --trials 20 --budget gpu_hours=3"
        " --trust-remote-code"
    )
    assert not server.package


def test_a_job_that_fails_at_once_is_an_error_with_its_output(server: JobServer) -> None:
    server.state, server.exit_code, server.log = "FAILED", 2, "importing\nerror: there is no such sweep\n"
    said: list[str] = []
    with pytest.raises(ClusterError, match="ended with exit code 2"):
        submission.submit_resume("first", "/shared/runs", server.url, say=said.append)
    assert "  | error: there is no such sweep" in said


def test_a_job_that_runs_is_left_to_itself(server: JobServer) -> None:
    server.state = "RUNNING"
    assert submission.submit_resume("first", "/shared/runs", server.url) == server.request["submission_id"]


def test_the_token_of_the_cluster_is_sent(server: JobServer) -> None:
    server.token = "f" * 64
    with pytest.raises(ClusterError, match="refuses this machine"):
        submission.submit_resume("first", "/shared/runs", server.url)
    # Ray reads its mode at import, so another process it is.
    command = ["-m", "orchestrator", "resume", "first", "--output", "/shared/runs", "--submit", server.url]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": server.token}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert server.token not in json.dumps(server.request) + done.stdout + done.stderr


def test_another_address_in_the_environment_is_not_used(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    submission.submit_resume("first", "/shared/runs", server.url)
    assert server.request


@pytest.mark.parametrize(
    ("address", "output", "fault"),
    [
        ("127.0.0.1:8265", "/shared/runs", "address of the cluster's dashboard"),
        ("http://127.0.0.1:9", "runs", "needs an absolute path"),
    ],
)
def test_wrong_requests(address: str, output: str, fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        submission.submit_resume("first", output, address)


def test_a_cluster_that_does_not_answer() -> None:
    with pytest.raises(ClusterError, match="cannot be reached"):
        submission.submit_resume("first", "/shared/runs", "http://127.0.0.1:9")


def test_address_and_submit_exclude_each_other() -> None:
    answer = CliRunner().invoke(app, ["sweep", str(DEMO), "--submit", "http://127.0.0.1:9", "--address", "auto"])
    assert isinstance(answer.exception, RequestError)

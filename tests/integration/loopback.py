"""Tracking servers on the loopback interface: the parts that each client needs, and servers that fail."""

import base64
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Answer = tuple[int, dict[str, Any] | str]
Serve = Callable[..., str]


@contextmanager
def serving() -> Iterator[Serve]:
    """Yield `serve(answer)`, which starts a server with `answer(method, path, arguments, authorization)`.

    `answer` may also be a status, "hang" or "close"; "refuse" is the address of a port at which nobody listens.
    """
    servers: list[ThreadingHTTPServer] = []
    over = threading.Event()
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))  # and never listens

    def start(answer: Callable[..., Answer] | int | str) -> str:
        if answer == "refuse":
            return f"http://127.0.0.1:{taken.getsockname()[1]}"

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                if answer == "hang":
                    over.wait(60)
                if answer in ("hang", "close"):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if isinstance(answer, int):
                    status, document = answer, {"errors": [{"message": "user is not logged in"}]}
                else:
                    is_json = self.headers.get("Content-Type", "").startswith("application/json")
                    arguments = json.loads(body) if is_json and body else dict(parse_qsl(parts.query))
                    status, document = answer(self.command, parts.path, arguments, self.headers.get("Authorization"))
                sent = document.encode() if isinstance(document, str) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            do_GET = do_PATCH = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    try:
        yield start
    finally:
        over.set()
        taken.close()
        for server in servers:
            server.shutdown()
            server.server_close()


class MlflowServer:
    """The part of MLflow's REST server that the tracker needs, behind a login. Pass `answer` to `serve`."""

    def __init__(self, name: str, password: str) -> None:
        self._login = "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()
        self._lock = threading.Lock()
        self.is_down = False
        self.answers_left: int | None = None
        """Number of requests after which it goes down; None for no limit."""
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}

    def answer(self, method: str, path: str, arguments: dict[str, Any], authorization: str | None) -> Answer:
        if self.is_down or self.answers_left == 0:
            return 503, "down"
        if self.answers_left is not None:
            self.answers_left -= 1
        if authorization != self._login:
            return 401, "You are not authenticated."
        with self._lock:
            return getattr(self, f"_{path.removeprefix('/api/2.0/mlflow/').replace('/', '_').replace('-', '_')}")(
                arguments
            )

    def history(self, run_name: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) for each time that a metric was logged, ordered by step."""
        (run,) = [run for run in self.runs.values() if run["info"]["run_name"] == run_name]
        return sorted((each["step"], each["value"]) for each in run["data"]["metrics"] if each["key"] == metric)

    def status(self, run_name: str) -> str:
        (run,) = [run for run in self.runs.values() if run["info"]["run_name"] == run_name]
        return str(run["info"]["status"])

    def _experiments_search(self, _: dict[str, Any]) -> Answer:
        return 200, {"experiments": []}

    def _experiments_get_by_name(self, arguments: dict[str, Any]) -> Answer:
        name = arguments["experiment_name"]
        if name not in self.experiments:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
        return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}

    def _experiments_create(self, arguments: dict[str, Any]) -> Answer:
        made = self.experiments[arguments["name"]] = str(len(self.experiments) + 1)
        return 200, {"experiment_id": made}

    def _runs_search(self, arguments: dict[str, Any]) -> Answer:
        wanted = arguments["filter"].split("'")[1]
        return 200, {"runs": [run for run in self.runs.values() if run["info"]["run_name"] == wanted]}

    def _runs_create(self, arguments: dict[str, Any]) -> Answer:
        made = uuid.uuid4().hex
        info = {"run_id": made, "experiment_id": arguments["experiment_id"], "run_name": arguments["run_name"]}
        info |= {"status": "RUNNING", "start_time": int(time.time() * 1000), "artifact_uri": "none"}
        self.runs[made] = {"info": info, "data": {"metrics": [], "params": [], "tags": []}}
        return 200, {"run": self.runs[made]}

    def _runs_get(self, arguments: dict[str, Any]) -> Answer:
        return 200, {"run": self.runs[arguments["run_id"]]}

    def _runs_update(self, arguments: dict[str, Any]) -> Answer:
        info = self.runs[arguments["run_id"]]["info"]
        info["status"] = arguments["status"]
        return 200, {"run_info": info}

    def _runs_log_batch(self, arguments: dict[str, Any]) -> Answer:
        data = self.runs[arguments["run_id"]]["data"]
        for kind in ("metrics", "params", "tags"):
            data[kind] += arguments.get(kind, [])
        return 200, {}

    def _metrics_get_history(self, arguments: dict[str, Any]) -> Answer:
        metrics = self.runs[arguments["run_id"]]["data"]["metrics"]
        return 200, {"metrics": [each for each in metrics if each["key"] == arguments["metric_key"]]}


class WandbServer:
    """The part of W&B's server that its client needs. Pass `answer` to `serve`."""

    def __init__(self) -> None:
        self.address = ""
        """Address that `serve` returned; the test must set it. Files are uploaded there."""
        self.is_down = False
        self.history: list[dict[str, Any]] = []
        """Everything that was logged, in order of arrival."""
        self.exit_codes: list[int] = []

    @property
    def steps(self) -> list[int]:
        return [line["_step"] for line in self.history]

    def answer(self, method: str, path: str, arguments: dict[str, Any], authorization: str | None) -> Answer:
        if self.is_down:
            return 503, "down"
        if path.endswith("/file_stream"):
            lines = arguments.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(line) for line in lines]
            if arguments.get("complete"):
                self.exit_codes.append(arguments["exitcode"])
            return 200, {}
        query, variables = arguments.get("query", ""), arguments.get("variables") or {}
        entity = {"id": "e", "name": "me"}
        if "UpsertBucket" in query:
            bucket = {"id": "b", "name": variables["name"], "project": {"id": "p", "name": "p", "entity": entity}}
            return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}}
        if "RunResumeStatus" in query:
            return 200, {"data": {"model": {"id": "p", "name": "p", "entity": entity, "bucket": self._bucket()}}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in variables["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if "viewer" in query:
            user = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return 200, {"data": {"viewer": user}}
        return 200, {"data": None}

    def _bucket(self) -> dict[str, Any] | None:
        if not self.history:
            return None
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(self.history[-1])]), "eventsTail": "[]"}
        return (
            {"id": "b", "name": "a", "summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}'} | counts | tails
        )

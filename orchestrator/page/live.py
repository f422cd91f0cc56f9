"""Serve the report of running sweeps on this machine, and tell an open page when the records have changed."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from orchestrator.analysis.sweep_data import read_data
from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.page.report import live_page, live_part
from orchestrator.record import SweepRecord, read_sweep

HOST: Final = "127.0.0.1"
"""Only this machine can connect."""

_REST: Final = 3.0
"""A page is made again after so many times the seconds that the last one took, so that this costs a sweep little."""


@dataclass(frozen=True)
class _Made:
    """A page as it was made."""

    of: str
    """`_records` at that time."""
    page: bytes
    update: bytes
    """What an open page replaces by it, as JSON."""
    tag: str
    """The entity tag by which an open page asks whether there is a newer one."""
    took_s: float
    at: float
    """Time at which it was made, in seconds of `time.monotonic`."""

    @classmethod
    def of_sweeps(cls, sweeps: Sequence[SweepRecord], records: str) -> "_Made":
        began = time.monotonic()
        part = live_part([read_data(read_sweep(sweep.paths.root)) for sweep in sweeps])  # they may have been extended
        document = {"html": part.html, "plots": part.plots, "is_over": part.is_over}
        update = json.dumps(document, allow_nan=False).encode()
        tag = f'"{sha256(update).hexdigest()[:16]}"'
        page = live_page(part, tag).encode()
        ended = time.monotonic()
        return cls(records, page, update, tag, ended - began, ended)


class LiveReport:
    """Makes the page when it is asked for, at most once for each state of the records."""

    def __init__(self, sweeps: Sequence[SweepRecord]) -> None:
        """
        Args:
            sweeps: the sweeps; several are compared.
        """
        self._sweeps = sweeps
        self._made: _Made | None = None
        self._lock = threading.Lock()

    def newest(self) -> _Made:
        """Return the page of this moment, or of a moment ago if it takes long to make.

        Raises:
            OrchestratorError: a sweep's record cannot be read.
            OSError: the storage fails.
        """
        with self._lock:
            made, now, records = self._made, time.monotonic(), _records(self._sweeps)
            if made is not None and (made.of == records or now < made.at + _REST * made.took_s):
                return made
            self._made = _Made.of_sweeps(self._sweeps, records)
            return self._made


def serve_report(
    sweeps: Sequence[SweepRecord], port: int, ready: Callable[[str], None], stop: threading.Event | None = None
) -> None:
    """Serve the report until an exception such as `KeyboardInterrupt` arrives.

    Args:
        sweeps: the sweeps; several are compared.
        port: port of this machine; 0 picks a free one.
        ready: called with the address.
        stop: ends the server when it is set.

    Raises:
        RequestError: the port cannot be used.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), _handler(LiveReport(sweeps)))
    except OSError as error:
        raise RequestError(
            f"port {port}: cannot be used: {error.strerror}", "Give another one: --port 0 picks a free one."
        ) from error
    server.daemon_threads = True
    with server:
        thread = threading.Thread(target=server.serve_forever, name="report", daemon=True)
        thread.start()
        try:
            ready(f"http://{HOST}:{server.server_port}/")
            (stop or threading.Event()).wait()
        finally:
            server.shutdown()


def _records(sweeps: Sequence[SweepRecord]) -> str:
    """Return a text that changes with every record that the report shows."""
    seen = []
    for sweep in sweeps:
        root = sweep.paths.root
        files = [
            *root.glob("*.json*"),
            *root.glob("trials/*/*.json*"),
            *root.glob("repeats/*.json*"),
            *root.glob("repeats/trials/*/*.json*"),
        ]
        for file in sorted(file for file in files if not file.name.startswith(".")):
            try:
                found = file.stat()
            except OSError:  # replaced at this moment
                continue
            seen.append(f"{file} {found.st_mtime_ns} {found.st_size}")
    return "\n".join(seen)


def _handler(report: LiveReport) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET of the page and of its update, and nothing else."""

        server: ThreadingHTTPServer

        def do_GET(self) -> None:
            if not self._is_for_this_server():
                self._answer(HTTPStatus.FORBIDDEN, b"This address is not that of the report.\n")
            elif self.path not in ("/", "/update"):
                self._answer(HTTPStatus.NOT_FOUND, b"There are / and /update.\n")
            else:
                self._report()

        def _report(self) -> None:
            try:
                made = report.newest()
            except (OrchestratorError, OSError) as error:  # shared storage may fail for a moment; the page asks again
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
                return
            if self.path == "/":
                self._answer(HTTPStatus.OK, made.page, "text/html; charset=utf-8")
            elif self.headers.get("If-None-Match") == made.tag:
                self._answer(HTTPStatus.NOT_MODIFIED, b"", tag=made.tag)
            else:
                self._answer(HTTPStatus.OK, made.update, "application/json", made.tag)

        def _is_for_this_server(self) -> bool:
            """Whether the address is this server's own. A page elsewhere can give its own name the address of this
            machine (DNS rebinding); the browser then sends that name."""
            port = self.server.server_port
            return self.headers.get_all("Host", []) in ([f"{HOST}:{port}"], [f"localhost:{port}"])

        def _answer(
            self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", tag: str = ""
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: the terminal belongs to the command."""

    return Handler
